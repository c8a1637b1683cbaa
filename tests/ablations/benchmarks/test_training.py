import pytest
import torch

from ablations.benchmarks import ours, peers, training
from core import vit
from core.data.splits import Split
from core.errors import InputError
from core.layers import EXACT
from core.measure import tensor_bytes
from core.model import parameters

CPU = torch.device("cpu")
CONFIG = vit.VitConfig(8, 4, 16, 1, 2, 32, 10)


def compare(names, steps=2):
    build = training.contenders(CONFIG, 4, steps, "fp32", CPU, names, ["baseline", "flash"], ["eager"])
    return training.compare(build, CONFIG, 4 * steps, 2, torch.float32, CPU)


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_peers_have_the_same_shapes(name):
    model = peers.PEERS[name](CONFIG)
    assert sum(p.numel() for p in model.parameters()) == parameters(CONFIG)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_the_published_configuration_has_the_published_size():
    config, _ = training.SHAPES["4.2M"]
    assert sum(p.numel() for p in peers.published(config).parameters()) == 4_197_994
    config, _ = training.SHAPES["12M"]
    assert sum(p.numel() for p in peers.published(config).parameters()) == 11_965_642


def test_figures_of_every_contender():
    figures = compare(list(peers.PEERS))
    assert set(figures) == {*peers.PEERS, "baseline, eager", "flash, eager", "baseline, eager (A/A)"}
    assert figures["timm"]["ratio"] == 1
    state = 3 * 4 * parameters(CONFIG)
    for f in figures.values():
        assert 0 < f["lower_quartile"] <= f["seconds"] <= f["upper_quartile"]
        assert f["images_per_second"] == pytest.approx(8 / f["seconds"])
        assert f["peak_bytes"] > state
        assert f["mfu"] > 0
    assert figures["baseline, eager"]["peak_bytes"] == figures["baseline, eager (A/A)"]["peak_bytes"]


def test_a_contender_that_cannot_run_says_why(monkeypatch):
    def refusing(*args):
        raise InputError("flash on CUDA takes bfloat16")

    monkeypatch.setattr(ours, "contender", refusing)
    figures = compare(["timm"])
    assert figures["flash, eager"] == {"error": "flash on CUDA takes bfloat16"}
    assert figures["timm"]["ratio"] == 1


def test_a_peers_peak_counts_its_state():
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    made = peers.contender("timm", CONFIG, batch, half=False, compiled=False, steps=1)
    made.run()
    floor = 3 * 4 * parameters(CONFIG) + tensor_bytes(batch)
    assert floor < made.peak() < 10 * floor


def test_a_block_of_ours_is_a_step_for_every_batch_of_its_order():
    seen = []

    def prepare(images, key):
        seen.append(len(images))
        return images

    split, order = Split(torch.randn(4, 3, 8, 8), torch.arange(4)), torch.arange(4).repeat(3)
    made = ours.contender(EXACT, CONFIG, split, order, 4, "eager", torch.float32, CPU, prepare)
    seen.clear()
    made.run()
    assert seen == [4, 4, 4]
