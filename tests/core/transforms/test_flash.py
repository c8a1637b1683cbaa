import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site, rewrite
from core.transforms.flash import cuda_flash_obstacle, flash, sdpa_attention, tiled_attention


def inputs(n=9, m=None, d=5, e=None, dtype=torch.float64, seed=0):
    m, e = m or n, e or d
    keys = rng.split(rng.key(seed), 3)
    return [
        (rng.uniform(key, (2, 3, *shape)).to(dtype) * 6 - 3).requires_grad_()
        for key, shape in zip(keys, ((n, d), (m, d), (m, e)), strict=True)
    ]


def plain(q, k, v):
    """The definition, in the precision of its inputs."""
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def gradients(fn, qkv):
    output = fn(*qkv)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad((output * weight).sum(), qkv)


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_tiled_gradcheck(block):
    assert torch.autograd.gradcheck(lambda *qkv: tiled_attention(*qkv, block=block), inputs(5, d=3))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 50), st.integers(0, 9)
)
def test_tiled_equals_plain(n, m, d, e, block, seed):
    qkv = inputs(n, m, d, e, seed=seed)
    torch.testing.assert_close(tiled_attention(*qkv, block=block), plain(*qkv), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(
        gradients(lambda *t: tiled_attention(*t, block=block), qkv), gradients(plain, qkv), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", [sdpa_attention, tiled_attention])
@pytest.mark.parametrize("n", [1, 17, 65, 197])
def test_fused_equals_plain_in_float64(attention, n):
    qkv = inputs(n, d=16)
    torch.testing.assert_close(attention(*qkv), plain(*qkv), rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(attention, qkv), gradients(plain, qkv), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", [sdpa_attention, tiled_attention])
def test_large_scores_do_not_overflow(attention):
    q, k, v = inputs(20, d=8, dtype=torch.float32)
    expected = plain(*(t.double() * s for t, s in ((q, 100), (k, 100), (v, 1)))).float()
    torch.testing.assert_close(attention(q * 100, k * 100, v), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [sdpa_attention, tiled_attention])
def test_bfloat16_is_as_near_as_the_format_allows(attention):
    qkv = inputs(65, d=16, dtype=torch.bfloat16)
    exact = plain(*(t.double() for t in qkv))
    output = attention(*qkv)
    assert output.dtype == torch.bfloat16
    assert (output.double() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_the_cpu_kernel_is_torchs_flash_kernel():
    """By the name of the operator that ran, not by assumption."""
    graph = make_fx(sdpa_attention)(*(t.detach() for t in inputs(17, dtype=torch.float32)))
    assert any("flash_attention_for_cpu" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_no_tensor_with_n_squared_elements_a_head(backend):
    """In the captured forward and backward graph of a block's attention."""
    N, d, B, h = 256, 8, 2, 3
    config = vit.VitConfig(16, 4, h * d, 1, h, 32, 5)

    def largest(ops):
        def loss(q, k, v):
            return ops.attend(Site("attn", {}, config, ops, None, q.dtype, {}), q, k, v).square().sum()

        graph = make_fx(torch.func.grad(loss, argnums=(0, 1, 2)))(*(torch.randn(B, h, N, d) for _ in range(3)))
        values = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
        tensors = [
            t for v in values for t in (v if isinstance(v, tuple | list) else [v]) if isinstance(t, torch.Tensor)
        ]
        return max(t.numel() for t in tensors)

    assert largest(EXACT) >= B * h * N * N
    assert largest(flash(backend)(EXACT)) < B * h * N * N


def kept_bytes(config, ops, batch):
    """Bytes that plain autograd keeps for the backward pass beside parameters, each storage once."""
    params = {n: p.requires_grad_() for n, p in vit.init(config, 0).items()}
    own = {p.untyped_storage().data_ptr() for p in params.values()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = vit.forward(params, torch.zeros(batch, 3, config.image, config.image), config, ops)
    assert output.logits.isfinite().all()
    return sum(kept.values())


@pytest.mark.parametrize(("ops", "units", "maps"), [(EXACT, 16, 1), (flash()(EXACT), 16, 0)], ids=["plain", "flash"])
def test_bytes_kept_a_block(ops, units, maps):
    """16 u + s plain, 16 u flash, with u = B N D and s = B h N^2 float32 elements."""
    B, N, D, h = 2, 65, 96, 6
    one, two = (vit.VitConfig(32, 4, D, depth, h, 4 * D, 10) for depth in (1, 2))
    u, s = 4 * B * N * D, 4 * B * h * N * N
    assert kept_bytes(two, ops, B) - kept_bytes(one, ops, B) == pytest.approx(units * u + maps * s, rel=0.01)


def test_bad_values_are_refused():
    with pytest.raises(
        InputError,
        match="unknown flash backend 'spda'; legal: sdpa, tiled, flash-attn, flash-attn-4; did you mean 'sdpa'",
    ):
        flash("spda")
    with pytest.raises(ValueError, match="block 0"):
        tiled_attention(*inputs(), block=0)


def test_another_attention_is_refused_by_name():
    slow = rewrite("slow", replace={"attend": lambda site, q, k, v: v})
    for first, second in ((slow, flash()), (flash(), slow)):
        with pytest.raises(InputError, match="flash and slow both replace the model's attend; choose one"):
            second(first(EXACT))
    with pytest.raises(InputError, match="flash and flash both replace the model's attend"):
        flash()(flash("tiled")(EXACT))


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "reason"),
    [
        (torch.float32, 64, (9, 0), "takes bfloat16 or float16, not float32; pass --precision bf16"),
        (torch.bfloat16, 64, (7, 0), "compute capability 8.0"),
        (torch.bfloat16, 320, (9, 0), "head widths up to 256"),
        (torch.bfloat16, 64, (9, 0), None),
    ],
)
def test_what_the_cuda_kernel_takes(dtype, width, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    obstacle = cuda_flash_obstacle(dtype, width, torch.device("cuda"))
    assert reason in obstacle if reason else obstacle is None


@pytest.mark.gpu
def test_cuda_runs_the_flash_kernel_or_refuses():
    q, k, v = (t.detach().cuda() for t in inputs(65, d=64, dtype=torch.bfloat16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        output = sdpa_attention(q, k, v)
        torch.cuda.synchronize()
    assert any("flash" in event.key for event in trace.key_averages())
    torch.testing.assert_close(output.cpu().double(), plain(*(t.cpu().double() for t in (q, k, v))), rtol=0, atol=0.03)
    with pytest.raises(InputError, match="not float32"):
        sdpa_attention(q.float(), k.float(), v.float())


def test_equals_torch_math_attention():
    qkv = [t.detach() for t in inputs(33, d=8)]
    torch.testing.assert_close(tiled_attention(*qkv), F.scaled_dot_product_attention(*qkv), rtol=1e-12, atol=1e-12)
