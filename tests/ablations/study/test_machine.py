"""What the record says of the machine."""

import os

import pytest

from ablations.study import machine


@pytest.mark.parametrize(
    ("git", "revision"), [("printf '\\377'", "\ufffd"), ("exit 1", "unknown"), ("exec sleep 9", "unknown")]
)
def test_whatever_git_does_the_record_is_made(tmp_path, monkeypatch, git, revision):
    (tmp_path / "git").write_text(f"#!/bin/sh\n{git}")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "PATIENCE", 0.5)
    assert machine.environment("cpu")["revision"] == revision
