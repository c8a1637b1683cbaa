"""What a process has of a step, told without other processes: shares, collectives, and what is refused."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from core import vit
from core.account.step import inputs, normalised
from core.engine import build
from core.errors import InputError
from core.layers import EXACT
from core.ops import rewrite
from core.optimizers import AdamW
from core.parallel import Share, at_use, check, divided, shard
from core.transforms.int8 import int8

CONFIG = vit.VitConfig(image=16, patch=4, width=16, depth=3, heads=2, mlp=32, classes=5)


@pytest.mark.parametrize(("kind", "expected"), [("ddp", (0, 0, 5)), ("fsdp", (8, 4, 1))])
def test_parameters_are_gathered_once_a_pass(kind, expected):
    """One collective for a block, and one for what is outside: again in the backward pass, and one for the gradients;
    a weight that is read twice is not gathered twice."""
    ops = rewrite("twice", wrap={"mlp": lambda inner, site, x: inner(site, x) + inner(site, x)})(EXACT)
    share = Share(0, 2, kind == "fsdp")
    with FakeTensorMode(), Count() as count:
        state, batch = inputs(CONFIG, ops, 4, share=share)
        build(CONFIG, ops, normalised, torch.float32, AdamW(), "eager", share=share)(state, batch)
    collectives = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    assert tuple(count.calls[name] for name in collectives) == expected


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_torch_func_in_the_forward_pass_is_refused():
    share = Share(0, 2, True)
    with FakeTensorMode():
        ops = int8()(EXACT)
        state, batch = inputs(CONFIG, ops, 4, share=share)
        step = build(CONFIG, ops, normalised, torch.float32, AdamW(), "eager", share=share)
        with pytest.raises(InputError, match="uses torch.func in its forward pass.*pass --engine compiled, or"):
            step(state, batch)


def test_shards_are_equal_and_filled_with_zeros():
    params = {"bias": torch.arange(1.0, 6), "token": torch.ones(1, 1, 2)}
    shards = [shard(params, Share(i, 3, True)) for i in range(3)]
    assert [one["bias"].tolist() for one in shards] == [[1, 2], [3, 4], [5, 0]]
    assert [one["token"].tolist() for one in shards] == [[1], [1], [0]]
    assert shard(params, Share(1, 3)) is params


def test_a_global_batch_is_the_same_images_whatever_the_processes():
    order = torch.randperm(26)
    parts = [Share(i, 4).rows(order, 8).view(3, 2) for i in range(4)]
    assert torch.equal(torch.cat(parts, dim=1).flatten(), order[:24])


def test_bad_input():
    assert divided(32, 4) == 8
    with pytest.raises(InputError, match="batch size 32 is not divisible by 3 processes; pass --batch-size 30 or 33"):
        divided(32, 3)
    with pytest.raises(InputError, match="batch size 2 is not divisible by 3 processes; pass --batch-size 3$"):
        divided(2, 3)
    matrices = rewrite("matrices", optimizer=lambda inner: inner)(EXACT)
    with pytest.raises(InputError, match="matrices changes the optimizer, which fsdp .*pass --parallel ddp"):
        check(matrices, Share(0, 2, True))
    check(matrices, Share(0, 2))
    with pytest.raises(InputError, match="other blocks have"):
        at_use({"blocks.0.scale": (3,), "blocks.1.scale": (4,)}, Share(0, 2, True))
