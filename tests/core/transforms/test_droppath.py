import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer

from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site, rewrite
from core.transforms.droppath import droppath

CONFIG = vit.VitConfig(image=16, patch=4, width=16, depth=4, heads=2, mlp=32, classes=5)


def branches(rate, key, images=6, config=CONFIG):
    """What becomes of branches of ones: their scale by block, branch ("attention", "mlp") and image."""
    ones = rewrite(
        "ones",
        replace={
            "attention": lambda site, x: (torch.ones_like(x), {**site.carry, "penalty": x.new_zeros(())}),
            "mlp": lambda site, x: torch.ones_like(x),
        },
    )
    ops, carry, out = droppath(rate)(ones(EXACT)), {}, []
    for block in range(config.depth):
        keys = None if key is None else rng.named(rng.key(key), f"blocks.{block}")
        site = Site("", {"norm1.bias": torch.zeros(1)}, config, ops, keys, torch.float64, carry)
        x = torch.zeros(images, 3, 2, dtype=torch.float64)
        first, carry = ops.attention(site, x)
        both = torch.stack((first, ops.mlp(site, x)))
        assert (both == both[:, :, :1, :1]).all(), "one draw an image and branch"
        out.append(both[..., 0, 0])
    return torch.stack(out)


def test_rates_are_timms():
    """Linear in depth; what is kept is divided by its probability, as DropPath does."""
    rates = [b.drop_path1.drop_prob if isinstance(b.drop_path1, DropPath) else 0.0
             for b in VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2,
                                        drop_path_rate=0.6).blocks]  # fmt: skip
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6])
    scales = branches(0.6, key=1, images=4000)
    for block, rate in zip(scales, rates, strict=True):
        for branch in block:
            share = (branch == 0).double().mean().item()
            assert share == pytest.approx(rate, abs=4 * (0.25 / 4000) ** 0.5)
            assert branch.max().item() == pytest.approx(DropPath(rate)(torch.ones(5000, 1)).max().item(), rel=1e-6)
    assert not torch.equal(scales[3, 0], scales[3, 1])
    assert not torch.equal(scales, branches(0.6, key=2, images=4000))


def test_evaluation_drops_nothing():
    assert (branches(0.9, key=None) == 1).all()


def test_a_model_without_its_dropped_branches(batch):
    """The logits are those of a model that leaves the same branches out, image by image."""
    params = {n: p.double() for n, p in vit.init(CONFIG, 0).items()}
    images, key = batch[0].double(), rng.key(5)
    scales = branches(0.8, key=5)
    ours = vit.forward(params, images, CONFIG, droppath(0.8)(EXACT), key).logits
    for i in range(len(images)):

        def attention(inner, site, x, i=i):
            branch, carry = inner(site, x)
            return branch * scales[site.block, 0, i], carry

        def mlp(inner, site, x, i=i):
            return inner(site, x) * scales[site.block, 1, i]

        by_hand = rewrite("hand", wrap={"attention": attention, "mlp": mlp}, positional=True)(EXACT)
        torch.testing.assert_close(vit.forward(params, images[i : i + 1], CONFIG, by_hand).logits[0], ours[i])


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_bad_rates_are_refused(rate):
    with pytest.raises(InputError, match=r"droppath rate .* is outside \[0, 1\)"):
        droppath(rate)
