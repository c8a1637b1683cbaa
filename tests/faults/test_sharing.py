"""Two processes on one folder share its cells: none is run twice or lost, also when one is killed."""

import re
import subprocess
import sys
import time
from collections import Counter

from faults.processes import OPTIONS, ROOT, content, environment

DONE = re.compile(r"\] (\S+ seed \d): val")
SEEDS = ["--seeds", "2"]


def test_two_at_once(start, reference, many, tried, draw, tmp_path):
    for i in range(many(1, 20)):
        out = tmp_path / str(i)
        runs = [start(out) for _ in range(2)]
        time.sleep(draw.uniform(0, 0.3))
        assert [run.wait() for run in runs] == [0, 0]
        cells = Counter(name for run in runs for name in DONE.findall(run.text))
        assert set(cells.values()) == {1}
        assert len(cells) == 3
        assert content(out) == reference()[0]
        tried["pairs"] += 1


def test_two_at_once_and_one_is_killed(start, reference, many, tried, draw, tmp_path):
    expected, seconds = reference()
    for i in range(many(1, 30)):
        out = tmp_path / str(i)
        runs = [start(out) for _ in range(2)]
        time.sleep(draw.uniform(0, seconds))
        runs[0].kill()
        assert runs[1].wait() == 0
        assert content(out) == expected
        tried["pairs with a kill"] += 1


def test_jobs(reference, tried, tmp_path):
    """Processes that a process starts: the same values as one."""
    out = tmp_path / "study"
    command = [sys.executable, str(ROOT / "tests/faults/study.py"), *OPTIONS, "--jobs", "2", "--out", str(out)]
    threads = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment() | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(out) == reference()[0]
    assert len(DONE.findall(done.stdout)) == 3
    assert "a worker ended" not in done.stdout
    tried["jobs"] += 1
