import pytest

from core.errors import InputError
from core.sizes import read_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("900MB", 900 * 10**6), ("1.5g", 1.5e9), (" 2 KiB ", 2048), ("3t", 3e12)],
)
def test_read_bytes(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "512", "512B", "GiB", "-3GB", "0", "0.5", "24 apples", "1e9", "9" * 400])
def test_read_bytes_refuses(text):
    with pytest.raises(InputError, match=f"budget '{text}' is no size"):
        read_bytes(text)
