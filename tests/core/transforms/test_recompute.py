from dataclasses import replace

import pytest
import torch

from ablations.study.arms import parse
from core import rng, vit
from core.account.graphs import trace
from core.errors import InputError
from core.layers import EXACT
from core.ops import rewrite
from core.step import objective, value_and_grad
from core.transforms.crs import crs
from core.transforms.recompute import recompute


def by_func(loss):
    """value_and_grad by torch.func instead of autograd."""
    transformed = torch.func.grad_and_value(loss, has_aux=True)

    def differentiated(*args):
        gradients, (value, aux) = transformed(*args)
        return value, aux, gradients

    return differentiated


DIFFERENTIATORS = {"autograd": value_and_grad, "func": by_func}
REWRITES = {"norms and GELU": recompute(), "and fc1": recompute(fc1=True)}


@pytest.mark.parametrize("differentiator", DIFFERENTIATORS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", REWRITES)
def test_loss_and_gradients_are_exact(config, batch, name, dropout, differentiator):
    """Also with dropout, whose mask must be the same in both passes, and a batch that does not divide into parts."""
    config = replace(config, dropout=dropout)
    params = {n: p.double() for n, p in vit.init(config, 0).items()}
    images, labels = batch[0].double(), batch[1]
    (loss, _, exact), (other, _, mine) = (
        DIFFERENTIATORS[differentiator](objective(config, ops, lambda i, k: i, torch.float64))(
            params, (images, labels), rng.key(2)
        )
        for ops in (EXACT, REWRITES[name](EXACT))
    )
    assert loss.item() == pytest.approx(other.item(), rel=1e-12)
    for n in exact:
        assert torch.allclose(exact[n], mine[n], rtol=1e-9, atol=1e-12), n


def test_the_compiler_keeps_less_too(config):
    """What is rebuilt is not merged with what the forward pass computed: 4.5 u, then 8.5 u less a block of MLP ratio 2,
    compiled as eager (u = 32 x 17 x 16 float32; LayerNorm's statistics give and take a little)."""
    config, u = replace(config, depth=1), 32 * 17 * 16 * 4
    plain, norms, mlp = (trace(config, ops, 32).kept_bytes for ops in (EXACT, *(t(EXACT) for t in REWRITES.values())))
    assert plain - norms >= 0.95 * config.depth * 4 * u
    assert norms - mlp >= 0.95 * config.depth * 2 * u


@pytest.mark.parametrize("differentiator", DIFFERENTIATORS)
def test_recomputing_the_mlp_compiles_to_one_graph(config, batch, differentiator):
    loss = objective(config, recompute(fc1=True)(EXACT), lambda i, k: i)
    step = DIFFERENTIATORS[differentiator](loss)
    params, key = vit.init(config, 0), rng.key(1)
    value, _, exact = step(params, batch, key)
    if differentiator == "func":
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    else:
        compiled = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    other, _, mine = compiled(params, batch, key)
    assert value.item() == pytest.approx(other.item(), rel=1e-6)
    assert all(torch.allclose(exact[n], mine[n], rtol=1e-4, atol=1e-6) for n in exact)


def test_it_is_refused_with_another_transform_of_the_maps():
    for first, second in ((crs(0.5), recompute()), (recompute(), crs(0.5)), (recompute(True), crs(0.5))):
        with pytest.raises(InputError, match="crs and recompute both replace the model's linear"):
            second(first(EXACT))
    with pytest.raises(InputError, match="crs and recompute both replace the model's linear"):
        parse("crs@0.5+recompute")


@pytest.mark.parametrize("place", ["norm2", "mlp.fc1", "mlp.fc2"])
def test_what_it_does_by_itself_nobody_else_can_change(place):
    """With fc1 the MLP's maps and LayerNorm are inside: even a wrapper there would never be called."""
    primitive = "norm" if place == "norm2" else "linear"
    other = rewrite("other", wrap={primitive: lambda inner, site, *inputs: inner(site, *inputs)}, at=(place,))
    for first, second in ((other, recompute(True)), (recompute(True), other)):
        with pytest.raises(InputError, match=f"recompute does the model's {primitive} at .*{place}.*other"):
            second(first(EXACT))
    light = recompute()
    assert other(light(EXACT)).parts == light(other(EXACT)).parts
