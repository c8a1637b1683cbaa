import numpy as np
import pytest
import torch
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx

from core import rng

ONES = 0xFFFFFFFF
# Known answers of Random123 (Salmon et al., kat_vectors, philox4x32 10 rounds): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = rng.philox(torch.tensor(key), tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_words_against_python_integers():
    """The int64 tensor arithmetic against unbounded integers, on many counters."""

    def reference(key, counter):
        c, (k0, k1) = list(counter), key
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k0, p1 & ONES, (p0 >> 32) ^ c[3] ^ k1, p0 & ONES]
            k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
        return c

    key = (0xDEADBEEF, 0x12345678)
    drawn = rng.words(torch.tensor(key), 40).reshape(4, 10).T.tolist()
    assert drawn == [reference(key, (i, 0, 0, 0)) for i in range(10)]


def test_the_same_numbers_whatever_computes_them(monkeypatch):
    """In tensors (for many counters, or on a GPU), numpy, and Python's integers."""
    root = torch.tensor([0xDEADBEEF, 0x92345678])
    expected = [rng.words(root, 40), rng.fold_in(root, (1 << 40) + 3), rng.split(root, 2), rng.split(root, 7)]
    monkeypatch.setattr(rng, "_FEW", -1)
    found = [rng.words(root, 40), rng.fold_in(root, (1 << 40) + 3), rng.split(root, 2), rng.split(root, 7)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
        assert other.is_contiguous()


def test_a_traced_graph_draws_by_its_key():
    """Few draws too, whose values numpy could take: they would be the same for every key."""

    def draw(key):
        return torch.cat((rng.uniform(key, (5,)), rng.fold_in(rng.split(rng.named(key, "x"), 2)[1], key[0]).float()))

    traced = make_fx(draw)(rng.key(1))
    for seed in (1, 2):
        assert torch.equal(traced(rng.key(seed)), draw(rng.key(seed)))


def test_slabs_do_not_change_the_draws(monkeypatch):
    whole = rng.words(rng.key(3), 4000)
    monkeypatch.setattr(rng, "_SLAB", 7)
    # Slabs cut the counters; every word keeps its place.
    assert torch.equal(rng.words(rng.key(3), 4000), whole)


def test_uniform_is_uniform():
    draws = rng.uniform(rng.key(0), (200, 500))
    assert draws.dtype == torch.float32
    assert draws.shape == (200, 500)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3


def test_keys_give_unrelated_draws():
    root = rng.key(5)
    keys = [root, rng.fold_in(root, 0), rng.fold_in(root, 1), rng.fold_in(root, 1 << 40), *rng.split(root, 3)]
    draws = np.stack([rng.uniform(key, (20000,)).numpy() for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / np.sqrt(20000)


# Known answers of 64-bit FNV-1a, from the test suite of its authors (Fowler, Noll and Vo).
NAMES = {
    "": 0xCBF29CE484222325,
    "a": 0xAF63DC4C8601EC8C,
    "foobar": 0x85944171F73967E8,
    "chongo was here!\n": 0x46810940EFF5F915,
}


def mixed(state):
    """SplitMix64's output for a state."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_fnv_1a_hash_mixed(name):
    first = [mixed((1234567 + i * 0x9E3779B97F4A7C15) % 2**64) for i in (1, 2)]
    assert first == [6457827717110365317, 3203168211198807973]  # of seed 1234567, as published
    low, high = mixed(NAMES[name]) & ONES, mixed(NAMES[name]) >> 32
    assert rng.named(rng.key(0), name).tolist() == [low, high]
    assert rng.named(torch.tensor([0x12345678, 0x9ABCDEF0]), name).tolist() == [low ^ 0x12345678, high ^ 0x9ABCDEF0]


def test_no_two_sites_share_a_key():
    """Of any process, block and purpose, also where all names end in a number (hashes by FNV-1a alone collide)."""

    def codes(*names):
        return np.array([rng.named(rng.key(0), name).numpy() for name in names])

    processes = codes(*(f"process {i}" for i in range(32)))[:, None, None]
    blocks = codes(*(f"blocks.{i}" for i in range(64)))[:, None]
    purposes = codes(*(f"{s} noise{i}" for s in ("attn", "mlp", "attn.qkv") for i in range(8)))
    keys = (processes ^ blocks ^ purposes).reshape(-1, 2)
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_purposes_and_names_draw_independently():
    """Also names that differ in a character, and a block's and a purpose's hash one upon the other."""
    roots = [rng.named(rng.key(5), f"blocks.{i}") for i in (0, 1, 10)]
    names = ("attn dropout", "attn crs", "attn.qkv crs", "mlp dropout", "mlp.fc1 crs", "mlp.fc2 crs")
    draws = np.stack([rng.uniform(rng.named(root, name), (20000,)).numpy() for root in roots for name in names])
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(20000)


def test_seeds_beyond_32_bits_are_told_apart():
    assert rng.key(1).tolist() == [1, 0]
    assert rng.key((7 << 32) + 1).tolist() == [1, 7]


def test_fold_in_takes_a_tensor_or_an_integer():
    assert torch.equal(rng.fold_in(rng.key(2), 9), rng.fold_in(rng.key(2), torch.tensor(9)))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9, 1.0])
def test_bernoulli_rate(probability):
    drawn = rng.bernoulli(rng.key(1), (100, 999), probability)
    assert drawn.shape == (100, 999)
    spread = 4 * (probability * (1 - probability) / drawn.numel()) ** 0.5
    assert abs(drawn.double().mean().item() - probability) <= spread + 1 / 65536


@pytest.mark.parametrize("n", [1, 2, 1437])
def test_permutation_is_one(n):
    order = rng.permutation(rng.key(4), n)
    assert sorted(order.tolist()) == list(range(n))


def test_permutations_are_all_reached():
    orders = {tuple(rng.permutation(key, 3).tolist()) for key in rng.split(rng.key(0), 60)}
    assert len(orders) == 6


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_empty_and_scalar_shapes(shape):
    assert rng.uniform(rng.key(0), shape).shape == shape


def test_compiled_code_gives_the_known_answers():
    """The real compiler, on scalars and vectors: C++ leaves the overflow of signed integers undefined."""

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled(key, *counter):
        return rng.philox(key, counter)

    for counter, key, expected in KNOWN:
        for shape in ((), (19,)):
            words = compiled(torch.tensor(key), *(torch.full(shape, c) for c in counter))
            assert all(torch.equal(w, torch.full(shape, e)) for w, e in zip(words, expected, strict=True))
    fold = torch.compile(rng.fold_in, fullgraph=True, dynamic=False)
    assert torch.equal(fold(rng.key(8), torch.tensor(5)), rng.fold_in(rng.key(8), 5))
