"""Mixed-resolution tokens in a model: beside the uniform grid's, their gradients, one graph, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site, rewrite
from core.transforms.flash import flash
from core.transforms.mrt import centres, mrt, patches, pixel_blur, select, sincos, uniform


def tokens_of(ops, params, images, config):
    """Tokens [B,N,D] by these primitives."""
    outer = {n: p for n, p in params.items() if not n.startswith("blocks.")}
    return ops.tokenize(Site("", outer, config, ops, None, torch.float32, {}), images)


def test_all_patches_at_min_size_give_the_uniform_model():
    """Same tokens in the same order: the same logits, bit for bit; and raster order changes rounding alone."""
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5)
    params, images = vit.init(config, 0), rng.uniform(rng.key(1), (3, 3, 16, 16))
    mixed, whole = mrt(16, 4, 16)(EXACT), uniform(4)(EXACT)
    assert torch.equal(tokens_of(mixed, params, images, config), tokens_of(whole, params, images, config))
    raster = tokens_of(EXACT, params, images, config) - params["pos_embed"]
    cells = [(x, y) for y in range(4) for x in range(4)]
    order = sorted(range(16), key=lambda i: [(v >> bit & 1) for bit in (1, 0) for v in cells[i][::-1]])  # Morton
    positions = sincos(torch.tensor(cells) + 0.5, 16)
    wanted = torch.cat((raster[:, :1], raster[:, 1:] + positions), dim=1)
    in_raster = rewrite("raster", replace={"tokenize": lambda site, images: wanted})(EXACT)
    torch.testing.assert_close(
        tokens_of(mixed, params, images, config)[:, 1:], wanted[:, 1:][:, order], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        vit.forward(params, images, config, mixed).logits,
        vit.forward(params, images, config, in_raster).logits,
        rtol=1e-5,
        atol=1e-6,
    )


def test_gradients_reach_the_embedding_and_the_pixels_but_no_score():
    config = vit.VitConfig(16, 2, 16, 1, 2, 32, 5)
    params = {n: p.requires_grad_() for n, p in vit.init(config, 0).items()}
    images = rng.uniform(rng.key(1), (2, 3, 16, 16)).requires_grad_()
    tokens = tokens_of(mrt(16, 2, 8)(EXACT), params, images, config)
    gradient, pixels = torch.autograd.grad(tokens.square().sum(), [params["patch_embed.proj.weight"], images])
    assert gradient.abs().max() > 0
    # A pixel moves only the patch it lies in: the derivative is that of the gathered content, with fixed choices.
    selection = select(pixel_blur(images.detach(), 2, 8), 16, 2, 8, 16)
    fixed = F.linear(
        patches(images, selection, 2), params["patch_embed.proj.weight"].flatten(1), params["patch_embed.proj.bias"]
    ) + sincos(centres(selection, 2), 16)
    (wanted,) = torch.autograd.grad(fixed.square().sum(), images)
    torch.testing.assert_close(pixels, wanted)


def test_one_graph_without_host_syncs():
    """Fake tensors have no values: whatever asks for one fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = vit.VitConfig(64, 4, 32, 1, 2, 64, 5)
    params, images = vit.init(config, 0), rng.uniform(rng.key(1), (3, 3, 64, 64))
    ops = mrt(64, 4, 16)(flash()(EXACT))

    def logits(params, images):
        return vit.forward(params, images, config, ops).logits

    eager = logits(params, images)
    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, images), eager, rtol=1e-5, atol=1e-6)
    selection = torch.compile(select, fullgraph=True, backend="aot_eager")
    with FakeTensorMode() as mode:
        fake = {s: mode.from_tensor(torch.zeros(3, n)) for s, n in ((16, 16), (8, 64))}
        assert selection(fake, 64, 4, 16, 64).shape == (3, 64, 3)


@pytest.mark.gpu
def test_no_host_sync_on_cuda():
    images = rng.uniform(rng.key(1), (3, 3, 64, 64)).cuda()
    config = vit.VitConfig(64, 4, 32, 1, 2, 64, 5)
    params = {n: p.cuda() for n, p in vit.init(config, 0).items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens_of(mrt(64, 4, 16)(EXACT), params, images, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_images_and_models_are_refused():
    config = vit.VitConfig(16, 2, 16, 1, 2, 32, 5)
    params, ops = vit.init(config, 0), mrt(16, 2, 8)(EXACT)
    with pytest.raises(InputError, match=r"images of shape \(1, 3, 16, 20\) are not square"):
        tokens_of(ops, params, torch.zeros(1, 3, 16, 20), config)
    with pytest.raises(InputError, match="the batch of images is empty"):
        tokens_of(ops, params, torch.zeros(0, 3, 16, 16), config)
    with pytest.raises(InputError, match="mrt with min patch 2 needs a model of that patch, not 4"):
        tokens_of(ops, params, torch.zeros(1, 3, 16, 16), vit.VitConfig(16, 4, 16, 1, 2, 32, 5))
    with pytest.raises(InputError, match="tokens 17 cannot be had from image 16"):
        mrt(17, 2, 8, image=16)


def test_one_size_alone_is_the_uniform_grid_of_every_image():
    config = vit.VitConfig(16, 4, 16, 1, 2, 32, 5)
    params, images = vit.init(config, 0), rng.uniform(rng.key(1), (3, 3, 16, 16))
    tokens = tokens_of(mrt(16, 4, 4)(EXACT), params, images, config)
    assert torch.equal(tokens, tokens_of(uniform(4)(EXACT), params, images, config))
