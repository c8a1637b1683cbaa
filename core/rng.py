"""Keys and counter-based random draws: the same numbers eager, compiled, on CPU and on GPU.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in
int64 tensor operations, each word kept in its low 32 bits. A key is an int64 tensor [2] of such words; it is
data, never mutated. The fourth counter word keeps draws, folded keys and split keys apart.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from core.errors import InputError

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD, _LONG = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_DRAW, _FOLD, _SPLIT = 0, 1, 2
_FEW = 1 << 12  # counters for which calling operations costs more than their work
_SLAB = 1 << 17  # counters at a time: eager intermediates stay in cache, 8 times faster than one pass


def philox(key: Tensor, counter: Words) -> Words:
    """Philox4x32-10: four 32-bit words from a key [2] and four broadcastable counter words (int64)."""
    c0, c1, c2, c3 = counter
    rounds = torch.arange(10, device=key.device)
    first, second = (key[0] + rounds * 0x9E3779B9) & _WORD, (key[1] + rounds * 0xBB67AE85) & _WORD
    for k0, k1 in zip(first.unbind(), second.unbind(), strict=True):
        # The multipliers less 2^32, for c·M overflows int64 and C++ leaves undefined what that gives: the low word is
        # the same, the high word lacks c.
        p0, p1 = c0 * (0xD2511F53 - (1 << 32)), c2 * (0xCD9E8D57 - (1 << 32))
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2
        c0, c1, c2, c3 = (high1 ^ c1 ^ k0) & _WORD, p1, (high0 ^ c3 ^ k1) & _WORD, p0
    return c0, c1 & _WORD, c2, c3 & _WORD


def _block(key: Tensor, index: Tensor, domain: int) -> Tensor:
    """Four words [4,...] of each counter [...]. Few of them, where their values are at hand, in numpy: of so many
    operations on so little the time is that of calling them, a tenth of a small model's step. (Fake ones have none.)"""
    if not torch.compiler.is_compiling() and index.numel() <= _FEW and _at_hand(key) and _at_hand(index):
        if isinstance(index, FakeTensor):
            return index.new_empty((4, *index.shape))
        return torch.from_numpy(_few(np.array(key.tolist()), index.numpy(), domain))
    zero = torch.zeros((), dtype=torch.int64, device=key.device)
    return torch.stack(philox(key, (index & _WORD, (index >> 32) & _WORD, zero, zero + domain)))


def _at_hand(tensor: Tensor) -> bool:
    """Not of a GPU, nor torch.func's, nor of a trace, where they would become constants."""
    plain = type(tensor) in (Tensor, FakeTensor) and not is_functorch_wrapped_tensor(tensor)
    return plain and tensor.device.type == "cpu" and get_proxy_mode() is None


def _few(key: np.ndarray, index: np.ndarray, domain: int) -> np.ndarray:
    """The same without torch: unsigned, and both products of a round at once."""
    words, factors = np.empty((4, *index.shape), np.uint64), np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
    words[0], words[1], words[2], words[3] = index & _WORD, (index >> 32) & _WORD, 0, domain
    keys = (key + np.arange(10)[:, None] * np.array([0x9E3779B9, 0xBB67AE85]) & _WORD).astype(np.uint64)
    factors, keys = (array.reshape(*array.shape, *(1,) * index.ndim) for array in (factors, keys))
    even, odd = words[::2], words[1::2]
    for k in keys:
        products = even * factors
        even, odd = ((products >> 32)[::-1] ^ odd ^ k) & _WORD, products[::-1]
    words[::2], words[1::2] = even, odd & _WORD
    return words.astype(np.int64)


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """The key [2] of a seed: its low and high 32 bits. InputError for one of more bits, which would be another's."""
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} is outside 0 to 2^64 - 1")
    return torch.tensor([seed & _WORD, (seed >> 32) & _WORD], dtype=torch.int64, device=device)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key [2] from a key and an integer (a Python int or a 0-d int64 tensor)."""
    return _block(key, torch.as_tensor(data, dtype=torch.int64, device=key.device), _FOLD)[:2]


def split(key: Tensor, n: int) -> Tensor:
    """n independent keys [n, 2] from one."""
    return _block(key, torch.arange(n, device=key.device), _SPLIT)[:2].T.contiguous()


def named(key: Tensor, name: str) -> Tensor:
    """The key [2] of a name below a key: its words xor a 64-bit hash of the name, FNV-1a (Fowler, Noll and Vo) mixed by
    SplitMix64's last steps (Steele, Lea and Flood, OOPSLA 2014), without which what two names differ by could be what
    two others do ("process 0" and "process 4", "blocks.1" and "blocks.5"), and a key be another site's.

    A key is Philox's key, for which any two different ones give independent draws, so no rounds are spent here. Names
    commute, and the same one twice is none: below one another they must differ.
    """
    code = 0xCBF29CE484222325
    for character in name:
        code = (code ^ ord(character)) * 0x100000001B3 & _LONG
    code = (code ^ code >> 30) * 0xBF58476D1CE4E5B9 & _LONG
    code = (code ^ code >> 27) * 0x94D049BB133111EB & _LONG
    code ^= code >> 31
    return torch.stack((key[0] ^ (code & _WORD), key[1] ^ (code >> 32)))


def words(key: Tensor, n: int) -> Tensor:
    """n uniform 32-bit words, int64 [n]: word w of counter c is element w * ceil(n / 4) + c."""
    counters = -(-n // 4)
    slab = counters if torch.compiler.is_compiling() else _SLAB
    index = torch.arange(counters, device=key.device)
    parts = [_block(key, part, _DRAW) for part in index.split(max(slab, 1))]
    return torch.cat(parts, dim=1).flatten()[:n]


def uniform(key: Tensor, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Uniform float32 draws in [0, 1) with 24 random bits each."""
    draws = words(key if device is None else key.to(device), prod(shape))
    return ((draws >> 8).to(torch.float32) * 2.0**-24).reshape(tuple(shape))


def bernoulli(key: Tensor, shape: Sequence[int], probability: float) -> Tensor:
    """Boolean draws, true with the given probability rounded to 1/65536 (half a word each)."""
    n = prod(shape)
    draws = words(key, -(-n // 2))
    halves = torch.cat((draws & 0xFFFF, draws >> 16))[:n]
    return (halves < round(probability * 65536)).reshape(tuple(shape))


def permutation(key: Tensor, n: int) -> Tensor:
    """A random order of range(n), int64 [n]."""
    return torch.argsort(words(key, n), stable=True)
