import numpy as np
import pytest
import torch

from core.data.batches import batches, gather
from core.data.splits import Split

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[0, 1 << 18], ids=["ahead", "at once"])
def little(request, monkeypatch):
    monkeypatch.setattr("core.data.batches.LITTLE", request.param)


@pytest.fixture
def mapped(tmp_path):
    """Images behind a memory map, as a folder's cache is."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 3, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "train.npy", pixels)
    images = torch.from_numpy(np.load(tmp_path / "train.npy", mmap_mode="c"))
    return Split(images, torch.arange(23))


@pytest.mark.parametrize(("size", "whole"), [(1, 23), (5, 4), (23, 1), (24, 0)])
def test_every_whole_batch_in_order(mapped, size, whole):
    order = torch.arange(23).flip(0)
    got = [(images.clone(), labels.clone()) for images, labels in batches(mapped, order, size, CPU)]
    assert len(got) == whole
    for index, (images, labels) in zip(order.split(size), got, strict=False):
        assert torch.equal(images, mapped.images[index])
        assert torch.equal(labels, index)


def test_reading_ahead_does_not_touch_the_batch_in_use(mapped):
    source = batches(mapped, torch.arange(23), 4, CPU)
    for i, (images, _) in enumerate(source):
        before = images.clone()
        assert torch.equal(before, mapped.images[4 * i : 4 * i + 4])
        torch.randn(200, 200) @ torch.randn(200, 200)  # time for the reader to write the other buffer
        assert torch.equal(images, before)


def test_a_reader_that_fails_is_heard(mapped):
    broken = Split(mapped.images, mapped.labels[:3])
    with pytest.raises(IndexError):
        list(batches(broken, torch.arange(23), 5, CPU))


def test_an_abandoned_epoch_ends_its_reader(mapped):
    import threading

    before = threading.active_count()
    source = batches(mapped, torch.arange(23), 4, CPU)
    next(source)
    source.close()
    assert threading.active_count() == before


def test_gather_selects_rows(mapped):
    images, labels = gather(mapped, torch.tensor([7, 7, 0]))
    assert torch.equal(images, mapped.images[[7, 7, 0]])
    assert labels.tolist() == [7, 7, 0]
