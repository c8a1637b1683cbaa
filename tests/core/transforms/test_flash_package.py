"""The flash-attn package's kernels stand behind two operators. Without a GPU a stand-in with the package's
signatures (2.8 and 4.0) takes their place: layout, order of arguments and gradients are tested up to the launch."""

import importlib
import importlib.util
import subprocess
import sys
import types

import pytest
import torch

from ablations.study import arms
from core import vit
from core.errors import InputError
from core.layers import EXACT
from core.transforms import flash_package
from core.transforms.flash import flash

MODULES = {"flash-attn": "flash_attn.flash_attn_interface", "flash-attn-4": "flash_attn.cute.interface"}


def forward(q, k, v, scale):
    """Plain attention and its log-sum-exp, [B,N,h,d] in and out."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v), scores.logsumexp(-1)


def backward(G, q, k, v, out, lse, scale):
    """The published formulas, from the log-sum-exp and the output that were kept."""
    P = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale - lse[..., None]).exp()
    D = (G * out).sum(-1).transpose(1, 2)[..., None]
    dS = P * (torch.einsum("bnhd,bmhd->bhnm", G, v) - D) * scale
    grads = torch.einsum("bhnm,bmhd->bnhd", dS, k), torch.einsum("bhnm,bnhd->bmhd", dS, q)
    return (*grads, torch.einsum("bhnm,bnhd->bmhd", P, G))


def version2(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax):
    assert (dropout_p, causal, left, right, softcap, alibi_slopes, return_softmax) == (0, False, -1, -1, 0, None, False)
    out, lse = forward(q, k, v, softmax_scale)
    return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def version2_backward(
    dout, q, k, v, out, lse, dq, dk, dv, dropout_p, scale, causal, left, right, softcap, alibi, deterministic, rng_state
):
    assert (dropout_p, causal, left, right, softcap, alibi, deterministic) == (0, False, -1, -1, 0, None, False)
    for target, value in zip((dq, dk, dv), backward(dout, q, k, v, out, lse, scale), strict=True):
        assert target.is_contiguous()
        target.copy_(value)
    return lse


def version4(q, k, v, softmax_scale=None, return_lse=False):
    assert return_lse
    return forward(q, k, v, softmax_scale)


def version4_backward(q, k, v, out, dout, lse, softmax_scale=None):
    return backward(dout, q, k, v, out, lse, softmax_scale)


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package, on whatever device."""
    two = types.ModuleType("flash_attn.flash_attn_interface")
    two._wrapped_flash_attn_forward, two._wrapped_flash_attn_backward = version2, version2_backward
    four = types.ModuleType("flash_attn.cute.interface")
    four._flash_attn_fwd, four._flash_attn_bwd = version4, version4_backward
    for module in (types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute"), two, four):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(flash_package, "require", lambda name, *args: importlib.import_module(MODULES[name]))


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4"])
@pytest.mark.parametrize("differentiator", ["autograd", "func"])
def test_model_and_gradient_equal_plain_attention(name, differentiator, package, config):
    params = {n: p.double() for n, p in vit.init(config, 0).items()}
    images = torch.linspace(-1, 1, 2 * 3 * config.image**2, dtype=torch.float64).reshape(2, 3, config.image, -1)

    def loss(params, ops):
        return vit.forward(params, images, config, ops).logits.square().sum()

    def gradient(ops):
        if differentiator == "func":
            return torch.func.grad(loss)(params, ops)
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        return dict(zip(leaves, torch.autograd.grad(loss(leaves, ops), list(leaves.values())), strict=True))

    ours, exact = gradient(flash(name)(EXACT)), gradient(EXACT)
    for key, value in exact.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4"])
def test_one_graph(name, package):
    attend = flash_package.attention(name)
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    mine, eager = (torch.autograd.grad(fn(q, k, v).square().sum(), (q, k, v)) for fn in (compiled, attend))
    torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize(
    ("name", "dtype", "width", "capability", "reason"),
    [
        ("flash-attn", torch.float32, 64, (9, 0), "takes bfloat16 or float16, not float32; pass --precision bf16"),
        ("flash-attn", torch.bfloat16, 64, (7, 5), "needs compute capability 8.x, 9.x.*this GPU has 7.5"),
        ("flash-attn", torch.bfloat16, 60, (8, 0), "head widths that 8 divides, up to 256, not 60"),
        ("flash-attn-4", torch.bfloat16, 64, (8, 0), "needs compute capability 9.x, 10.x"),
        ("flash-attn-4", torch.bfloat16, 256, (9, 0), "up to 128, not 256"),
        ("flash-attn", torch.bfloat16, 64, (8, 6), None),
        ("flash-attn-4", torch.bfloat16, 64, (9, 0), None),
    ],
)
def test_what_the_kernels_take(name, dtype, width, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, MODULES[name], types.ModuleType(MODULES[name]))
    for parent in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    if reason is None:
        assert flash_package.require(name, dtype, width, torch.device("cuda")) is sys.modules[MODULES[name]]
        return
    with pytest.raises(InputError, match=reason):
        flash_package.require(name, dtype, width, torch.device("cuda"))


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4"])
def test_a_missing_package_and_a_cpu_are_refused(name, monkeypatch, config):
    """Where there are values; the arm itself can be named, and accounted for, anywhere."""
    arm = arms.parse(f"decatt+flash@{name}")
    with pytest.raises(InputError, match=f"flash@{name} needs a CUDA device; use flash@sdpa"):
        vit.forward(vit.init(config, 0), torch.zeros(1, 3, config.image, config.image), config, arm.ops)
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(InputError, match=f"flash@{name} needs its package.*pip install '{name}"):
        flash_package.require(name, torch.bfloat16, 64, torch.device("cuda"))


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4"])
def test_the_refusal_is_clear_from_a_compiled_graph_too(name):
    attend = torch.compile(flash_package.attention(name), fullgraph=True, backend="aot_eager")
    with pytest.raises(InputError, match=f"flash@{name} needs a CUDA device"):
        attend(*(torch.randn(1, 2, 5, 8) for _ in range(3)))


def test_importing_it_does_not_load_the_compiler():
    told = "print('torch._dynamo' in sys.modules)"
    code = f"import sys, torch; {told}; import core.transforms.flash_package; {told}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "module"), [("flash-attn", "flash_attn_2_cuda"), ("flash-attn-4", "cutlass")])
def test_the_kernels_run_on_cuda(name, module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the package {name} is not installed")
    q, k, v = (torch.randn(2, 3, 65, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        output = flash_package.attention(name)(q, k, v)
        ours = torch.autograd.grad(output.float().square().sum(), (q, k, v))
        torch.cuda.synchronize()
    assert any("flash" in event.key.lower() for event in trace.key_averages())
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = torch.softmax(wide[0] @ wide[1].mT / 8, -1) @ wide[2]
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=0.03)
    for mine, true in zip(ours, torch.autograd.grad(exact.square().sum(), wide), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=0.05, atol=0.05)
