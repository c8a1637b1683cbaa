import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call

from core import vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.transforms.layerscale import layerscale


def test_equals_timm(config, batch):
    model = VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, init_values=0.1
    ).double()
    ops = layerscale(0.1)(EXACT)
    initial = vit.init(config, 0, ops)
    params = {n: p.double().requires_grad_() for n, p in initial.items()}
    theirs = {n.replace("layerscale.attn", "ls1.gamma").replace("layerscale.mlp", "ls2.gamma"): p
              for n, p in params.items()}  # fmt: skip
    started = dict(model.named_parameters())
    assert theirs.keys() == started.keys()
    assert all(torch.allclose(theirs[n], started[n]) for n in theirs if "gamma" in n)
    images = batch[0].double()
    ours, reference = vit.forward(params, images, config, ops).logits, functional_call(model, theirs, images)
    assert (ours - reference).abs().max() < 1e-10
    mine, wanted = (torch.autograd.grad(y.square().sum(), list(params.values())) for y in (ours, reference))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-11) for a, b in zip(mine, wanted, strict=True))


def test_parameters_and_bytes(config):
    """Two scales of the width a block; both branches are kept, for the gradients of these (2 u a block)."""
    plain, scaled = account(config, EXACT, 4), account(config, layerscale()(EXACT), 4)
    assert scaled.parameters - plain.parameters == config.depth * 2 * config.width
    assert scaled.flops == plain.flops
    u = 4 * config.tokens * config.width * 4
    assert scaled.kept_bytes - plain.kept_bytes == config.depth * 2 * u


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="layerscale initial inf must be finite"):
        layerscale(float("inf"))
