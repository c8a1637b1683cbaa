"""Stripes: two classes, horizontal and vertical, under noise."""

import torch


def stripes(size: int = 16, train: int = 128, val: int = 64):
    """(train, val, class names), each split uint8 images [N,3,S,S] and int64 labels [N]."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % 2
        rows = (torch.arange(size) % 4 < 2).float().expand(count, size, size)
        pattern = torch.where(labels[:, None, None] == 0, rows.mT, rows)
        noise = torch.rand(count, 3, size, size, generator=generator)
        return (127 * (pattern[:, None] + noise)).to(torch.uint8), labels

    return split(train), split(val), ("horizontal", "vertical")


DATA = {"stripes": stripes}
