import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call
from torchvision.models import vit_b_16

from core import layers, rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.model import parameters, shapes
from core.ops import Site
from core.weights import checkpoints
from core.weights.names import rename

SHAPES = {
    "published": {"image": 32, "patch": 4, "width": 48, "depth": 3, "heads": 3, "mlp": 128, "classes": 10},
    "one head, odd grid": {"image": 21, "patch": 7, "width": 20, "depth": 1, "heads": 1, "mlp": 33, "classes": 2},
    "grey": {"image": 16, "patch": 8, "width": 24, "depth": 2, "heads": 4, "mlp": 48, "classes": 3, "channels": 1},
}


def double(params):
    return {n: p.double() for n, p in params.items()}


def gradients(loss, params):
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def assert_close(a, b, tolerance):
    for name in b:
        scale = b[name].abs().max().clamp_min(1e-3)
        assert (a[name] - b[name]).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_timm(shape):
    config = vit.VitConfig(**shape)
    model = VisionTransformer(
        img_size=config.image, patch_size=config.patch, in_chans=config.channels, num_classes=config.classes,
        embed_dim=config.width, depth=config.depth, num_heads=config.heads, mlp_ratio=config.mlp / config.width,
    ).double()  # fmt: skip
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shapes(config)
    params = {n: p.requires_grad_() for n, p in double(vit.init(config, 1)).items()}
    images = rng.uniform(rng.key(2), (4, config.channels, config.image, config.image)).double() * 4 - 2
    labels = torch.arange(4) % config.classes

    ours = vit.forward(params, images, config).logits
    theirs = functional_call(model, params, images)
    assert (ours - theirs).abs().max() < 1e-10
    assert_close(
        gradients(F.cross_entropy(ours, labels), params), gradients(F.cross_entropy(theirs, labels), params), 1e-10
    )


def test_equals_torchvision_vit_b_16():
    """ViT-B/16 itself, 86.6 M parameters at 224 pixels, weights converted."""
    torch.manual_seed(0)
    model = vit_b_16(num_classes=10).double().eval()
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero
    config = vit.VitConfig(224, 16, 768, 12, 12, 3072, 10)
    params = {n: p.clone().requires_grad_() for n, p in checkpoints.check(rename(model.state_dict()), config).items()}
    images = rng.uniform(rng.key(2), (1, 3, 224, 224)).double() * 4 - 2
    labels = torch.tensor([3])

    ours, theirs = vit.forward(params, images, config).logits, model(images)
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-10
    got = gradients(F.cross_entropy(ours, labels), params)
    F.cross_entropy(theirs, labels).backward()
    wanted = checkpoints.check(rename({n: p.grad for n, p in model.named_parameters()}), config)
    assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize(
    ("width", "heads", "classes", "expected"),
    [(384, 6, 10, 11_965_642), (384, 6, 100, 11_983_012), (192, 3, 10, 4_197_994), (192, 3, 100, 4_206_724)],
)
def test_published_parameter_counts(width, heads, classes, expected):
    config = vit.VitConfig(32, 4, width, 12, heads, 512, classes, dropout=0.1, patch_norm=True, head="mlp")
    assert parameters(config) == expected
    assert sum(p.numel() for p in vit.init(config, 0).values()) == expected


def test_init_depends_on_seed_and_name_only(config):
    first, again, other = vit.init(config, 0), vit.init(config, 0), vit.init(config, 1)
    deeper = vit.init(vit.VitConfig(16, 4, 16, 3, 2, 32, 5), 0)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(first[n], deeper[n]) for n in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["blocks.0.attn.proj.weight"], first["blocks.1.attn.proj.weight"])


def test_init_is_glorot_uniform():
    weight = vit.init(vit.VitConfig(16, 4, 64, 1, 2, 256, 5), 0)["blocks.0.mlp.fc1.weight"]
    bound = (6 / (64 + 256)) ** 0.5
    assert weight.abs().max() <= bound
    assert abs(weight.std().item() / (bound / 3**0.5) - 1) < 0.02


def test_dropout_draws_from_the_key_and_only_with_one(batch):
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5, dropout=0.5, head="mlp")
    params = vit.init(config, 0)
    evaluated = vit.forward(params, batch[0], config).logits
    trained = [vit.forward(params, batch[0], config, key=rng.key(k)).logits for k in (0, 0, 1)]
    assert torch.equal(evaluated, vit.forward(params, batch[0], config).logits)
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], evaluated)


def test_dropout_keeps_the_mean():
    x = torch.ones(400, 500)
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5, dropout=0.1)
    dropped = layers.dropout(Site("mlp", {}, config, EXACT, rng.key(0), x.dtype, {}), x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.9, rel=1e-4)]
    assert dropped.mean().item() == pytest.approx(1, abs=4 * (0.1 / 0.9 / x.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, r"patch 5 does not divide image 16; legal: 1, 2, 4, 8, 16"),
        ({"heads": 3}, r"heads 3 do not divide width 16; legal: 1, 2, 4, 8, 16"),
        ({"depth": 0}, r"depth 0 is outside 1 to 1,024"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside"),
        ({"head": "liner"}, r"unknown head 'liner'; legal: linear, mlp; did you mean 'linear'"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    shape = {"image": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2, "mlp": 32, "classes": 5}
    with pytest.raises(InputError, match=message):
        vit.VitConfig(**(shape | change))
