"""One pair of processes (this file, run twice) trains every arm under ddp and fsdp; the tests look at what they saw."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend fake)

from ablations.study.arms import parse
from core import model, rng, vit
from core.account.step import account, normalised
from core.data.augment import preparation
from core.data.splits import Split
from core.engine import build, loop
from core.foreign import sources
from core.layers import EXACT
from core.measure import peak_bytes, tensor_bytes
from core.model import shapes
from core.optimizers import AdamW, Averaged, Clipped
from core.parallel import ALONE, Share, at_use, shard, spread, whole
from core.step import make_step, objective, start, value_and_grad
from core.targets import Targets
from core.transforms.registry import REGISTRY

CPU = torch.device("cpu")
CONFIG = vit.VitConfig(
    image=16, patch=4, width=16, depth=3, heads=2, mlp=32, classes=5
)  # odd sizes: 5 classes, 17 x 16
LARGER = vit.VitConfig(image=16, patch=4, width=64, depth=3, heads=2, mlp=128, classes=5)
MRT = {"mrt": {"tokens": 16, "min_patch": 2, "max_patch": 8}}
ADAMW = AdamW(3e-3, 0.05, decay_all=False)
AVERAGED, TARGETS = Averaged(Clipped(ADAMW, 0.5), 0.9, warmup=True), Targets(0.4, 0.1)
ROOM = {"rtol": 1e-8, "atol": 1e-9}  # Adam divides rounding errors of gradients that are zero by its epsilon
KINDS = {"ddp": False, "fsdp": True}
SIZE, STEPS = 8, 10


def built(transform):
    """A registered transform, at its first level if it has some."""
    first = next(iter(transform.build.__annotations__))
    return transform.build(**{first: transform.levels[0]} if transform.levels else {})


LATTICE = [
    "+".join(filter(None, parts)) or "baseline"
    for parts in product(("", "crs@0.3", "crs@0.5"), ("", "decatt"), ("", "flash"), ("", "mrt"))
]
OTHERS = [name for name in REGISTRY if name not in ("crs", "decatt", "flash", "mrt")]
ARMS = {name: parse(name, MRT).ops for name in LATTICE} | {name: built(REGISTRY[name])(EXACT) for name in OTHERS}
CASES = [(name, kind) for name in LATTICE for kind in KINDS]
WHOLE = [name for name in OTHERS if name == "int8" or any(p.optimizer for p in ARMS[name].parts)]  # refused by fsdp
CASES += [(name, "ddp" if name in WHOLE else "fsdp") for name in OTHERS]


def split():
    images = (rng.uniform(rng.key(1), (SIZE * STEPS, 3, 16, 16)) * 256).to(torch.uint8)
    return Split(images, torch.arange(SIZE * STEPS) % 5)


def prepared(share):
    prepare = preparation((0.5,) * 3, (0.3,) * 3, flip=True, shift=1, rotate=5.0, share=share, crop=0.3)
    return lambda images, key: prepare(images, key).double()


class Others(nn.Module):
    """A module of others, whose blocks are named like ours and differ."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(768, 7), nn.Linear(7, 5)])

    def forward(self, images):
        return self.blocks[1](self.blocks[0](images.flatten(1)).relu())


def others():
    return sources.watched("others", lambda seed: torch.manual_seed(seed) and Others(), 16, 3, 5, "cpu")


def begun(ops, share=ALONE, config=CONFIG):
    params = {n: p.double() for n, p in model.init(config, 0, ops).items()}
    return start(shard(params, share), AVERAGED, rng.key(3), ops)


def train(ops, share, config=CONFIG, engine="eager"):
    """Ten steps of an arm: its losses, correct predictions, whole parameters and their averages."""
    config = model.asked(config, ops)
    optimizer = replace(AVERAGED, inner=replace(AVERAGED.inner, norm=share.norm))
    step = build(config, ops, prepared(share), torch.float64, optimizer, engine, share=share, targets=TARGETS)
    order = rng.permutation(rng.key(4), SIZE * STEPS)
    state, metrics = loop(engine, step, split(), SIZE, CPU, share).epoch(begun(ops, share, config), order)
    return metrics.loss, metrics.correct, *(whole(p, model.shapes(config, ops), share) for p in trees(state))


def trees(state):
    return state.params, state.optimizer.average


@cache
def alone(name):
    """The same by one process: the whole batch in one piece, or share by share where the arm draws or looks at rows."""
    return train(ARMS[name], ALONE) if name in LATTICE and "crs" not in name else simulated(ARMS[name], 2)


def simulated(ops, count):
    """The same by one process that goes through the shares one after the other: the mean of their losses."""
    config = ops.config(CONFIG)
    shares = [Share(i, count) for i in range(count)]
    losses = [objective(config, ops, prepared(s), torch.float64, own=s.key, targets=TARGETS) for s in shares]

    def loss(params, batch, key):
        parts = zip(losses, *(t.chunk(count) for t in batch), strict=True)
        values = [one(params, (images, labels), key) for one, images, labels in parts]
        means, aux = (torch.stack(column) for column in zip(*values, strict=True))
        return means.mean(), torch.cat((aux[:, :2].mean(0), aux[:, 2:].sum(0)))

    step = make_step(loss, AVERAGED, ops)
    order = rng.permutation(rng.key(4), SIZE * STEPS)
    state, metrics = loop("eager", step, split(), SIZE, CPU).epoch(begun(ops, config=config), order)
    return metrics.loss, metrics.correct, *trees(state)


def compare(found, expected, **room):
    for mine, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, other, **ROOM | room)
    for mine, other in zip(found[2:], expected[2:], strict=True):
        assert mine.keys() == other.keys()
        for name, p in other.items():
            torch.testing.assert_close(mine[name], p, **ROOM | room)


class Worker:
    """What one of the processes does, of these what it is asked for; a method's results go by its name."""

    def __init__(self, index, names):
        self.names = names
        self.shares = {kind: Share(index, 2, sharded, dist.group.WORLD.group_name) for kind, sharded in KINDS.items()}

    def arms(self):
        return {(name, kind): train(ARMS[name], self.shares[kind]) for name, kind in CASES if name in self.names}

    def others(self):
        return {kind: train(EXACT, share, others()) for kind, share in self.shares.items()}

    def compiled(self):
        return {kind: train(EXACT, share, engine="compiled") for kind, share in self.shares.items()}

    def bytes(self):
        """By kind: of a state, kept between forward and backward pass, and the peak of a step.

        The backend fake computes nothing. A thread of gloo's lets go of what it was given at some time after it has
        told that all is done, which counts as the step's: more, or less, the busier the machine.
        """
        out, fake = {}, dist.new_group(backend="fake").group_name
        for kind, share in self.shares.items():
            share = share._replace(group=fake)
            layout = shapes(LARGER)
            loss = spread(objective(LARGER, EXACT, normalised, region=at_use(layout, share)), layout, share)
            step = make_step(loss, ADAMW)
            state = start(shard(vit.init(LARGER, 0), share), ADAMW, rng.key(0))
            batch = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
            step(state, batch)
            out[kind] = (
                tensor_bytes(tuple(state)),
                held_bytes(loss, state, batch),
                peak_bytes(step, state, batch, device=CPU),
            )
        return out


def held_bytes(loss, state, batch):
    """What a forward pass leaves in memory."""
    leaves = {n: p.detach().requires_grad_() for n, p in state.params.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = loss(leaves, batch, state.key)
    assert kept[0].requires_grad
    return sum(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")


def work(index, folder, methods, names):
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=index, world_size=2, timeout=timedelta(seconds=60))
    worker = Worker(index, names)
    torch.save({name: getattr(worker, name)() for name in methods.split(",")}, folder / f"{index}.pt")
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        train(EXACT, worker.shares["ddp"])
    except RuntimeError as error:
        torch.save((time.monotonic() - begin, str(error)), folder / "alone.pt")
    os._exit(0)  # gloo's threads, whose other end is gone, abort a usual exit now and then


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    """What each of the two processes saw of the arms that are asked for, and what the first one did after the second
    was killed."""
    cases = [item for item in request.session.items if item.originalname == "test_ten_steps_equal_one_process"]
    names = {case.callspec.params["name"] for case in cases if not case.get_closest_marker("skip")}
    return pair(tmp_path_factory.mktemp("processes"), "arms,others,bytes", *names)


def pair(folder, methods, *names):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [[sys.executable, __file__, str(i), str(folder), methods, *names] for i in (0, 1)]
    pair = [subprocess.Popen(each, env=environment, stderr=subprocess.PIPE) for each in words]
    ends = [process.communicate(timeout=300)[1].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, -signal.SIGKILL], ends
    return [*(torch.load(folder / f"{i}.pt") for i in (0, 1)), torch.load(folder / "alone.pt")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ten_steps_equal_one_process(seen, name, kind):
    """An arm that draws in the model, or looks at all rows at once, does so with the rows of a process and its key: it
    equals the mean over such shares. Every other equals the whole batch in one piece."""
    found, other = (one["arms"][name, kind] for one in seen[:2])
    compare(found, alone(name))
    compare(found, other)


def test_a_module_of_others_equals_one_process(seen):
    expected = train(EXACT, ALONE, others())
    for kind in KINDS:
        for one in seen[:2]:
            compare(one["others"][kind], expected)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("compiled"), "compiled")


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_step_equals_one_process(compiled, kind):
    found, other = (one["compiled"][kind] for one in compiled[:2])
    compare(found, train(EXACT, ALONE), rtol=1e-4, atol=1e-4)  # images are augmented in float32
    compare(found, other)


def test_processes_draw_rows_of_their_own():
    ops, (images, labels) = ARMS["crs@0.3"], split()
    batch = (images[:4], labels[:4])
    gradients = [
        value_and_grad(objective(CONFIG, ops, prepared(ALONE), torch.float64, own=Share(i, 2).key))(
            begun(ops).params, batch, rng.key(7)
        )[2]["blocks.0.mlp.fc1.weight"]
        for i in (0, 1)
    ]
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_processs_memory_is_what_the_account_predicts(seen, kind):
    predicted = account(LARGER, EXACT, 4, optimizer=ADAMW, share=Share(0, 2, KINDS[kind]))
    alone = account(LARGER, EXACT, 4, optimizer=ADAMW)
    for one in seen[:2]:
        state, kept, peak = one["bytes"][kind]
        assert state == predicted.state_bytes
        assert kept == pytest.approx(predicted.kept_bytes, rel=1e-3)
        assert peak == pytest.approx(predicted.peak_bytes, rel=1e-3)
    assert predicted.kept_bytes == pytest.approx(alone.kept_bytes, rel=1e-3)  # no whole parameter among them
    assert predicted.kept_by_block == pytest.approx(alone.kept_by_block, rel=1e-3)
    assert predicted.state_bytes / alone.state_bytes == pytest.approx(0.5 if kind == "fsdp" else 1, rel=0.01)


def test_the_others_end_when_one_dies(seen):
    seconds, message = seen[2]
    assert seconds < 60
    assert "closed by peer" in message.lower() or "reset" in message.lower(), message


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
