"""The last block for the class token alone: the numbers of the whole block, less work, and whom it goes with."""

from dataclasses import replace
from functools import reduce

import pytest
import torch

from core import rng, vit
from core.account.step import account
from core.layers import EXACT
from core.step import objective, value_and_grad
from core.transforms.crs import crs
from core.transforms.decatt import decatt
from core.transforms.droppath import droppath
from core.transforms.flash import flash
from core.transforms.lora import lora
from core.transforms.mrt import mrt
from core.transforms.readout import readout
from core.transforms.recompute import recompute
from core.transforms.tome import tome

WITH = {
    "nothing": (),
    "flash": (flash(),),
    "tiled": (flash("tiled"),),
    "decatt": (decatt(3.0),),
    "decatt of the last layer": (decatt(3.0, layers=(-1,)), flash()),
    "crs": (crs(0.5),),
    "published crs": (crs(0.5, scope="published"),),
    "recompute": (recompute(),),
    "recompute with fc1": (recompute(fc1=True),),
    "mrt": (mrt(tokens=7, min_patch=4, max_patch=8), flash()),
    "tome, droppath and lora": (tome(2), droppath(0.5), lora(2), flash()),
}


def combined(transforms):
    return reduce(lambda ops, transform: transform(ops), transforms, EXACT)


def run(ops, config, batch, **options):
    params = {n: (p + 0.1 * rng.uniform(rng.named(rng.key(3), n), p.shape)).double() for n, p in
              vit.init(config, 0, ops).items()}  # fmt: skip
    loss = objective(config, ops, lambda images, key: images, torch.float64, **options)
    return value_and_grad(loss, ops.frozen)(params, (batch[0].double(), batch[1]), rng.key(7))


@pytest.mark.parametrize("name", WITH)
def test_loss_and_gradients_are_those_of_the_whole_block(config, batch, name):
    """In float64, alone and with others: what these change, they change as before."""
    config, ops = replace(config, depth=3), combined(WITH[name])
    (whole, aux, exact), (cut, other, gradients) = run(ops, config, batch), run(readout()(ops), config, batch)
    assert cut.item() == pytest.approx(whole.item(), rel=1e-12)
    assert other.penalty.item() == pytest.approx(aux.penalty.item(), rel=1e-12)
    for n, g in exact.items():
        assert (gradients[n] - g).abs().max() <= 1e-10 * g.abs().max().clamp_min(1e-6), n


def test_the_blocks_before_it_are_as_they_were(config, batch):
    """Only the last one gives the class token alone."""
    shapes, ops = [], readout()(EXACT)

    def block(site, x):
        y, carry = ops.block(site, x)
        shapes.append(tuple(y.shape))
        return y, carry

    vit.forward(vit.init(config, 0), batch[0], config, replace(ops, block=block))
    assert shapes == [(6, 17, 16), (6, 1, 16)]


def fewer_flops(config, B, whole_attention):
    """Of a training step: products with N - 1 rows less, each once forward and twice backward."""
    N, D = config.tokens, config.width
    proj_and_mlp = (N - 1) * (D * D + 2 * D * config.mlp)
    attention = 0 if whole_attention else (N - 1) * (D * D + 2 * N * D)
    return 3 * 2 * B * (proj_and_mlp + attention)


@pytest.mark.parametrize("penalised", [False, True])
def test_work_and_bytes_are_what_the_algebra_says(config, penalised):
    """Flash keeps 16 u a block with an MLP of ratio 4; 12 become the class token's alone, or 10 under a penalty,
    which has queries and heads of all."""
    config, B = replace(config, width=192, heads=3, mlp=768), 8
    ops = combined((flash(), decatt(3.0)) if penalised else (flash(),))
    whole, cut = account(config, ops, B), account(config, readout()(ops), B)
    assert whole.flops - cut.flops == fewer_flops(config, B, penalised)
    N, u = config.tokens, B * config.tokens * config.width * 4
    assert whole.kept_bytes - cut.kept_bytes == pytest.approx((10 if penalised else 12) * u * (N - 1) / N, rel=0.01)
    assert cut.parameters == whole.parameters


def test_dropout_acts_on_the_class_token(config, batch):
    """By draws of its own, and none at all in evaluation."""
    config, params = replace(config, dropout=0.5), vit.init(config, 0)
    plain, cut = (vit.forward(params, batch[0], config, ops).logits for ops in (EXACT, readout()(EXACT)))
    torch.testing.assert_close(cut, plain, rtol=1e-5, atol=1e-6)
    one, other = (vit.forward(params, batch[0], config, readout()(EXACT), rng.key(k)).logits for k in (1, 2))
    assert not torch.equal(one, other)


def test_a_compiler_makes_fewer_bodies_than_blocks(config, batch):
    """The last block is one of its own; with the numbers of eager."""
    config, ops = replace(config, depth=4), combined((readout(), flash()))
    loss = objective(config, ops, lambda images, key: images, torch.float64, torch.compiler.nested_compile_region)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    params = {n: p.double() for n, p in vit.init(config, 0, ops).items()}
    inputs = params, (batch[0].double(), batch[1]), rng.key(7)
    value, _, gradients = value_and_grad(torch.compile(loss, fullgraph=True, backend=backend))(*inputs)
    expected, _, exact = value_and_grad(objective(config, ops, lambda i, k: i, torch.float64))(*inputs)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(torch.allclose(gradients[n], exact[n], rtol=1e-9, atol=1e-12) for n in exact)
    calls = [node for node in graphs[0].graph.nodes if "invoke_subgraph" in str(node.target)]
    assert len({id(getattr(graphs[0], node.args[0].target)) for node in calls}) < config.depth
