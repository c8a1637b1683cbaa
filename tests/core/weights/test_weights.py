import json

import pytest
import torch
from torch.func import functional_call

from core import rng, vit
from core.errors import InputError
from core.weights import checkpoints as weights


@pytest.fixture
def images():
    return rng.uniform(rng.key(0), (2, 3, 16, 16)) * 2 - 1


def test_from_timm_and_back(config, images):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2)
    params = weights.convert(model.state_dict(), config)
    torch.testing.assert_close(vit.forward(params, images, config).logits, model(images), rtol=0, atol=1e-6)
    ours = vit.init(config, 0)
    torch.testing.assert_close(
        functional_call(model, ours, images), vit.forward(ours, images, config).logits, rtol=0, atol=1e-6
    )


def test_from_hugging_face(config, images):
    transformers = pytest.importorskip("transformers")
    description = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=5, layer_norm_eps=config.eps,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(description).eval()
    params = weights.convert(model.state_dict(), config)
    torch.testing.assert_close(vit.forward(params, images, config).logits, model(images).logits, rtol=0, atol=1e-6)


def test_hugging_face_names_of_version_4(config):
    """The names that checkpoints on the hub carry."""
    params = vit.init(config, 0)
    state = {}
    for name, tensor in params.items():
        for ours, theirs in (
            ("cls_token", "vit.embeddings.cls_token"),
            ("pos_embed", "vit.embeddings.position_embeddings"),
            ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            ("blocks.", "vit.encoder.layer."),
            (".norm1", ".layernorm_before"),
            (".norm2", ".layernorm_after"),
            (".attn.proj", ".attention.output.dense"),
            (".mlp.fc1", ".intermediate.dense"),
            (".mlp.fc2", ".output.dense"),
            ("head.", "classifier."),
        ):
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = f"vit.layer{name}"
        if ".attn.qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace(".attn.qkv", f".attention.attention.{part}")] = piece
        else:
            state[name] = tensor
    converted = weights.convert(state, config)
    assert all(torch.equal(converted[n], params[n]) for n in params)


def test_what_does_not_fit_is_named(config):
    params = vit.init(config, 0)
    lacking = {n: p for n, p in params.items() if n != "norm.bias"}
    with pytest.raises(InputError, match=r"lack norm\.bias"):
        weights.convert(lacking, config)
    with pytest.raises(InputError, match="have the unknown extra"):
        weights.convert(params | {"extra": torch.zeros(1)}, config)
    with pytest.raises(InputError, match=r"head.weight has shape \(7, 16\), the model needs \(5, 16\)"):
        weights.convert(params | {"head.weight": torch.zeros(7, 16)}, config)


def test_checkpoint_round_trip(config, tmp_path):
    params = vit.init(config, 0)
    weights.save(tmp_path / "a.safetensors", params, {"arm": "flash", "n": 3})
    loaded, about = weights.load(tmp_path / "a.safetensors")
    assert about == {"arm": "flash", "n": 3}
    assert all(torch.equal(loaded[n], params[n]) for n in params)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_bad_checkpoints_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        weights.load(tmp_path / "none.safetensors")
    (tmp_path / "b.safetensors").write_text(json.dumps({}))
    with pytest.raises(InputError, match="is not a safetensors file"):
        weights.load(tmp_path / "b.safetensors")
