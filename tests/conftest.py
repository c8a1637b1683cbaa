"""Shared fixtures: a tiny model, a batch, and small folders of images written for the test."""

import gc
import os
from collections import Counter

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes of several threads each would stand in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from long import LONG
from PIL import Image

from core import plugins, rng, vit
from core.errors import InputError
from core.step import Batch


def pytest_addoption(parser):
    parser.addoption("--faults", choices=("short", "long"), default="short", help="how many faults tests/faults tries")
    parser.addoption("--long", action="store_true", help="also what takes long (tests/long.py)")
    parser.addoption("--plugin", action="append", default=[], metavar="FILE", help="put this file through the laws")


def pytest_configure(config):
    try:
        plugins.load(config.getoption("--plugin"))
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long") and config.getoption("--faults") == "short":
        for item in items if len(items) > 300 else ():  # asked for by name, it runs
            if LONG.search(item.nodeid):
                item.add_marker(pytest.mark.skip(reason="takes long: pytest --long"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What is there before the first test stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


_TRIED: Counter[str] = Counter()  # faults tried and survived, by what was damaged


@pytest.fixture(scope="session")
def tried():
    """A counter: of each kind of fault how many were tried and survived."""
    return _TRIED


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(_TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Another process of pytest-xdist has ended."""
    _TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter):
    if _TRIED:
        each = ", ".join(f"{count:,} {what}" for what, count in _TRIED.items())
        terminalreporter.line(f"{sum(_TRIED.values()):,} faults tried and survived: {each}")


@pytest.fixture
def config() -> vit.VitConfig:
    return vit.VitConfig(image=16, patch=4, width=16, depth=2, heads=2, mlp=32, classes=5)


@pytest.fixture
def batch() -> Batch:
    images = rng.uniform(rng.key(11), (6, 3, 16, 16)) * 2 - 1
    return images, torch.arange(6) % 5


@pytest.fixture
def image_folder(tmp_path):
    """Two easily told classes (dark and bright), 8x8 PNGs: 24 + 8 images."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name, base in (("bright", 200), ("dark", 30)):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = (base + noise.integers(-20, 20, (8, 8, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{i}.png")
    return tmp_path / "images"
