"""Small modules of other libraries, with random weights."""

import pytest
from foreign import CLASSES, IMAGE

from core.foreign import sources


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    """Folders with a config.json of Hugging Face's ViT and DINOv2, small."""
    from transformers import Dinov2Config, ViTConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    folder = tmp_path_factory.mktemp("hugging_face")
    for name, config in (
        ("vit", ViTConfig(**sizes, intermediate_size=64)),
        ("dinov2", Dinov2Config(**sizes, mlp_ratio=2)),
    ):
        config.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The name module:FILE:build of a transformer without biases in its q, k, v map; of one whose source is another."""

    def write(*changes):
        source = SOURCE
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        path = tmp_path_factory.mktemp("written") / "mine.py"
        path.write_text(source)
        return f"module:{path}:build"

    return write


@pytest.fixture(scope="session")
def hand_written(written):
    """As it is."""
    return written()


@pytest.fixture(scope="session")
def post_norm(written):
    """The MLP's branch is added to a norm of x."""
    return written(("return x + self.down", "return self.second(x) + self.down"))


@pytest.fixture
def load(request, monkeypatch):
    """The model of a name, those of timm small."""
    import timm

    small = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options, **small))
    sources.load.cache_clear()

    def loaded(name, image=None):
        image = image or (32 if "16" in name else IMAGE)
        if name.startswith("hf:"):
            name = f"hf:{request.getfixturevalue('hugging_face') / name[3:]}"
        if name in ("hand_written", "post_norm"):
            name = request.getfixturevalue(name)
        return sources.load(name, image, 3, CLASSES)

    yield loaded
    sources.load.cache_clear()


SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    def __init__(self, D, h):
        super().__init__()
        self.h, self.to_qkv, self.out = h, nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D, eps=1e-3)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.to_qkv(self.first(x)).view(B, N, 3, self.h, D // self.h).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class Net(nn.Module):
    def __init__(self, classes, D=16):
        super().__init__()
        self.embed, self.layers = nn.Conv2d(3, D, 7, 7), nn.ModuleList(Layer(D, 2) for _ in range(2))
        self.register_buffer("positions", torch.linspace(-1, 1, 16 * D).view(16, D))
        self.scale, self.answer = nn.Parameter(torch.ones(D), requires_grad=False), nn.Linear(D, classes)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.answer(self.scale * x.mean(1))


def build(classes):
    return Net(classes)
"""
