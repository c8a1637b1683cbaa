"""Modules that cannot be had, or that are no pure functions of images: each message names what and what to do."""

import json
import shutil

import pytest
import torch

from core import engine, model
from core.errors import InputError
from core.foreign import sources

HEAD = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
PLAIN = """
class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.head, self.drop = nn.Linear(3, classes), nn.Dropout({rate})
        self.norm = {norm}
        {init}

    def forward(self, images{more}):
        {first}
        out = self.head(self.drop(self.norm(images.mean((2, 3)))))
        return {out}


build = {build}
"""

DEFAULT = {
    "rate": 0.0, "norm": "nn.LayerNorm(3)", "more": "", "first": "pass", "init": "", "out": "out", "build": "Net",
}  # fmt: skip
ANOTHER = """
def build(counted=[]):
    counted.append(0)
    net = Net()
    net.more = nn.Linear(3, len(counted))
    return net
"""


def written(tmp_path, text=PLAIN, **changes):
    path = tmp_path / "net.py"
    path.write_text(HEAD + (text.format(**DEFAULT | changes) if text is PLAIN else text))
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
    (tmp_path / "config.json").write_text('{"model_type": "vit", "hidden_size": "wide"}')
    refused(f"hf:{tmp_path}", r"cannot be had \(.*'hidden_size'.* pass a folder with a config.json")
    refused("module:nowhere.py:build", r"'nowhere.py' does not exist")
    refused("module:nowhere.py", r"names no function; write module:FILE.py:FUNCTION")
    refused(written(tmp_path).replace(":build", ":make"), r"has no function 'make'; write module:.*:FUNCTION")


def test_weights(hugging_face, tmp_path, monkeypatch):
    folder = tmp_path / "vit"
    shutil.copytree(hugging_face / "vit", folder)
    (folder / "pytorch_model.bin").touch()
    refused(
        f"hf:{folder}",
        r"weights in pytorch_model.bin, and only safetensors beside config.json are read; write them .*, or move",
        image=28,
    )
    assert not sources.pretrained(f"hf:{folder}")
    (folder / "model.safetensors").touch()
    assert sources.pretrained(f"hf:{folder}")
    import timm

    def create(name, img_size=None, **options):
        if img_size:
            raise TypeError("img_size")
        raise FileNotFoundError("no network")

    monkeypatch.setattr(timm, "create_model", create)
    name = "timm:vit_tiny_patch16_224"
    refused(f"{name}@pretrained", rf"\(FileNotFoundError: no network\); fetch its weights .*, pass {name}, or another")
    assert sources.pretrained(f"{name}@pretrained")
    assert not sources.pretrained(name)


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
    refused(written(tmp_path, first="return images.mean((2, 3)) @ self.head.weight.T"), "none of its linear maps")


def test_what_cannot_be_trained_or_built(tmp_path):
    refused(
        written(tmp_path, out="{'logits': out}"), r"returns dict; its forward may return logits \[2, 5\] for 2 images"
    )
    refused(written(tmp_path, out="out * float('nan')"), "gives logits that are NaN or infinite")
    refused(written(tmp_path, out="out.detach()"), "gives logits without a gradient; take out what detaches them")
    refused(written(tmp_path, build="lambda: Net().requires_grad_(False)"), "has no parameter that requires a gradient")
    refused(
        written(tmp_path, init="self.head = nn.LazyLinear(5)"), "has no size yet in head.weight, head.bias; build it"
    )
    complex_ = "self.c = nn.Parameter(torch.ones(5, dtype=torch.complex64))"
    refused(written(tmp_path, init=complex_), "has complex values in c; build it of real numbers")
    buffer = "self.register_buffer('n', torch.zeros(()))"
    for first in ("self.n += 1", "self.n += not self.training", "self.n = self.n + 1"):
        refused(written(tmp_path, init=buffer, first=first), r"other state that a step changes \(n\)")
    shrunk = r"other state that a step changes \(head.weight\)"
    refused(written(tmp_path, first="self.head.weight.data.mul_(0.5)"), shrunk)
    for start in ("0", "torch.zeros(())"):
        counted = written(tmp_path, init=f"self.n = {start}", first="self.n = self.n + 1")
        refused(counted, r"other state that a step changes \(n\)")
    noise = "out + 1e-6 * torch.randn_like(out)"
    refused(written(tmp_path, out=noise), "other logits of the same images each time; take out what it draws")
    traced = "lambda: torch.jit.trace(Net().eval(), torch.zeros(2, 3, 8, 8))"
    refused(written(tmp_path, build=traced), "is not written in Python .*; pass one that is")
    drawn = "self.register_buffer('n', torch.randn(3))"
    refused(
        written(tmp_path, init=drawn), r"draws n at random and does not train it, .*; draw it from a torch.Generator"
    )
    refused(
        written(tmp_path, build="lambda depth, classes: Net()"), "build needs depth, and is given image, channels, cl"
    )
    refused(written(tmp_path, init="raise SystemExit(3)"), r"build\(.*\) raises SystemExit: 3; mend it")
    group = "raise BaseExceptionGroup('two', [KeyboardInterrupt()])"
    refused(written(tmp_path, init=group), r"build\(.*\) raises BaseExceptionGroup: two \(1 sub-exception\); mend it")
    refused(written(tmp_path, first="raise SystemExit(0)"), r"does not take images of 3 x 8 x 8 \(SystemExit: 0\)")
    mixed = written(tmp_path, out="out - out.mean(0)", norm="nn.Identity()")
    refused(mixed, "gives an image other logits beside another one than alone")
    refused(
        written(tmp_path, PLAIN.format(**DEFAULT) + ANOTHER), "built otherwise each time, in more.bias, more.weight"
    )


def test_what_a_module_says_while_it_is_built_is_no_output(tmp_path, capsys):
    assert (
        sources.load(written(tmp_path, init="print('hello')", first="images.mul_(0.5)"), 8, 3, 5).reached["linear"] == 1
    )
    assert capsys.readouterr() == ("", "hello\n" * 2)  # of two seeds


def test_code_of_a_folder_is_neither_run_nor_asked_for(tmp_path):
    own = {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": own}))
    (tmp_path / "mine.py").write_text(f"open('{tmp_path}/ran', 'w')")
    refused(f"hf:{tmp_path}", r"cannot be had \(ValueError: .*custom code")
    assert not (tmp_path / "ran").exists()


def test_shared_parameters_go_back_under_all_their_names(tmp_path):
    shared = "self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5); self.b.weight = self.a.weight"
    config = sources.load(written(tmp_path, init=shared, out="self.b(self.a(out))"), 8, 3, 5)
    params = model.init(config, 1)
    assert "b.weight" not in params
    state = model.state_dict(config, params)
    assert state["b.weight"].data_ptr() != state["a.weight"].data_ptr()  # or no file would take both
    config.build(2).load_state_dict(state)
    back = model.from_state_dict(config, state)
    assert back.keys() == params.keys()


def test_another_image_size(hugging_face):
    refused(f"hf:{hugging_face / 'vit'}", r"does not take images of 3 x 32 x 32 \(.*\); pass --image 28", image=32)


def test_a_module_that_breaks_the_graph(tmp_path):
    name = written(tmp_path, first="print(images.sum().item())")
    config = sources.load(name, 8, 3, 5)
    with pytest.raises(InputError, match=r"cannot be traced as one graph .*; pass --engine eager"):
        engine.refuse_breaks(f"model '{config}'", lambda x: config.module(x).sum(), torch.zeros(2, 3, 8, 8))
