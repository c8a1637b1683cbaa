"""Modules that cannot be had, or that are no pure functions of images: each message names what and what to do."""

import pytest
import torch

from core import engine
from core.errors import InputError
from core.foreign import sources

HEAD = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
PLAIN = """
class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.head, self.drop = nn.Linear(3, classes), nn.Dropout({rate})
        self.norm = {norm}

    def forward(self, images{more}):
        {first}
        return self.head(self.drop(self.norm(images.mean((2, 3)))))


build = Net
"""


def written(tmp_path, text=PLAIN, **changes):
    path = tmp_path / "net.py"
    defaults = {"rate": 0.0, "norm": "nn.LayerNorm(3)", "more": "", "first": "pass"}
    path.write_text(HEAD + (text.format(**defaults | changes) if text is PLAIN else text))
    return f"module:{path}:build"


def refused(name, pattern, image=8):
    with pytest.raises(InputError, match=pattern):
        sources.load(name, image, 3, 5)


def test_what_is_not_there(tmp_path):
    refused("vit_tiny", r"unknown model 'vit_tiny'; write timm:NAME, hf:FOLDER or module:FILE.py:FUNCTION")
    refused("timm:vit_tinny_patch16_224", r"timm has no model .*did you mean 'timm:vit_tiny_patch16_224'\?")
    refused(
        "timm:vit_tiny_patch16_224@best", r"write timm:vit_tiny_patch16_224 or timm:vit_tiny_patch16_224@pretrained"
    )
    refused(f"hf:{tmp_path}", r"cannot be had .* pass a folder with a config.json")
    refused("module:nowhere.py:build", r"'nowhere.py' does not exist")
    refused("module:nowhere.py", r"names no function; write module:FILE.py:FUNCTION")
    refused(written(tmp_path).replace(":build", ":make"), r"has no function 'make'; write module:.*:FUNCTION")


def test_what_is_no_module_or_raises(tmp_path):
    refused(written(tmp_path, "def build():\n    return 3\n"), r"gives no nn.Module but int; return one")
    refused(written(tmp_path, "1 / 0\n"), r"net.py' raises ZeroDivisionError: division by zero; mend it")
    refused(written(tmp_path, "def build():\n    return 1 / 0\n"), r"build\(\{\}\) raises ZeroDivisionError")


def test_what_is_no_function_of_images(tmp_path):
    refused(written(tmp_path, more=", mask"), r"needs images, mask; its forward may need the images alone")
    refused(
        written(tmp_path, rate=0.5), r"something else in training \(drop 0.5\): dropout.*build it with these at zero"
    )
    refused(written(tmp_path, norm="nn.BatchNorm1d(3)"), r"has batch statistics .*\(norm\); use LayerNorm")
    classes = r"gives \[2, 3\] for 2 images, not logits \[2, 5\]; give it 5 classes"
    refused(written(tmp_path, first="return images.mean((2, 3))"), classes)
    refused(written(tmp_path, first="return images.mean((2, 3)) @ images.new_zeros(3, 5)"), "none of its linear maps")


def test_another_image_size(hugging_face):
    refused(f"hf:{hugging_face / 'vit'}", r"does not take images of 3 x 32 x 32 \(.*\); pass --image 28", image=32)


def test_a_module_that_breaks_the_graph(tmp_path):
    name = written(tmp_path, first="print(images.sum().item())")
    config = sources.load(name, 8, 3, 5)
    with pytest.raises(InputError, match=r"cannot be traced as one graph .*; pass --engine eager"):
        engine.refuse_breaks(f"model '{config}'", lambda x: config.module(x).sum(), torch.zeros(2, 3, 8, 8))
