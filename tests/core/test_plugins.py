"""Optimizations and data sets from files and packages, and files that bring none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core import plugins
from core.data import sets
from core.errors import InputError
from core.transforms.registry import REGISTRY

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests/plugin/vit_ablations_stripes"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test registers is gone after it."""
    before = dict(REGISTRY)
    monkeypatch.setattr(plugins, "_from", {})
    monkeypatch.setattr(sets, "PLUGGED", {})
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def test_a_file_brings_an_optimization_and_another_a_data_set():
    assert plugins.load([str(PACKAGE / "activity.py"), str(PACKAGE / "stripes.py")]) == ["activity"]
    assert plugins.load([str(PACKAGE / "activity.py")]) == ["activity"]  # again
    assert REGISTRY["activity"].contract == "changes the objective"
    data = sets.load("plugin:stripes", image=8)
    assert data.train.images.shape == (128, 3, 8, 8)
    assert data.classes == ("horizontal", "vertical")
    with pytest.raises(InputError, match="did you mean 'plugin:stripes'"):
        sets.load("plugin:stripe")


def mine(arguments):
    """A file of an optimization that these make."""
    return f"from core.transforms.registry import Transform\nTRANSFORMS = {{'mine': Transform({arguments})}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", r"plugin: '.*mine.py' raises ZeroDivisionError: division by zero; mend it"),
        ("exit()", r"plugin: '.*mine.py' raises SystemExit: None; mend it"),
        ("class E(Exception): __str__ = None\nraise E", r"plugin: '.*mine.py' raises E: no message; mend it"),
        ("x = 1", r"plugin '.*mine.py' defines no dict TRANSFORMS .* and no dict DATA"),
        ("TRANSFORMS = {'mine': 3}", r"optimization 'mine' is a int, not a Transform\("),
        (
            mine("3, 'exact', ''"),
            "optimization 'mine' has no right build: Input should be callable",
        ),
        (mine("dict, 'exact', ''"), "what builds 'mine' is no function: ValueError: no signature"),
        (mine("lambda: 1, 'wonderful', ''"), "optimization 'mine' has no right contract: Input should be 'exact', "),
        (mine("lambda: 1, 'exact', '', levels=3"), "optimization 'mine' has no right levels: Input should be a valid"),
        (mine("lambda: 1, 'exact', '', control='x'"), "the control of 'mine', x, is not registered; write it before"),
        ("DATA = {'mine': 3}", r"data set 'mine' is a int, not a function"),
        (
            "from core.transforms.registry import REGISTRY\nTRANSFORMS = {'flash': REGISTRY['crs']}",
            "'flash' is taken by",
        ),
        (
            "from core.transforms.registry import REGISTRY\nTRANSFORMS = {'a+b': REGISTRY['crs']}",
            "'a\\+b' cannot be an arm's",
        ),
        ("from core.transforms.registry import REGISTRY\nTRANSFORMS = {'bf16': REGISTRY['crs']}", "'bf16' cannot be"),
    ],
)
def test_files_that_bring_nothing_right(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=message):
        plugins.load([str(tmp_path / "mine.py")])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("3", "raises TypeError"),
        ("(torch.zeros(4, 3, 8, 8), y), (x, y), 'ab'", r"images of torch.float32 \[4, 3, 8, 8\]"),
        ("(x, y + 2), (x, y), 'ab'", "labels of torch.int64"),
        ("(x.to('meta'), y), (x, y), 'ab'", "raises NotImplementedError"),
        ("(x, y), (x, y), 'aa'", "the classes a, a; it needs two or more, each once"),
        ("(x, y), (x, y), 'a'", "the classes a; it needs"),
        ("(x, y), (x, y), 'ab'", "has the same images to learn"),
        ("(x[:, :0], y), (x[:, :0], y), 'ab'", r"images of torch.uint8 \[4, 0, 8, 8\]"),
    ],
)
def test_data_of_another_form(tmp_path, returned, message):
    (tmp_path / "mine.py").write_text(
        "import torch\nx, y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)\n"
        f"DATA = {{'mine': lambda: ({returned})}}"
    )
    plugins.load([str(tmp_path / "mine.py")])
    with pytest.raises(InputError, match=f"data 'plugin:mine' .*{message}"):
        sets.load("plugin:mine")


def test_what_a_file_sets_for_all_is_set_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run.py", "--plugin", "mine.py"])
    (tmp_path / "mine.py").write_text(
        "import os, sys, torch\nos.chdir('/')\nsys.argv.clear()\ntorch.set_default_dtype(torch.float64)\n"
        "torch.set_grad_enabled(False)\ntorch.set_default_device('meta')\ntorch.use_deterministic_algorithms(True)\n"
        "torch.set_num_threads(torch.get_num_threads() + 1)\nsys.setrecursionlimit(100)\nprint('hello')\n"
        "sys.stdout = sys.stderr = None\nDATA = {'mine': lambda: os.chdir('/')}"
    )
    streams, depth, threads = (sys.stdout, sys.stderr), sys.getrecursionlimit(), torch.get_num_threads()
    plugins.load(["mine.py"])
    assert capsys.readouterr() == ("", "hello\n")
    with pytest.raises(InputError, match="data 'plugin:mine' raises TypeError"):
        sets.load("plugin:mine")
    assert ((sys.stdout, sys.stderr), sys.getrecursionlimit(), torch.get_num_threads()) == (streams, depth, threads)
    assert torch.zeros(0).device.type == "cpu"
    assert not torch.are_deterministic_algorithms_enabled()
    assert Path.cwd() == tmp_path
    assert sys.argv == ["run.py", "--plugin", "mine.py"]
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_a_file_that_closes_the_output_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.stdout.close()\nDATA = {'mine': lambda: None}")
    with pytest.raises(InputError, match="mine.py' closes the standard output; mend it"):
        plugins.load([str(tmp_path / "mine.py")])


def test_a_study_without_its_plugin_says_what_to_pass():
    assert plugins.missing(["crs", "flash"], ()) is None
    assert plugins.missing(["mine"], ["mine.py"]) == "optimization mine is not registered here; pass --plugin mine.py"


def laws(*arguments):
    command = [sys.executable, "-m", "pytest", "tests/laws.py", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_laws_of_a_file(tmp_path):
    result = laws("--plugin", str(PACKAGE / "activity.py"))
    assert result.returncode == 0, result.stdout
    assert 10 <= int(result.stdout.split(" passed")[0].split()[-1]) <= 15


def test_a_file_that_breaks_a_law_fails(tmp_path):
    text = (PACKAGE / "activity.py").read_text().replace('"changes the objective"', '"exact"')
    (tmp_path / "activity.py").write_text(text)
    result = laws("--plugin", str(tmp_path / "activity.py"), "-k", "contract")
    assert result.returncode == 1
    assert "FAILED tests/laws.py::test_contract[activity]" in result.stdout
