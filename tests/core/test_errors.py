"""Messages of what cannot be used."""

import pytest

from core.errors import InputError, choose


@pytest.mark.parametrize("value", ["a\nb", "\x1b[31mred", "\udcff", "\x00", "x" * 100_000, "\u2028"])
def test_a_message_is_one_line_whatever_the_value(value):
    text = str(InputError(f"unknown '{value}'; write something else"))
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) < 1010
    assert text.startswith("unknown '")
    assert text.endswith("; write something else")


def test_the_closest_spelling_is_named():
    with pytest.raises(InputError, match="unknown engine 'eger'; legal: eager, compiled; did you mean 'eager'"):
        choose("engine", "eger", ["eager", "compiled"])
