"""Snapshots: what comes back is what went in, or is told to be damaged; they cost no more than their share."""

import errno
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from ablations.study import schema, snapshots
from ablations.study.course import Course
from ablations.study.evaluation import Evaluation
from ablations.study.snapshots import Snapshots
from core import rng, vit
from core.optimizers import AdamW, Averaged
from core.step import Metrics, start

OF = {"arm": "flash", "seed": 0, "settings": "s", "code": "c", "data": "d", "weights": None}


@pytest.fixture
def kept(tmp_path):
    told = []
    made = Snapshots(tmp_path / "seed0", OF, told.append)
    made.told = told
    return made


def save(kept, *steps):
    for step in steps:
        kept.save(step, lambda step=step: ({"step": torch.tensor(step)}, {"step": step}))
    return sorted(kept.folder.iterdir())


def test_the_last_two_are_kept_and_the_last_is_read(kept, tmp_path):
    assert kept.load() is None
    assert [path.name[:9] for path in save(kept, 1, 20, 300)] == ["000000020", "000000300"]
    tensors, about = kept.load()
    assert (tensors["step"].item(), about["step"]) == (300, 300)
    assert snapshots.reached(tmp_path / "seed0") == 300
    (kept.folder / ".torn.safetensors.1.partial").touch()
    (mine := kept.folder / "mine.txt").touch()
    kept.remove()
    assert [*kept.folder.iterdir()] == [mine]
    mine.unlink()
    kept.remove()
    assert not kept.folder.exists()


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1], lambda d: d[:9], lambda d: d[:40] + b"x" + d[41:]])
def test_a_torn_one_is_told_and_the_one_before_it_is_read(kept, damage):
    last = save(kept, 1, 2)[-1]
    last.write_bytes(damage(last.read_bytes()))
    assert kept.load()[1] == {"step": 1}
    assert len(kept.told) == 1
    assert last.name in kept.told[0]
    assert not last.exists()


@pytest.mark.parametrize("key", OF)
def test_one_of_another_cell_is_told_and_set_aside(kept, key):
    """As if its folder had been renamed, or the study gone on with other code."""
    first, last = save(kept, 1, 2)
    other = Snapshots(kept.folder.with_name("seed0"), OF | {key: "another"}, kept.told.append)
    assert other.load() is None
    assert f"({key} {OF[key]} -> another): set aside in {first.parent.with_suffix('.set-aside')}" in kept.told[0]
    assert {path.name for path in kept.folder.with_name("seed0.set-aside").iterdir()} == {
        first.name,
        last.name,
    }
    save(other, 3)
    assert other.load()[1] == {"step": 3}


@pytest.mark.parametrize("there", [lambda path: path.write_text("mine"), lambda path: path.symlink_to("nowhere")])
def test_what_is_in_the_way_of_those_set_aside_stays(kept, there):
    (path,) = save(kept, 1)
    there(aside := kept.folder.with_suffix(".set-aside"))
    was = aside.lstat()
    assert Snapshots(kept.folder.with_name("seed0"), OF | {"seed": 1}, kept.told.append).load() is None
    assert "set aside in" in kept.told[0]
    assert aside.lstat() == was
    assert [found.name for found in aside.with_name("seed0.set-aside-2").iterdir()] == [path.name]


def test_a_folder_in_the_place_of_one_is_told_and_stays(kept):
    save(kept, 1)
    (mine := kept.folder / "000000002-0.safetensors" / "mine").mkdir(parents=True)
    assert kept.load()[1] == {"step": 1}
    assert "no regular file" in kept.told[0]
    assert mine.is_dir()


def test_one_that_may_be_whole_is_not_taken_for_damaged(kept, tmp_path, monkeypatch):
    """The system may give it another time."""
    (path,) = save(kept, 1)
    for name, refused in (("read_bytes", kept.load), ("iterdir", lambda: snapshots.reached(tmp_path / "seed0"))):
        with monkeypatch.context() as patched:
            patched.setattr(type(path), name, Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
            with pytest.raises((schema.Unread, OSError), match="Too many open files"):
                refused()
    assert not kept.told
    assert kept.load()[1] == {"step": 1}


def test_what_a_link_leads_to_is_not_ours(kept, tmp_path):
    (other := tmp_path / "other").mkdir()
    (theirs := other / "000000009-x.safetensors").write_text("theirs")
    kept.folder.symlink_to(other)
    assert kept.load() is None
    assert snapshots.reached(tmp_path / "seed0") == 0
    save(kept, 1)
    assert [path.name for path in other.iterdir()] == [theirs.name]


def test_every_flipped_bit_is_seen(kept):
    (path,) = save(kept, 1)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        assert kept.load() is None
    path.write_bytes(data)
    assert kept.load() is not None


def test_they_wait_until_they_cost_their_share(kept, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: clock[0])
    kept.begin(size=0)
    clock[0] = snapshots.EVERY - 1
    assert not kept.due()
    clock[0] = snapshots.EVERY
    assert kept.due()

    def slow():
        clock[0] += 3  # seconds
        return {}, {}

    kept.save(1, slow)
    clock[0] += 299
    assert not kept.due()
    clock[0] += 1
    assert kept.due()


def test_a_course_comes_back_bit_for_bit(config, kept):
    """After an epoch and a half, into the course before the first step."""
    state = start(vit.init(config, 0), Averaged(AdamW(), 0.9), rng.key(7))
    course = Course(state, state.params)
    losses = [torch.tensor([2.5, 1 / 3]), torch.tensor([0.1, 0.7])]
    metrics = [Metrics(x, x.double(), x * 0, torch.tensor([3, 4]), x) for x in losses]
    later = state._replace(step=state.step + 2, params={n: p + 1 for n, p in state.params.items()})
    course.advance(later, metrics[0], [0.5, 0.25])
    course.evaluate(Evaluation(torch.tensor([True, False, True]), 1.5), 8, 2**20)
    assert all(torch.equal(p, later.optimizer.average[name]) for name, p in course.best.items())
    course.advance(later._replace(step=later.step + 2), metrics[1], [0.125, 0.1])
    kept.save(course.steps, course.pack)
    before = Course(state, state.params)
    found = before.restored(*kept.load(partial(before.check, steps=2)))
    assert found.pack()[1] == course.pack()[1]
    mine, theirs = course.pack()[0], found.pack()[0]
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])
    assert found.state.step == 4


FORGED = {
    "best_accuracy: Field required": lambda tensors, about: about.pop("best_accuracy"),
    "loss: Input should be a valid number": lambda tensors, about: about.update(loss="x"),
    "times: Field required": lambda tensors, about: about.pop("times"),
    "history.0.val/loss: Field required": lambda tensors, about: about["history"][0].pop("val/loss"),
    "its accuracies are": lambda tensors, about: about.update(best_accuracy=0.9),
    "its epochs are": lambda tensors, about: about.update(times=[1.0, 2.0]),
    "its steps are": lambda tensors, about: tensors.update({"state.step": torch.tensor(9)}),
    "'intervals'": lambda tensors, about: tensors.pop("intervals"),
    "its seconds are": lambda tensors, about: tensors.update(intervals=tensors["intervals"] * float("nan")),
    "its metrics are not": lambda tensors, about: tensors.pop("metrics.penalty"),
    "its metrics are": lambda tensors, about: tensors.update({"metrics.loss": torch.zeros(5)}),
    "'state.key'": lambda tensors, about: tensors.pop("state.key"),
    "its best.cls_token is not of this model": lambda tensors, about: tensors.update(
        {"best.cls_token": torch.zeros(3)}
    ),
    "'correct'": lambda tensors, about: tensors.pop("correct"),
}


@pytest.mark.parametrize("told", FORGED)
def test_what_no_course_wrote_is_damaged(config, kept, told):
    """Its checksum is right: it was written so."""
    state = start(vit.init(config, 0), AdamW(), rng.key(7))
    course, ones = Course(state, state.params), torch.ones(2)
    for step in (2, 4):
        course.advance(state._replace(step=state.step + step), Metrics(ones, ones, ones, ones, ones), [0.5, 0.25])
        if step == 2:
            course.evaluate(Evaluation(torch.tensor([True, False]), 1.5), 8, 2**20)
    before = Course(state, state.params)
    tensors, about = course.pack()
    before.check(tensors, about, steps=2)
    FORGED[told](tensors, about)
    kept.save(course.steps, lambda: (tensors, about))
    assert kept.load(partial(before.check, steps=2)) is None
    assert len(kept.told) == 1
    assert "is damaged (" in kept.told[0]
    assert told in kept.told[0]


def test_the_first_loss_that_is_not_finite_is_named(config):
    state = start(vit.init(config, 0), AdamW(), rng.key(0))
    course = Course(state, state.params)
    good = torch.tensor([3.0, 2.0])
    course.advance(state, Metrics(good, good, good, good, good), [0.1, 0.1])
    bad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3 \(epoch 1\); the last finite one was 2$"):
        course.advance(state, Metrics(bad, bad, bad, bad, bad), [0.1, 0.1])


def test_what_a_process_was_stopped_for_is_no_training_time(config):
    """Eight seconds within a step of hundredths; steps that are long by themselves are as the clock says."""
    state = start(vit.init(config, 0), AdamW(), rng.key(0))
    stopped = Course(state, state.params, intervals=[0.01, 0.02, 8.0, 0.02, 0.01])
    assert stopped.seconds == [0.01, 0.02, 0.02, 0.02, 0.01]
    for slow in ([2.0, 3.0, 9.0, 2.0], [0.001] * 9 + [0.9]):
        assert Course(state, state.params, intervals=slow).seconds == slow


def test_training_time_grows_whatever_counts_as_a_stop_later(config):
    """Half of the first epoch's steps wait for a cold disk: beside those of the second they would be stops."""
    state, good = start(vit.init(config, 0), AdamW(), rng.key(0)), torch.ones(20)
    course = Course(state, state.params)
    for seconds in ([1.5, 0.05] * 10, [0.05] * 20):
        course.advance(state, Metrics(good, good, good, good, good), seconds)
        course.evaluate(Evaluation(torch.tensor([True]), 1.0), 32, 0)
    assert [row["seconds"] for row in course.history] == pytest.approx([15.5, 16.5])
