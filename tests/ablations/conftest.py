"""Studies of a tiny model that the command trains."""

import pytest
from commands import call, hurry

from ablations.commands.main import main

TINY = [
    "--preset", "quick", "--device", "cpu", "--image", "8", "--width", "16", "--depth", "1", "--heads", "2",
    "--mlp", "32", "--epochs", "2", "--batch-size", "128", "--seeds", "1",
]  # fmt: skip


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(*options) -> exit status; the study is at command.out. Figures, which take seconds, are not drawn."""
    hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def trains(*options):
        return call(main, "--out", trains.out, *TINY, *options)

    trains.out = tmp_path / "study"
    return trains


@pytest.fixture
def refused(command, capsys):
    """refused(*options) -> the message of a refused command, which must have written nothing."""

    def message(*options):
        capsys.readouterr()
        assert command(*options) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert len(error.splitlines()) <= 2
        return error

    return message


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A study of three arms, to be read."""
    out = tmp_path_factory.mktemp("trained") / "study"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        assert call(main, "--out", out, *TINY, "--arms", "baseline,decatt+mrt,crs@0.5+flash") == 0
    return out
