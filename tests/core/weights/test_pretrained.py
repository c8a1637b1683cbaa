"""Weights to start from: against timm, torchvision and Hugging Face, whose models are built here and saved."""

import sys
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from core import rng, vit
from core.errors import InputError
from core.weights import checkpoints, pretrained

SHAPE = {"width": 16, "depth": 2, "heads": 2, "mlp": 32, "patch": 4, "patch_norm": False, "channels": 3}


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    pretrained.load.cache_clear()


@pytest.fixture
def images():
    return (rng.uniform(rng.key(0), (2, 3, 16, 16)) * 2 - 1).double()


def of_timm():
    return VisionTransformer(
        img_size=16, patch_size=4, num_classes=7, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2
    ).eval()


def of_torchvision():
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=7
    ).eval()


def of_hugging_face(kind="ViTForImageClassification"):
    transformers = pytest.importorskip("transformers")
    description = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=7,
    )  # fmt: skip
    return getattr(transformers, kind)(description).eval()


def saved(model, tmp_path):
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    return f"{tmp_path / 'model.safetensors'}@heads=2"


def logits(source, config, images, head):
    """In float64."""
    params = {n: p.double() for n, p in fitted(source, config, head).items()}
    return vit.forward(params, images, config).logits


def fitted(source, config, head=None):
    """The weights of a source in `config`; head: weight and bias, to compare logits."""
    params = pretrained.fit(pretrained.load(source), vit.init(config, 0), config)
    return params | (dict(zip(("head.weight", "head.bias"), head, strict=True)) if head else {})


@pytest.mark.parametrize(
    ("build", "head", "eps"),
    [
        (of_timm, lambda m: m.head, 1e-6),
        (of_torchvision, lambda m: m.heads.head, 1e-6),
        (of_hugging_face, lambda m: m.classifier, 1e-12),
    ],
)
def test_a_state_dict_in_a_file(build, head, eps, config, images, tmp_path):
    model, config = build(), replace(config, classes=7, eps=eps)
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2
    source = saved(model, tmp_path)
    assert pretrained.load(source).shape == SHAPE
    ours = logits(source, config, images, (head(model).weight, head(model).bias))
    theirs = model.double()(images)
    torch.testing.assert_close(ours, getattr(theirs, "logits", theirs), rtol=0, atol=1e-10)


def test_the_head_is_fresh(config, tmp_path):
    params, source = vit.init(config, 3), saved(of_timm(), tmp_path)
    ours = pretrained.fit(pretrained.load(source), params, config)
    assert torch.equal(ours["head.weight"], params["head.weight"])
    assert not torch.equal(ours["norm.weight"] + ours["cls_token"], params["norm.weight"] + params["cls_token"])


def test_a_checkpoint_of_ours_with_another_head(config, tmp_path):
    own = replace(config, head="mlp", patch_norm=True, eps=1e-5)
    about = {"config": vars(own), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    checkpoints.save(tmp_path / "best.safetensors", vit.init(own, 1), about)
    source = pretrained.load(str(tmp_path / "best.safetensors"))
    assert source.shape == SHAPE | {"patch_norm": True, "eps": 1e-5}
    assert (source.mean, source.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    params = fitted(source.source, replace(own, head="linear"))
    assert torch.equal(params["blocks.1.mlp.fc2.weight"], vit.init(own, 1)["blocks.1.mlp.fc2.weight"])


def test_hugging_face_by_name(config, images, tmp_path):
    """A model without a classifier, but with a pooler; where its images are described, by that."""
    model = of_hugging_face("ViTModel")
    model.save_pretrained(tmp_path)
    source = pretrained.load(f"hf:{tmp_path}")
    assert source.shape == SHAPE | {"eps": 1e-12}
    assert (source.mean, source.std) == ((0.5,) * 3, (0.5,) * 3)
    config = replace(config, classes=16, eps=1e-12)
    identity = torch.eye(16), torch.zeros(16)
    ours = logits(f"hf:{tmp_path}", config, images, identity)
    torch.testing.assert_close(ours, model.double()(images).last_hidden_state[:, 0], rtol=0, atol=1e-10)
    sys.modules["transformers"].ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path)
    pretrained.load.cache_clear()
    assert pretrained.load(f"hf:{tmp_path}").mean == (0.1,) * 3


def test_timm_by_name(monkeypatch, config):
    model = of_timm()
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    source = pretrained.load("timm:vit_tiny_patch16_224")
    assert source.shape == SHAPE | {"eps": 1e-6}
    assert (source.mean, source.std) == ((0.5,) * 3, (0.25,) * 3)
    assert pretrained.load("timm:vit_tiny_patch16_224") is source


@pytest.mark.parametrize("name", ["vit_b_16", "torchvision:vit_b_16"])
def test_torchvision_by_name(name, monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: of_torchvision())
    source = pretrained.load(name)
    assert source.shape == SHAPE | {"eps": 1e-6}
    own = torchvision.models.ViT_B_16_Weights.DEFAULT.transforms()
    assert (source.mean, source.std) == (tuple(own.mean), tuple(own.std))


def test_the_names_are_torchvisions():
    assert set(pretrained.TORCHVISION) == set(torchvision.models.list_models(include="vit_*"))


@pytest.mark.parametrize("side", [2, 4, 7, 9])
def test_positions_as_timm_interpolates_them(side):
    positions = torch.randn(1, 17, 6)
    expected = resample_abs_pos_embed(positions, [side, side])
    assert torch.equal(pretrained.resample(positions, side), expected)
    assert torch.equal(pretrained.resample(positions, side)[:, 0], positions[:, 0])


@pytest.mark.parametrize(
    ("width", "heads"),
    [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16), (16, None)],  # timm's tiny to giant
)
def test_a_file_that_does_not_tell_its_heads(width, heads, tmp_path):
    """The published number of its width, or a refusal; a wrong number would compute another function silently."""
    path = tmp_path / "plain.safetensors"
    state = {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 5, width)}
    state |= {"patch_embed.proj.weight": torch.zeros(width, 3, 4, 4), "blocks.0.mlp.fc1.weight": torch.zeros(8, width)}
    save_file(state, path)
    assert pretrained.load(f"{path}@heads=4").shape["heads"] == 4
    if heads is None:
        with pytest.raises(InputError, match=r"do not tell how many heads their width of 16 has; .*tensors@heads=N"):
            pretrained.load(str(path))
    else:
        source = pretrained.load(str(path))
        assert source.differences({"heads": 2}) == {"heads": heads}
        assert source.differences({"heads": heads}) == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "vit_b_61",
            "unknown weights 'vit_b_61'; legal: vit_b_16, .*, a cell's folder; did you mean 'vit_b_16'?",
        ),
        ("torchvision:vit_b16", "unknown torchvision ViT 'vit_b16'; .*did you mean 'vit_b_16'?"),
        ("tim:vit_tiny", "unknown source of weights 'tim'; legal: torchvision, timm, hf; did you mean 'timm'?"),
        ("timm:vit_tiny_patch16_242", "unknown timm model 'vit_tiny_patch16_242'; did you mean 'vit_tiny_patch16_2"),
        ("nowhere.safetensors", "checkpoint 'nowhere.safetensors' does not exist"),
        ("mine.pth", r"only safetensors are read; .*save_file\(torch.load\(\"mine.pth\", weights_only=True\)"),
    ],
)
def test_unknown_sources_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        pretrained.load(source)


def test_what_cannot_be_fetched_says_what_to_pass(monkeypatch):
    def offline(name, weights):
        raise OSError("no route to host\nat all")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(InputError) as error:
        pretrained.load("vit_b_16")
    assert str(error.value) == (
        "weights 'vit_b_16' could not be had (OSError: no route to host); pass --weights PATH.safetensors, such as the "
        "best.safetensors of a study of `--preset pretrain`"
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"install timm \(pip install timm\), or pass --weights PATH"):
        pretrained.load("timm:vit_tiny_patch16_224")


def test_what_is_no_plain_vit_is_refused(config, tmp_path):
    params, path = vit.init(config, 0), tmp_path / "a.safetensors"
    for state, message in (
        ({"conv1.weight": torch.zeros(1)}, "not those of a plain ViT with a class token: no cls_token"),
        (params | {"blocks.0.ls1.gamma": torch.ones(16)}, "have the unknown blocks.0.ls1.gamma"),
        ({n: p for n, p in params.items() if n != "blocks.1.norm1.bias"}, "lack blocks.1.norm1.bias"),
        (params | {"pos_embed": torch.zeros(1, 16, 16)}, "16 positions are no square grid and a class token"),
    ):
        save_file(state, path)
        pretrained.load.cache_clear()
        with pytest.raises(InputError, match=message):
            fitted(f"{path}@heads=2", config)
    save_file(params, path)
    pretrained.load.cache_clear()
    with pytest.raises(InputError, match="are for images of 3 channels, the data has 1"):
        fitted(f"{path}@heads=2", replace(config, channels=1))
