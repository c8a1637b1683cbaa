"""What the record says of the machine."""

import os
import shutil
import subprocess
from pathlib import Path

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


def test_the_revision_is_of_this_code_not_of_what_it_lies_within(tmp_path, monkeypatch):
    def git(*words):
        author = "-c", "user.name=a", "-c", "user.email=a"
        subprocess.run(["git", "-C", tmp_path, *author, *words], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "a thesis")
    inside = tmp_path / "libraries" / "ablations" / "study" / "machine.py"
    inside.parent.mkdir(parents=True)
    shutil.copy(machine.__file__, inside)
    monkeypatch.setattr(machine, "__file__", str(inside))
    assert machine.environment("cpu")["revision"] == "unknown"
    (tmp_path / ".git").rename(Path(inside).parents[2] / ".git")
    assert len(machine.environment("cpu")["revision"].removesuffix("-dirty")) == 12
