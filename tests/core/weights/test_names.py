import pytest
import torch
from torch.func import functional_call

from core import rng, vit
from core.errors import InputError
from core.weights import checkpoints
from core.weights.names import rename


@pytest.fixture
def images():
    return (rng.uniform(rng.key(0), (2, 3, 16, 16)) * 2 - 1).double()


def test_from_timm_and_back(config, images):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2)
    model = model.double()
    params = checkpoints.check(rename(model.state_dict()), config)
    torch.testing.assert_close(vit.forward(params, images, config).logits, model(images), rtol=0, atol=1e-10)
    ours = {n: p.double() for n, p in vit.init(config, 0).items()}
    torch.testing.assert_close(
        functional_call(model, ours, images), vit.forward(ours, images, config).logits, rtol=0, atol=1e-10
    )


def test_from_hugging_face(config, images):
    transformers = pytest.importorskip("transformers")
    description = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=5, layer_norm_eps=config.eps,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(description).eval().double()
    params = checkpoints.check(rename(model.state_dict()), config)
    torch.testing.assert_close(vit.forward(params, images, config).logits, model(images).logits, rtol=0, atol=1e-10)


def test_a_name_of_two_libraries_is_refused():
    zero = torch.zeros(1)
    with pytest.raises(InputError, match="two tensors for cls_token; keep those of one"):
        rename({"cls_token": zero, "class_token": zero})


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
    converted = checkpoints.check(rename(state), config)
    assert all(torch.equal(converted[n], params[n]) for n in params)
