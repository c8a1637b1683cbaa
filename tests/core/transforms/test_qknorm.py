import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call

from core import vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.transforms.flash import flash
from core.transforms.qknorm import qknorm


def test_equals_timm(config, batch):
    """timm's has shifts, here zero; fused or not."""
    model = VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, qk_norm=True
    ).double()
    ops = qknorm(1.7)(EXACT)
    params = {n: p.double().requires_grad_() for n, p in vit.init(config, 0, ops).items()}
    theirs = {n.replace("qknorm.q", "q_norm.weight").replace("qknorm.k", "k_norm.weight"): p for n, p in params.items()}
    shifts = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n not in theirs}
    assert len(shifts) == 4
    images = batch[0].double()
    reference = functional_call(model, theirs | shifts, images)
    wanted = torch.autograd.grad(reference.square().sum(), list(params.values()))
    for arm in (ops, flash()(ops)):
        ours = vit.forward(params, images, config, arm).logits
        assert (ours - reference).abs().max() < 1e-10
        for mine, theirs_ in zip(torch.autograd.grad(ours.square().sum(), list(params.values())), wanted, strict=True):
            assert torch.allclose(mine, theirs_, rtol=1e-8, atol=1e-11)


def test_parameters_and_work(config):
    """Two scales of the head's width a block, shared by its heads; no product more."""
    plain, normed = account(config, EXACT, 4), account(config, qknorm()(EXACT), 4)
    assert normed.parameters - plain.parameters == config.depth * 2 * config.width // config.heads
    assert normed.flops == plain.flops
    assert normed.kept_bytes > plain.kept_bytes


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="qknorm scale nan must be finite"):
        qknorm(float("nan"))
