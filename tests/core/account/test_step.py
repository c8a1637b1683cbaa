from dataclasses import replace
from functools import cache

import pytest
import torch

from ablations.study.arms import parse
from core import rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.measure import peak_bytes, tensor_bytes
from core.model import parameters
from core.ops import rewrite
from core.optimizers import AdamW, Averaged, Clipped
from core.step import make_step, objective, start
from core.targets import LABELS, Targets

B16 = vit.VitConfig(image=224, patch=16, width=768, depth=12, heads=12, mlp=3072, classes=1000)
MIB = 2**20
U, S = 64 * 197 * 768 * 4 / MIB, 64 * 12 * 197 * 197 * 4 / MIB
SPEC = {  # MiB a block (16 u + s and what each method leaves of it), and the peak in GB, if one is known
    "baseline": (704.7, 10.15),
    "recompute": (704.7 - 6 * U, 7.52),
    "flash": (591, 8.73),
    "flash@flash-attn": (591, 8.73),
    "flash@flash-attn-4": (591, 8.73),
    "crs@0.5+flash": (480, 7.5),
    "crs@0.3+flash": (436, 6.9),
    "crs@0.5": (9 * U + S + 0.5 * 7 * U, None),
    "crs@0.3": (9 * U + S + 0.3 * 7 * U, None),
    "flash+recompute": (369, 6.09),
    "flash+readout": ((16 * 12 - 12) / 12 * U, None),
    "flash+recompute@True": (222, 4.10),
}
SMALL = vit.VitConfig(image=32, patch=4, width=32, depth=3, heads=2, mlp=64, classes=10, dropout=0.1)


@pytest.mark.parametrize("name", SPEC)
def test_vit_b_16_keeps_what_the_arithmetic_says(name):
    cost = account(B16, parse(name).ops, 64)
    block, peak = SPEC[name]
    assert cost.kept_bytes_per_block / MIB == pytest.approx(block, rel=0.005)  # the table rounds to 3 figures
    if peak:
        assert cost.peak_bytes / 1e9 == pytest.approx(peak, rel=0.01)
    assert cost.parameters == parameters(B16) == 86_567_656
    assert sum(cost.kept_by_op.values()) == sum(cost.kept_by_block.values()) == cost.kept_bytes


def kept_by_hooks(config, ops, batch):
    """Bytes autograd keeps, each storage once, by its own hooks on a real run; parameters and input not counted."""
    params = {n: p.requires_grad_() for n, p in vit.init(config, 0).items()}
    images, labels = torch.zeros(batch, 3, config.image, config.image), torch.arange(batch) % config.classes
    known = {p.untyped_storage().data_ptr() for p in params.values()} | {labels.untyped_storage().data_ptr()}
    kept, alive = {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective(config, ops, lambda i, k: i / 255)(params, (images, labels), rng.key(0))
    return sum(kept.values())


@pytest.mark.parametrize("name", ["baseline", "flash", "decatt", "crs@0.3", "recompute", "flash+recompute@True"])
def test_kept_bytes_are_what_autograd_keeps(name):
    ops = parse(name).ops
    assert account(SMALL, ops, 8).kept_bytes == pytest.approx(kept_by_hooks(SMALL, ops, 8), rel=0.01)


@pytest.mark.parametrize("size", [16, 1])
@pytest.mark.parametrize("name", ["baseline", "crs@0.3+decatt+flash", "recompute@True", "mrt"])
def test_predicted_peak_is_the_measured_one(name, size):
    """Of images that are resized or mixed in the step, of clipped gradients and averaged weights, too."""
    arm = parse(name, {"mrt": {"image": 32, "min_patch": 4, "max_patch": 8}})
    ops, cpu, side = arm.ops, torch.device("cpu"), 16 if name == "mrt" else 32
    clipped, averaged = (Clipped(AdamW(), 1.0), LABELS), (Averaged(AdamW(), 0.9, warmup=True), Targets(0.4, 0.1))
    optimizer, targets = clipped if size == 1 else averaged
    step = make_step(objective(SMALL, ops, lambda i, k: i.float() / 255, targets=targets), optimizer, ops)
    batch = torch.zeros(size, 3, side, side, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64)
    state = start(vit.init(SMALL, 0), optimizer, rng.key(0))
    step(state, batch)
    predicted = account(SMALL, ops, size, optimizer=optimizer, image=side, targets=targets)
    assert predicted.state_bytes == tensor_bytes(tuple(state))
    assert predicted.peak_bytes == pytest.approx(peak_bytes(step, state, batch, device=cpu), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "crs@0.3+flash", "flash+recompute"])
def test_predicted_peak_on_cuda_within_five_percent(name):
    ops, device = parse(name).ops, torch.device("cuda")
    step = make_step(objective(B16, ops, lambda i, k: i.float() / 255, torch.bfloat16), AdamW())
    batch = torch.zeros(64, 3, 224, 224, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    batch = tuple(t.to(device) for t in batch)
    state = start(vit.init(B16, 0, device=device), AdamW(), rng.key(0, device))
    step(state, batch)
    predicted = account(B16, ops, 64, torch.bfloat16).peak_bytes
    assert predicted == pytest.approx(peak_bytes(step, state, batch, device=device), rel=0.05)


def test_bf16_halves_what_the_maps_keep():
    full, half = (account(B16, parse("flash").ops, 8, dtype) for dtype in (torch.float32, torch.bfloat16))
    for made in ("mlp.fc1 addmm", "mlp.fc1 gelu", "attn.qkv addmm"):
        assert half.kept_by_op[made] * 2 == full.kept_by_op[made]


def test_evaluation_keeps_nothing():
    forward = account(SMALL, EXACT, 4, mode="eval")
    assert forward.kept_bytes == 0
    assert forward.state_bytes < account(SMALL, EXACT, 4).state_bytes / 2


def test_a_custom_operator_is_followed():
    """One outside aten: its result is kept, and read, like any other."""
    _doubled()
    double = torch.ops.tests_account.doubled

    def attend(inner, site, q, k, v):
        return inner(site, q, k, double(v.contiguous()))

    plain, custom = account(SMALL, EXACT, 8), account(SMALL, rewrite("double", wrap={"attend": attend})(EXACT), 8)
    assert custom.kept_by_op["attn.qkv doubled"] == SMALL.depth * 8 * SMALL.tokens * SMALL.width * 4
    assert custom.flops == plain.flops


@cache
def _doubled():
    op = torch.library.custom_op(
        "tests_account::doubled", lambda v: 2 * v, mutates_args=(), schema="(Tensor v) -> Tensor"
    )
    op.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, G: 2 * G)


def test_a_scorers_network_is_there_before(tmp_path):
    from torchvision.models import shufflenet_v2_x0_5

    torch.save(shufflenet_v2_x0_5().state_dict(), tmp_path / "weights.pth")
    config = replace(SMALL, image=64, patch=8)
    settings = {"tokens": 28, "min_patch": 8, "max_patch": 16}
    blur, features = (
        account(config, parse("mrt", {"mrt": settings | scorer}).ops, 2)
        for scorer in ({"scorer": "blur"}, {"scorer": "features", "weights": str(tmp_path / "weights.pth")})
    )
    assert features.kept_bytes == blur.kept_bytes
    assert features.flops > blur.flops  # convolutions


def test_bad_input():
    with pytest.raises(InputError, match="batch size 0 is too small"):
        account(SMALL, EXACT, 0)
    with pytest.raises(InputError, match="unknown mode 'both'; legal: train, eval"):
        account(SMALL, EXACT, 4, mode="both")
