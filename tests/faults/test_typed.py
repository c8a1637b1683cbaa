"""What is typed: arms, settings and options are refused in one message, or read."""

import os
import subprocess
import sys
from contextlib import suppress
from io import FileIO, TextIOWrapper

import pytest
from commands import call
from faults.hostile import WORDS, refusable, tries
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ablations import bench, evaluate, report
from ablations.commands import main as run
from ablations.commands import options as commands
from ablations.study import arms, speaking
from ablations.study.recipes import Recipe
from core import vit
from core.data import sets
from core.transforms.registry import REGISTRY

PARTS = st.one_of(st.sampled_from([*REGISTRY, "baseline", "bf16", "fp32", "published"]), WORDS)
ARMS = st.lists(st.tuples(PARTS, st.none() | WORDS), min_size=1, max_size=4).map(
    lambda parts: "+".join(name if value is None else f"{name}@{value}" for name, value in parts)
)


@given(ARMS)
@tries(400)
def test_an_arm_is_refused_or_has_one_name(tried, text):
    with refusable():
        arm = arms.parse(text)
        assert arms.parse(arm.name).name == arm.name
        arms.select(text)
    tried["names of arms"] += 1


@given(st.lists(st.tuples(st.sampled_from([*REGISTRY, "x", ""]), WORDS | st.sampled_from(["weight", "norm"]), WORDS)))
@tries(200)
def test_settings_are_refused_or_read(tried, parts):
    with refusable():
        for base, values in arms.read_settings([f"{a}.{b}={c}" for a, b, c in parts]).items():
            arms.parse(base, {base: values})
    tried["settings"] += 1


def settable():
    """Every setting of every optimization."""
    import inspect

    return [f"{name}.{p}" for name, t in REGISTRY.items() for p in inspect.signature(t.build).parameters]


@given(st.sampled_from(settable()), WORDS)
@tries(300)
def test_a_value_of_a_setting_is_refused_or_taken(tried, name, value):
    with refusable():
        base = name.partition(".")[0]
        parameters = arms.read_settings([f"{name}={value}"])
        arm = arms.parse(base if base != "crs" or "ratio" in name else "crs@0.5", parameters)
        arm.ops.config(vit.VitConfig(image=32, patch=4, width=8, depth=2, heads=2, mlp=16, classes=3))
    tried["values of settings"] += 1


NAMES = [*vars(Recipe()), "seeds", "first_seed", "arms", "until", "margin", "max_minutes"]
OPTIONS = [f"--{name.replace('_', '-')}" for name in NAMES]
DIGITS = sets.outline("digits")
CONSOLE = Console(file=open("/dev/null", "w"), markup=False)  # noqa: SIM115


@given(st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), min_size=1, max_size=3))
@tries(200)
def test_a_command_line_is_refused_or_read(tried, options):
    words = [word for pair in options for word in pair]
    with refusable(), suppress(SystemExit):  # tyro's refusals
        command = commands.read(["--preset", "quick", "--device", "cpu", *words], CONSOLE)
        recipe = command.recipe.resolve_machine().resolve_data(DIGITS)
        recipe.plain_config(arms.parse("baseline"), DIGITS)
        recipe.optimizer(10)
        commands.each(command)
    tried["command lines"] += 1


def full():
    """A stream to a full disk."""
    return TextIOWrapper(FileIO("/dev/full", "w"), write_through=True)


@pytest.mark.parametrize("command", [run, report, evaluate, bench])
def test_what_cannot_be_printed_is_told_or_seen_by_the_status(tried, monkeypatch, capsys, command):
    monkeypatch.setattr("sys.stdout", full())
    assert call(command.main, "--help") == 2
    assert capsys.readouterr().err == "error: the standard output cannot be written: No space left on device\n"
    monkeypatch.setattr("sys.stderr", full())
    assert call(command.main, "--help=") == 2
    monkeypatch.setattr("sys.stdout", None)  # closed
    assert call(command.main, "--help") == 0
    tried["streams"] += 3


def test_no_file_of_a_study_takes_the_number_of_a_closed_stream(tried, tmp_path):
    """Or what is said there, as of a signal, is written into it."""
    if not (child := os.fork()):
        for number in range(3):
            os.close(number)
        with speaking.one_message(), (tmp_path / "metrics.jsonl").open("w") as file:
            os._exit(file.fileno())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) > 2
    tried["streams"] += 1


@pytest.mark.parametrize(
    ("command", "words"),
    [(run, ["--out", ""]), (run, ["--data="]), (run, ["--list", "--set", ""]), (report, [""]), (bench, ["--arms="])],
)
def test_an_empty_value_is_refused(tried, monkeypatch, capsys, tmp_path, command, words):
    monkeypatch.chdir(tmp_path)
    assert call(command.main, *words) == 2
    assert " is empty; write one, or leave it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    tried["empty values"] += 1


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ("ulimit -v 3000000", "ulimit -v leaves 2.9 GiB, and a study needs 6; raise it"),
        ("mkdir gone; cd gone; rmdir ../gone", "the current folder is no longer there; change to another"),
        (
            "export TORCH_LOGS=nope",
            "torch cannot be loaded (ValueError: Invalid log settings: nope, must be a comma separated list of fully); "
            "mend that first",
        ),
    ],
)
def test_where_torch_cannot_be_loaded_is_one_message(tried, tmp_path, before, told):
    words = f"{before}; exec {sys.executable} -c 'import ablations'"
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False, **where)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {told}")
    tried["limits"] += 1


@pytest.mark.parametrize(("name", "left"), [("/bin/vit-ablations", 0), ("/mine/run.py", 1)])
def test_the_installed_command_ends_without_words_until_it_listens(name, left):
    """And a program of one's own, whatever its name, keeps what it does at SIGINT."""
    script = f"import sys, signal; sys.argv[0] = '{name}'; import ablations; print(int(signal.getsignal(2) != 0))"
    where = {"env": {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, **where)
    assert done.stdout == f"{left}\n"


@pytest.mark.parametrize("said", ["can't start new thread", "Resource temporarily unavailable"])
def test_no_thread_is_one_message(capsys, said):
    with pytest.raises(SystemExit, match="2"), speaking.one_message():
        raise RuntimeError(said)
    assert capsys.readouterr().err == (
        f"error: no thread can be started ({said}); allow this user more processes (ulimit -u)\n"
    )
    with pytest.raises(RuntimeError, match="a defect"), speaking.one_message():
        raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "there is no memory left"),
        (ModuleNotFoundError("No module named 'x'"), "No module named 'x'; install the package that has it"),
    ],
)
def test_what_is_not_there_is_one_message(capsys, error, told):
    with pytest.raises(SystemExit, match="2"), speaking.one_message():
        raise error
    assert capsys.readouterr().err == f"error: {told}\n"


@pytest.mark.parametrize(("command", "rest"), [(run, ["--preset", "quick", "--device", "cpu"]), (report, ["study"])])
def test_a_name_that_is_no_text_is_refused_before_it_is_made(tried, monkeypatch, capsys, tmp_path, command, rest):
    monkeypatch.chdir(tmp_path)
    assert call(command.main, *rest, "--out", "\udcff") == 2
    assert "error: '\\udcff' is no text in this locale; set LC_ALL=C.UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    tried["command lines"] += 1


def test_a_home_that_the_shell_left_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("sys.argv", ["run.py", "--out", "~/a", "--data-root=~/b", "--arms", "~x/~/y"])
    assert speaking.words() == ["--out", "/home/me/a", "--data-root=/home/me/b", "--arms", "~x/~/y"]


@pytest.mark.parametrize("columns", ["1", "0", "07"])
def test_help_on_a_terminal_too_narrow_for_a_word(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        speaking.asked(evaluate.Command, ["--help"])
    assert not end.value.code
    assert "--data-root" in capsys.readouterr().out
