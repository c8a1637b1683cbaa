import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call

from core import vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.transforms.registers import registers


def test_equals_timm(config, batch):
    """timm's registers come second, with positions; order means nothing to attention, and a position is a summand."""
    ops = registers(3)(EXACT)
    model = VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, reg_tokens=3
    ).double()
    params = {n: p.double().requires_grad_() for n, p in vit.init(config, 0, ops).items()}
    own = params["registers"]
    first, rest = params["pos_embed"][:, :1], params["pos_embed"][:, 1:]
    theirs = {n: p for n, p in params.items() if n != "registers"} | {
        "reg_token": own - 1,
        "pos_embed": torch.cat((first, torch.ones_like(own), rest), 1),
    }
    images = batch[0].double()
    ours, reference = vit.forward(params, images, config, ops).logits, functional_call(model, theirs, images)
    assert (ours - reference).abs().max() < 1e-10
    mine, wanted = (torch.autograd.grad(y.square().sum(), own)[0] for y in (ours, reference))
    assert torch.allclose(mine, wanted, rtol=1e-9, atol=1e-12)


def test_parameters_and_work(config):
    """n·D parameters more; n rows more in every map, and in both factors of attention."""
    n, B, D, M = 3, 4, config.width, config.mlp
    plain, more = account(config, EXACT, B), account(config, registers(n)(EXACT), B)
    assert more.parameters - plain.parameters == n * D
    N = config.tokens
    block = 2 * n * (4 * D * D + 2 * D * M) + 4 * D * ((N + n) ** 2 - N**2)
    assert more.flops - plain.flops == 3 * B * config.depth * block


def test_a_negative_count_is_refused():
    with pytest.raises(InputError, match="registers count -1 is too small: at least 0"):
        registers(-1)
