import torch

from ablations.benchmarks import data
from core import vit


def test_what_data_costs(monkeypatch):
    monkeypatch.setattr(data, "CONFIG", vit.VitConfig(32, 8, 16, 1, 2, 32, 10))
    figures = data.compare(4, 2, torch.device("cpu"), torch.float32)
    assert figures["ready"]["ratio"] == 1
    assert set(figures) == {
        "ready", "in memory, augmented", "streamed, augmented", "reading alone", "records of an epoch"
    }  # fmt: skip
    assert all(f["seconds"] > 0 for f in figures.values())
