"""Against what the authors' reference implementation does, and against the greedy rule written as a loop."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from core import rng, vit
from core.layers import EXACT
from core.ops import Site
from core.transforms.mrt import (
    centres,
    legal_tokens,
    mrt,
    patches,
    pixel_blur,
    select,
    sincos,
)
from core.transforms.scorers import sizes

# An excerpt (seq = rows in the reference's order), and the whole file where the development data is at hand.
EXCERPT = np.load(Path(__file__).with_name("mrt_reference.npz"))
WHOLE = Path(__file__).parents[3] / "shared" / "oracles" / "mrt_public.npz"
REFERENCE = np.load(WHOLE) if WHOLE.exists() else EXCERPT
needs_images = pytest.mark.skipif(not WHOLE.exists(), reason="the reference's images are not in the repository")

NAME = re.compile(r"(i(\d+)_m(\d+)_M(\d+)_L(\d+))\.(\w+)\.seq")
CASES = [NAME.fullmatch(key) for key in REFERENCE.files if NAME.fullmatch(key)]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
blur_cases = pytest.mark.parametrize("case", [c for c in CASES if c[6] == "blur"], ids=lambda c: c[1])


def numbers(case):
    """image, min patch, max patch, tokens."""
    return tuple(int(case[i]) for i in range(2, 6))


def field(case, name):
    return REFERENCE[f"{case[1]}.{case[6]}.{name}"]


def scores_in(case):
    image, low, high, _ = numbers(case)
    return {s: torch.from_numpy(field(case, f"scores_{s}")) for s in sizes(image, low, high)[:-1]}


def images_of(side):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(REFERENCE[f"images{side}"]).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@cases
def test_selection_and_order_equal_the_reference(case):
    assert np.array_equal(select(scores_in(case), *numbers(case)).numpy(), field(case, "seq"))


@needs_images
@blur_cases
def test_pixel_blur_equals_the_reference(case):
    image, low, high, _ = numbers(case)
    ours = pixel_blur(images_of(image), low, high)
    for size, scores in scores_in(case).items():
        torch.testing.assert_close(ours[size], scores, rtol=1e-4, atol=1e-3 if size == 256 else 2e-5)


@needs_images
@blur_cases
def test_patches_and_centres_equal_the_reference(case):
    image, low, *_ = numbers(case)
    selection, wanted = torch.from_numpy(field(case, "seq")).long(), torch.from_numpy(field(case, "patches"))
    ours = patches(images_of(image)[: len(wanted)], selection[: len(wanted)], low)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(centres(selection, low), torch.from_numpy(field(case, "pos")))


@needs_images
def test_the_whole_tokenizer_equals_the_reference():
    config = vit.VitConfig(64, 4, 32, 1, 1, 4, 3)
    params = vit.init(config, 0) | {
        "patch_embed.proj.weight": torch.from_numpy(REFERENCE["tok.weight"]),
        "patch_embed.proj.bias": torch.from_numpy(REFERENCE["tok.bias"]),
        "cls_token": torch.from_numpy(REFERENCE["tok.cls"])[None, None],
    }
    wanted = torch.from_numpy(REFERENCE["tok.out"])
    ops = mrt(64, 4, 16)(EXACT)
    tokens = ops.tokenize(Site("", params, config, ops, None, torch.float32, {}), images_of(64)[: len(wanted)])
    torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-5)


def morton(x, y):
    return sum(((x >> b & 1) << 2 * b) | ((y >> b & 1) << 2 * b + 1) for b in range(12))


def greedy(scores, image, low, high, tokens):
    """The rule, one split at a time, for one image."""
    current = {(x, y, high) for y in range(0, image, high) for x in range(0, image, high)}
    while len(current) < tokens:
        _, _, x, y, s = min(
            (scores[s][y // s * (image // s) + x // s], (-s, morton(x // s, y // s)), x, y, s)
            for x, y, s in current
            if s > low
        )
        current.remove((x, y, s))
        current |= {(x + dx, y + dy, s // 2) for dx in (0, s // 2) for dy in (0, s // 2)}
    return sorted(current, key=lambda p: (-p[2], morton(p[0] // p[2], p[1] // p[2])))


@st.composite
def trees(draw):
    """Sizes with 1 to 4 splittable levels, roots in grids that need not be powers of two, and scores with ties."""
    depth, roots = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    low = draw(st.sampled_from([1, 2, 3]))
    high = low << depth
    image = roots * high
    tokens = draw(st.sampled_from(legal_tokens(image, low, high)))
    levels = draw(st.sampled_from([0, 2, 5, None]))  # distinct values of the scores: many ties, or nearly none
    noise = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = {}
    for size in sizes(image, low, high)[:-1]:
        values = noise.standard_normal((2, (image // size) ** 2)).astype(np.float32)
        scores[size] = torch.from_numpy(values if levels is None else np.round(values * levels) * 0.5)
    return scores, image, low, high, tokens


@settings(max_examples=150, deadline=None)
@given(trees())
def test_selection_equals_the_greedy_loop(tree):
    scores, *shape = tree
    selected = select(scores, *shape)
    for i in range(2):
        assert selected[i].tolist() == list(map(list, greedy({s: v[i].tolist() for s, v in scores.items()}, *shape)))


@settings(max_examples=50, deadline=None)
@given(trees())
def test_patches_tile_the_image_and_come_in_order(tree):
    scores, image, low, high, tokens = tree
    for rows in select(scores, image, low, high, tokens):
        assert rows.shape == (tokens, 3)
        cover = torch.zeros(image, image, dtype=torch.int64)
        for x, y, s in rows.tolist():
            cover[y : y + s, x : x + s] += 1
            assert x % s == y % s == 0
        assert (cover == 1).all()
        keys = [(-s, morton(x // s, y // s)) for x, y, s in rows.tolist()]
        assert keys == sorted(keys)


def test_deep_trees_order_without_overflow():
    """Eight splittable levels do not fit one int64 word of base n + 1."""
    image, low, high = 256, 1, 256
    noise = np.random.default_rng(0)
    scores = {
        s: torch.from_numpy(np.round(noise.standard_normal((1, (image // s) ** 2)) * 4).astype(np.float32))
        for s in sizes(image, low, high)[:-1]
    }
    rows = select(scores, image, low, high, 301)[0].tolist()
    assert rows == list(map(list, greedy({s: v[0].tolist() for s, v in scores.items()}, image, low, high, 301)))


def test_negative_zero_ties_with_zero():
    scores = {2: torch.tensor([[0.0, -0.0, 0.0, -0.0]])}
    assert select(scores, 4, 1, 2, 7).tolist() == select({2: torch.zeros(1, 4)}, 4, 1, 2, 7).tolist()


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_patches_equal_a_bilinear_resize(k):
    images = rng.uniform(rng.key(0), (2, 3, 32, 32))
    small = F.interpolate(images, scale_factor=1 / k, mode="bilinear", align_corners=False, antialias=False)
    p = 4
    rows = [(x, y, p * k) for y in range(0, 32, p * k) for x in range(0, 32, p * k)]
    ours = patches(images, torch.tensor(rows).expand(2, -1, -1), p)
    torch.testing.assert_close(ours, F.unfold(small, p, stride=p).transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [8, 10, 13, 192])
def test_sinusoids_by_their_formula(width):
    x, y = 2.5, 7.0
    ours = sincos(torch.tensor([[x, y]]), width)[0].tolist()
    half = width // 2
    count = half // 2
    frequencies = [np.exp(-i * np.log(10000) / (count - 1)) for i in range(count)]
    wanted = []
    for v in (x, y):
        part = [np.sin(v * f) for f in frequencies] + [np.cos(v * f) for f in frequencies]
        wanted += part + [0.0] * (half - len(part))
    assert ours == pytest.approx(wanted + [0.0] * (width - len(wanted)), abs=1e-6)


@pytest.mark.parametrize(
    ("image", "low", "high", "expected"),
    [
        (256, 16, 64, range(16, 257, 3)),
        (32, 2, 8, range(16, 257, 3)),
        (96, 16, 32, range(9, 37, 3)),
        (8, 8, 8, range(1, 2, 3)),
    ],
)
def test_legal_tokens(image, low, high, expected):
    assert legal_tokens(image, low, high) == expected
    assert (image // low) ** 2 in expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((256, 16, 60, 64), "max patch 60 does not divide image 256"),
        ((256, 16, 0, 64), "image 256, min patch 16 and max patch 0 must be at least 1"),
        ((240, 10, 60, 36), r"max patch 60 must be min patch 10 times a power of two: 10, 20, 40"),
        ((256, 64, 16, 64), "max patch 16 must be min patch 64 times a power of two"),
        ((256, 16, 64, 65), r"tokens 65 cannot be had .*; nearest: 64 or 67 \(16 to 256 in steps of 3\)"),
        ((256, 16, 64, 5), "nearest: 16 or 19"),
        ((256, 16, 64, 999), "nearest: 253 or 256"),
    ],
)
def test_illegal_sizes_and_counts_are_refused(arguments, message):
    image, low, high, tokens = arguments
    with pytest.raises(ValueError, match=message):
        select({32: torch.zeros(1, 64), 64: torch.zeros(1, 16)}, image, low, high, tokens)


def test_bad_scores_are_refused():
    good = {64: torch.zeros(2, 16), 32: torch.zeros(2, 64)}
    for change, message in (
        ({32: torch.full((2, 64), torch.nan)}, "128 of the 128 scores of size 32 are NaN or infinite"),
        (
            {64: good[64].index_fill(1, torch.tensor([3]), torch.inf)},
            "2 of the 32 scores of size 64 are NaN or infinite",
        ),
        ({32: torch.zeros(2, 63)}, r"scores of size 32 have shape \(2, 63\); image 256 needs \(2, 64\)"),
        ({64: torch.zeros(0, 16), 32: torch.zeros(0, 64)}, "the batch is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            select(good | change, 256, 16, 64, 64)
    with pytest.raises(ValueError, match="scores of size 32 are missing; needed: 64, 32"):
        select({64: good[64]}, 256, 16, 64, 64)


def test_public_functions_refuse_what_they_cannot_cut():
    for images, message in (
        (torch.zeros(0, 3, 16, 16), "empty"),
        (torch.zeros(1, 3, 16, 20), "not square"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "images are uint8; normalise"),
    ):
        for call in (lambda x: pixel_blur(x, 4, 8), lambda x: patches(x, torch.zeros(1, 1, 3).long(), 4)):
            with pytest.raises(ValueError, match=message):
                call(images)
    with pytest.raises(ValueError, match="max patch 12 must be min patch 4 times a power of two"):
        pixel_blur(torch.zeros(1, 3, 24, 24), 4, 12)


def test_a_single_level_needs_no_scores():
    assert select({}, 8, 4, 4, 4).tolist() == [[[0, 0, 4], [4, 0, 4], [0, 4, 4], [4, 4, 4]]]
