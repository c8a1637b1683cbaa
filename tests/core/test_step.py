import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from core import rng, vit
from core.errors import InputError
from core.ops import EXACT
from core.step import AdamW, adamw, cast, clipped, make_step, objective, start, value_and_grad


def keep(images, key):
    return images


def double(params):
    return {n: p.double() for n, p in params.items()}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(decay):
    generator = torch.Generator().manual_seed(0)
    params = {f"w{i}.weight": torch.randn(5, i + 1, dtype=torch.float64, generator=generator) for i in range(4)}
    theirs = [torch.nn.Parameter(p.clone()) for p in params.values()]
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay)
    state, optimizer = start(params, rng.key(0)), AdamW(1e-2, decay)
    for _ in range(20):
        gradients = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in params.items()}
        for p, g in zip(theirs, gradients.values(), strict=True):
            p.grad = g
        reference.step()
        state, _ = adamw(state, gradients, optimizer)
    assert state.step == 20
    for ours, p in zip(state.params.values(), theirs, strict=True):
        assert (ours - p).abs().max() < 1e-12


def test_decay_of_matrices_only():
    optimizer = AdamW(decay_all=False)
    decayed = {n for n in vit.shapes(vit.VitConfig(16, 4, 16, 1, 2, 32, 5)) if optimizer.decays(n)}
    assert decayed == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight",
    }  # fmt: skip


@pytest.mark.parametrize(("done", "expected"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.5), (100, 0.0)])
def test_cosine_schedule_with_warm_up(done, expected):
    optimizer = AdamW(2.0, schedule="cosine", warmup=10, steps=100)
    if done > 10:
        expected = (1 + math.cos(math.pi * (done - 10) / 90)) / 2
    assert optimizer.rate(torch.tensor(done)).item() == pytest.approx(2 * expected)


def test_constant_schedule():
    assert AdamW(0.5).rate(torch.tensor(1000)).item() == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning rate 0.0 must be finite and above 0"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"weight_decay": -1.0}, "weight decay -1.0"),
        ({"clip": 0.0}, "clip 0.0 must be finite and above 0, or None"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'.*did you mean 'cosine'"),
        ({"schedule": "cosine", "warmup": 5, "steps": 5}, "warm-up of 5 steps"),
    ],
)
def test_bad_optimizer_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        AdamW(**options)


@pytest.mark.parametrize("largest", [1e-3, 0.5, 1e3])
def test_clipping_equals_torch(config, largest):
    params = double(vit.init(config, 1))
    gradients = {n: torch.sin(7 * p + 1) for n, p in params.items()}
    leaves = [torch.nn.Parameter(p.clone()) for p in params.values()]
    for leaf, g in zip(leaves, gradients.values(), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(leaves, largest)
    mine = clipped(gradients, largest)
    for leaf, g in zip(leaves, mine.values(), strict=True):
        torch.testing.assert_close(leaf.grad, g, rtol=1e-12, atol=0)
    assert torch.equal(clipped(gradients, 1e9)["pos_embed"], gradients["pos_embed"])


@pytest.mark.parametrize("differentiator", ["autograd", "func"])
def test_five_steps_equal_a_plain_training_loop(config, batch, differentiator):
    """timm's model, autograd and torch.optim.AdamW in float64, against the pure step."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2
    ).double()
    params, (images, labels) = double(vit.init(config, 3)), (batch[0].double(), batch[1])
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1)
    step = make_step(objective(config, EXACT, keep, torch.float64), AdamW(1e-2, 0.1), differentiator)
    state = start(params, rng.key(0))
    for _ in range(5):
        state, metrics = step(state, (images, labels))
        loss = F.cross_entropy(functional_call(model, theirs, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert metrics.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for name, p in theirs.items():
        # The gradient of the keys' bias is zero: Adam turns its rounding errors into moves of up to rate / eps times.
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("differentiator", ["autograd", "func"])
def test_step_is_pure(config, batch, differentiator):
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5, dropout=0.3)
    step = make_step(objective(config, EXACT, keep), AdamW(), differentiator)
    state = start(vit.init(config, 0), rng.key(0))
    before = [{n: p.clone() for n, p in part.items()} for part in state[:3]]
    first, metrics = step(state, batch)
    again, metrics_again = step(state, batch)
    assert metrics == metrics_again
    assert all(torch.equal(first.params[n], again.params[n]) for n in first.params)
    assert all(torch.equal(part[n], kept[n]) for part, kept in zip(state[:3], before, strict=True) for n in part)
    assert not any(p.requires_grad for p in first.params.values())
    later, _ = step(first, batch)  # another step draws another dropout
    assert later.step == 2


def test_unused_parameters_get_zero_gradients():
    params = {"used": torch.ones(2), "unused": torch.ones(3)}

    def fn(p):
        from core.step import Aux

        loss = p["used"].sum()
        return loss, Aux(loss, loss, loss)

    for differentiator in ("autograd", "func"):
        _, _, gradients = value_and_grad(fn, differentiator)(params)
        assert gradients["unused"].tolist() == [0, 0, 0]


def test_cast_leaves_norms_alone(config):
    low = cast(vit.init(config, 0), torch.bfloat16)
    assert low["norm.weight"].dtype == low["blocks.0.norm1.bias"].dtype == torch.float32
    assert low["head.weight"].dtype == low["pos_embed"].dtype == torch.bfloat16


def test_bf16_step_keeps_float32_masters(config, batch):
    loss = objective(config, EXACT, keep, torch.bfloat16)
    state = start(vit.init(config, 0), rng.key(0))
    exact = make_step(objective(config, EXACT, keep), AdamW())(state, batch)[1]
    after, metrics = make_step(loss, AdamW())(state, batch)
    assert {p.dtype for part in after[:3] for p in part.values()} == {torch.float32}
    assert metrics.loss.dtype == torch.float32
    assert metrics.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)
