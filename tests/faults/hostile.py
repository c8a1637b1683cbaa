"""What hypothesis feeds to whatever comes from outside, and what may come of it: one message (InputError), or a value
that is right."""

from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from core.errors import InputError

NASTY = [
    "", " ", "0", "-1", "1e999", "nan", "inf", "-inf", "0x10", "1_0", "1e3", "2" * 30, str(2**64), "9" * 5000, "None",
    "True", "[]", "{}", "(" * 5000, "__import__('os').abort()", "[bold]", "[/]", "../..", "/", "a\nb", "ä", "\udcff",
    "%s", "{0}", "-", "--", "+", "@", "=", ".", ",",
]  # fmt: skip
WORDS = st.one_of(st.sampled_from(NASTY), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@contextmanager
def refusable(*names):
    """Lets a refusal pass that is one message, of one line, with one of these in it."""
    try:
        yield
    except InputError as error:
        text = str(error)
        if len(text.splitlines()) > 1 or len(text) > 1010 or not any(name in text for name in names or ("",)):
            raise AssertionError(f"not one message: {error}") from error


def tries(count):
    """A property of so many examples."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=quiet)
