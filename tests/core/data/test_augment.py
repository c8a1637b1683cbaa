import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from core import rng
from core.data.augment import TRIES, affine, boxes, preparation, resized
from core.errors import InputError
from core.parallel import Share

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def images():
    return (rng.uniform(rng.key(0), (5, 3, 12, 12)) * 256).to(torch.uint8)


def parameters(n, mirror=1.0, angle=0.0, x=0.0, y=0.0):
    return [torch.full((n,), float(value)) for value in (mirror, angle, x, y)]


def test_without_a_key_only_normalised(images):
    prepared = preparation(MEAN, STD, True, 2, 15.0)(images, None)
    torch.testing.assert_close(prepared, TF.normalize(images / 255, MEAN, STD))


def test_nothing_asked_nothing_done(images):
    assert torch.equal(preparation(MEAN, STD)(images, rng.key(0)), preparation(MEAN, STD)(images, None))


def test_mirror_equals_torchvision(images):
    pixels = images / 255
    torch.testing.assert_close(affine(pixels, *parameters(5, mirror=-1)), TF.horizontal_flip(pixels))


@pytest.mark.parametrize(("x", "y"), [(2, 0), (0, -3), (-1, 4)])
def test_shift_equals_a_crop_of_the_padded_image(images, x, y):
    pixels = images / 255
    cropped = TF.crop(TF.pad(pixels, [4, 4, 4, 4]), 4 - y, 4 - x, 12, 12)
    torch.testing.assert_close(affine(pixels, *parameters(5, x=x, y=y)), cropped, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [-15.0, 7.0, 90.0])
def test_rotation_equals_torchvision(images, degrees):
    pixels = images / 255
    rotated = TF.rotate(pixels, degrees, InterpolationMode.BILINEAR)
    ours = affine(pixels, *parameters(5, angle=torch.deg2rad(torch.tensor(degrees))))
    inner = slice(2, -2)  # torchvision fades the border by an interpolated mask
    torch.testing.assert_close(ours[..., inner, inner], rotated[..., inner, inner], rtol=0, atol=1e-4)


def test_mirror_then_rotate_then_shift(images):
    pixels = images / 255
    step = affine(affine(pixels, *parameters(5, mirror=-1)), *parameters(5, angle=torch.pi / 2))
    step = affine(step, *parameters(5, x=2, y=1))
    at_once = affine(pixels, *parameters(5, mirror=-1, angle=torch.pi / 2, x=2, y=1))
    torch.testing.assert_close(at_once, step, rtol=0, atol=1e-4)


def test_draws_depend_on_the_key_alone(images):
    prepare = preparation(MEAN, STD, True, 2, 15.0)
    first, again, other = (prepare(images, rng.key(k)) for k in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_shift_is_as_likely():
    """A single bright pixel lands on each of the 5 x 5 places equally often."""
    images = torch.zeros(5000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    places = preparation((0.0,), (1.0,), shift=2)(images, rng.key(3)).mean(0)[0]
    assert places.sum().item() == pytest.approx(1, abs=1e-4)
    window = places[2:7, 2:7]
    assert (window - 1 / 25).abs().max() < 5 * (1 / 25 / 5000) ** 0.5


def test_a_resized_box_equals_torchvision(images):
    pixels, draws = images.double() / 255, rng.uniform(rng.key(5), (2 * TRIES + 2, 5))
    place, size = boxes(draws, 12, 0.08)
    for one, ours, (left, top), (width, height) in zip(
        pixels, resized(pixels, place, size), place.T.int().tolist(), size.T.int().tolist(), strict=True
    ):
        theirs = TF.resized_crop(one, top, left, height, width, [12, 12], InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("least", [0.08, 0.9])  # of the second many fit at no try
def test_boxes_are_distributed_as_torchvisions(least):
    """Each of left, top, width, height and area, by the test of Kolmogorov and Smirnov."""
    image = torch.zeros(1, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [least, 1], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = torch.cat(boxes(rng.uniform(rng.key(6), (2 * TRIES + 2, 20_000)), 32, least))[[1, 0, 3, 2]]
    for mine, other in zip([*ours, ours[2] * ours[3]], [*theirs.T, theirs[:, 2] * theirs[:, 3]], strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-4
    everything = (ours[2:] == 32).all(0).float().mean()
    assert (everything > 0.05) == (least == 0.9)


def test_boxes_are_an_images_own_whoever_has_it(images):
    """And mirror, angle and shift are drawn as without them."""
    at_once = preparation(MEAN, STD, True, 2, 15.0, crop=0.3)(images[:4], rng.key(9))
    parts = [preparation(MEAN, STD, True, 2, 15.0, Share(i, 2), 0.3)(images[2 * i :][:2], rng.key(9)) for i in (0, 1)]
    torch.testing.assert_close(torch.cat(parts), at_once, rtol=0, atol=1e-6)
    whole = images[:4] // 200 * 255  # of one grey value a channel, a box is like the whole
    whole = whole.amax((2, 3), keepdim=True).expand_as(whole)
    plain, cropped = (preparation(MEAN, STD, True, 2, 15.0, crop=c)(whole, rng.key(9)) for c in (None, 0.3))
    torch.testing.assert_close(plain, cropped, rtol=0, atol=1e-5)


def test_half_are_mirrored():
    images = torch.zeros(4000, 1, 8, 8, dtype=torch.uint8)
    images[..., 0] = 255
    left = preparation((0.0,), (1.0,), flip=True)(images, rng.key(4))[:, 0, 0, 0] > 0.5
    assert abs(left.float().mean().item() - 0.5) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": -1}, "shift -1"),
        ({"rotate": 200.0}, "rotate 200.0"),
        ({"crop": 1.1}, "crop 1.1"),
        ({"crop": 0.0}, "crop 0.0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        preparation(MEAN, STD, **options)
