import torch
from rich.console import Console

from ablations.benchmarks import contest


def test_ratios_are_of_the_same_round(monkeypatch):
    """A machine that slows down slows both: the ratio stays."""
    seconds = {"a": [1.0, 2.0, 10.0], "b": [2.0, 4.0, 20.0]}
    monkeypatch.setattr(contest, "interleaved", lambda runs, rounds, device: seconds)
    figures = contest.contest({}, 3, torch.device("cpu"), "a")
    assert figures["b"] == {"seconds": 4.0, "lower_quartile": 3.0, "upper_quartile": 12.0, "ratio": 0.5}


def test_a_table_shows_errors_and_what_not_all_have(capsys):
    figures = {"a": {"idle": 0.25}, "b": {"idle": None}, "c": {"error": "no room"}}
    columns = {"idle": contest.optional("idle", ".0%"), "tokens": contest.optional("tokens", "")}
    contest.show(figures, "t", columns, Console(width=80))
    out = capsys.readouterr().out
    assert "tokens" not in out
    assert "25%" in out
    assert "no room" in out
