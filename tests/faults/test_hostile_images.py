"""Images, damaged: named, or decoded."""

import warnings
from io import BytesIO

import numpy as np
from faults.hostile import refusable, tries
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.data import pictures


def encoded(kind):
    """A small picture in a format."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")}


@given(
    kind=st.sampled_from(sorted(PICTURES)),
    faults=st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 1 << 12),
)
@tries(300)
def test_a_damaged_image_is_named_or_decoded(tried, tmp_path_factory, kind, faults, cut):
    content = bytearray(PICTURES[kind])
    for at, value in faults:
        content[at % len(content)] = value
    file = tmp_path_factory.getbasetemp() / "damaged.png"
    file.write_bytes(bytes(content)[: None if cut is None else cut % len(content)])
    with refusable("damaged.png"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pictures._open(str(file)).mode == "RGB"
    tried["damaged images"] += 1
