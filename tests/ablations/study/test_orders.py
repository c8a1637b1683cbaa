"""What becomes of tasks that were sent."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from ordered import CELLS, Watch, order

from ablations.study import claims, machine, orders, running
from ablations.study.store import cell_folder
from core.errors import InputError


def ended(result):
    """A job that has ended so."""

    def tell():
        if isinstance(result, Exception):
            raise result
        return result

    return SimpleNamespace(done=lambda: True, result=tell)


def test_what_dies_before_it_begins_is_not_sent_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PAUSE", 0)
    sent, watch = [], Watch()

    def send(calls):
        sent.extend(calls)
        return [ended(RuntimeError("traceback\nNo module named 'ablations'")) for _ in calls]

    with pytest.raises(InputError, match=r"baseline seed 0: \d processes died .* No module named 'ablations'"):
        orders.run(CELLS[:1], order(tmp_path), send, watch)
    assert len(sent) == running.DEATHS + 2 == len(watch.notes) + 1
    with pytest.raises(InputError, match="open: .* processes died"):
        orders.one(send, order(tmp_path), "open")


def test_what_is_wrong_elsewhere_is_told_here(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PAUSE", 0)
    with pytest.raises(InputError, match="device 'cuda' is not available"):
        orders.run(CELLS, order(tmp_path), lambda calls: [ended("device 'cuda' is not available") for _ in calls],
                   Watch())  # fmt: skip


def test_a_cell_of_another_process_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PAUSE", 0.01)
    folder = cell_folder(tmp_path, *CELLS[0])
    sent, watch = [], Watch()

    def finish():
        with claims.claimed(folder):
            taken.set()
            time.sleep(0.3)
            folder.mkdir(parents=True)
            (folder / "failed.json").write_text(json.dumps({"arm": "baseline", "seed": 0, "error": "a test"}))

    taken, other = threading.Event(), threading.Thread(target=finish)
    other.start()
    taken.wait()
    assert orders.run(CELLS[:1], order(tmp_path), lambda calls: sent.extend(calls) or [], watch) == 1
    other.join()
    assert (sent, watch.outcomes) == ([], [{"arm": "baseline", "seed": 0, "error": "a test"}])


def test_a_failure_that_is_forgotten_elsewhere_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PAUSE", 0)
    looks = iter([False, False])
    monkeypatch.setattr(running, "settled", lambda folder: next(looks, True))
    assert orders.run(CELLS[:1], order(tmp_path), lambda calls: [ended(None) for _ in calls], Watch()) == 0


def test_a_process_takes_the_threads_of_its_order(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setitem(orders.TASKS, "ask", lambda study, *about: about[-1].append(torch.get_num_threads()))
    monkeypatch.setattr(machine, "deterministic", lambda: None)
    monkeypatch.setattr(running, "prepare", lambda *about: None)
    monkeypatch.setattr(running, "record", lambda *about: None)
    found = []
    assert orders.perform(order(tmp_path), "ask", found) is None
    torch.set_num_threads(threads)
    orders._study.cache_clear()
    assert found == [1]
