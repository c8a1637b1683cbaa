import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.model import shapes
from core.ops import rewrite
from core.optimizers import AdamW, Averaged, Clipped, changed
from core.step import make_step, objective, start
from core.transforms.muon import muon


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(decay):
    generator = torch.Generator().manual_seed(0)
    params = {f"w{i}.weight": torch.randn(5, i + 1, dtype=torch.float64, generator=generator) for i in range(4)}
    theirs = [torch.nn.Parameter(p.clone()) for p in params.values()]
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay)
    optimizer = AdamW(1e-2, decay)
    state, count = optimizer.init(params), torch.tensor(0)
    for _ in range(20):
        gradients = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in params.items()}
        for p, g in zip(theirs, gradients.values(), strict=True):
            p.grad = g
        reference.step()
        params, state = optimizer.update(params, gradients, state, count)
        count = count + 1
    for ours, p in zip(params.values(), theirs, strict=True):
        assert (ours - p).abs().max() < 1e-12
    for name, p in zip(params, theirs, strict=True):
        torch.testing.assert_close(state.mean[name], reference.state[p]["exp_avg"], rtol=1e-12, atol=0)
        torch.testing.assert_close(state.square[name], reference.state[p]["exp_avg_sq"], rtol=1e-12, atol=0)


def test_decay_of_matrices_only():
    optimizer = AdamW(decay_all=False)
    decayed = {n for n in shapes(vit.VitConfig(16, 4, 16, 1, 2, 32, 5)) if optimizer.decays(n)}
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
        ({"schedule": "cosin"}, "unknown schedule 'cosin'.*did you mean 'cosine'"),
        ({"schedule": "cosine", "warmup": 5, "steps": 5}, "warm-up of 5 steps"),
    ],
)
def test_bad_optimizer_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        AdamW(**options)
    with pytest.raises(InputError, match="clip 0.0 must be finite and above 0, or None"):
        Clipped(AdamW(), 0.0)


class Given:
    """Makes the gradients that it is given the parameters."""

    def init(self, params):
        return ()

    def update(self, params, gradients, state, step):
        return gradients, state


@pytest.mark.parametrize("largest", [1e-3, 0.5, 1e3])
def test_clipping_equals_torch(config, largest):
    params = {n: p.double() for n, p in vit.init(config, 1).items()}
    gradients = {n: torch.sin(7 * p + 1) for n, p in params.items()}
    leaves = [torch.nn.Parameter(p.clone()) for p in params.values()]
    for leaf, g in zip(leaves, gradients.values(), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(leaves, largest)
    mine, _ = Clipped(Given(), largest).update(params, gradients, (), torch.tensor(0))
    for leaf, g in zip(leaves, mine.values(), strict=True):
        torch.testing.assert_close(leaf.grad, g, rtol=1e-12, atol=0)


def test_gradients_are_clipped_together_whatever_a_transform_makes_of_the_optimizer(config):
    """Under muon too: a step of clipped gradients is one of what torch's clip_grad_norm_ leaves of them."""
    params = {n: p.double() for n, p in vit.init(config, 1).items()}
    gradients = {n: torch.sin(7 * p + 1) for n, p in params.items()}
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    for n, leaf in leaves.items():
        leaf.grad = gradients[n].clone()
    torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
    by_torch = {n: leaf.grad for n, leaf in leaves.items()}
    clipping, plain = (changed(Averaged(one, 0.5), muon()(EXACT)) for one in (Clipped(AdamW(), 0.5), AdamW()))
    for ours, theirs in zip(
        tree_leaves(clipping.update(params, gradients, clipping.init(params), torch.tensor(0))),
        tree_leaves(plain.update(params, by_torch, plain.init(params), torch.tensor(0))),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_equals_timms(warmup):
    """Ten steps of a module under torch.optim.AdamW, as timm's training script calls its ModelEmaV3."""
    from timm.utils import ModelEmaV3

    module = torch.nn.Linear(3, 2).double()
    theirs, reference = ModelEmaV3(module, decay=0.7, use_warmup=warmup), torch.optim.AdamW(module.parameters(), lr=0.1)
    optimizer = Averaged(AdamW(0.1), 0.7, warmup)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    state = optimizer.init(params)
    for done in range(10):
        gradients = {name: torch.sin(p + done) for name, p in params.items()}
        for p, g in zip(module.parameters(), gradients.values(), strict=True):
            p.grad = g.clone()
        reference.step()
        theirs.update(module, step=done + 1)
        params, state = optimizer.update(params, gradients, state, torch.tensor(done))
        for name, p in theirs.module.named_parameters():
            torch.testing.assert_close(state.average[name], p.detach(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(state.average["weight"], params["weight"])


def test_the_average_is_of_all_that_transforms_train(config, batch):
    """Muon's matrices too; a frozen parameter is evaluated as it is."""
    still = rewrite("still", frozen=lambda name: name == "cls_token")
    ops, optimizer = still(muon()(EXACT)), Averaged(AdamW(), 0.5)
    step = make_step(objective(config, ops, lambda images, key: images), optimizer, ops)
    begun = start(vit.init(config, 0), optimizer, rng.key(0), ops)
    first, _ = step(begun, batch)
    second, _ = step(first, batch)
    assert second.judged.keys() == second.params.keys() == second.optimizer.average.keys() | {"cls_token"}
    assert second.judged["cls_token"] is begun.params["cls_token"]
    for name, p in second.optimizer.average.items():
        torch.testing.assert_close(second.judged[name], (first.params[name] + second.params[name]) / 2)
        torch.testing.assert_close(p, second.judged[name])


class Sgd:
    """Another optimizer than AdamW, without a state."""

    def init(self, params):
        return ()

    def update(self, params, gradients, state, step):
        return {n: p - self.rate(step) * gradients[n] for n, p in params.items()}, state

    def rate(self, step):
        return 0.1 / (step.double() + 1)


def test_a_step_takes_any_optimizer():
    """Steepest descent on |p - 3|^2 / 2 by its closed form: the distance shrinks by 1 - rate a step."""

    def loss(params, batch, key):
        value = (params["p"] - 3).square().sum() / 2
        return value, value.detach().expand(3)

    step, state = make_step(loss, Sgd(), EXACT), start({"p": torch.zeros(2, dtype=torch.float64)}, Sgd(), rng.key(0))
    for done in range(3):
        state, metrics = step(state, (torch.zeros(1), torch.zeros(1)))
        assert metrics.learning_rate.item() == pytest.approx(0.1 / (done + 1))
    assert state.params["p"].tolist() == pytest.approx([3 - 3 * 0.9 * 0.95 * (1 - 0.1 / 3)] * 2, rel=1e-12)
