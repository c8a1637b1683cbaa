"""Names of parameters in timm, torchvision and Hugging Face. Ours are timm's, so weights go back as they are:
functional_call(timm_model, params, images)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from core.errors import InputError

_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
_HUGGING_FACE = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def rename(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict of timm's, torchvision's or Hugging Face's ViT under timm's names; any other unchanged."""
    if "class_token" in state:
        return _renamed(state, _TORCHVISION)
    if any("patch_embeddings.projection" in name for name in state):
        return _join_qkv(_renamed(state, _HUGGING_FACE))
    return state


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    out = {}
    for old, tensor in state.items():
        name = old
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if name in out:
            raise InputError(f"the weights have two tensors for {name}; keep those of one library's names")
        out[name] = tensor
    return out


def _join_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate query, key and value maps become one, stacked in this order."""
    out = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name, tensor in state.items():
        if ".attn.q." in name:
            parts = [state.get(name.replace(".q.", of)) for of in (".q.", ".k.", ".v.")]
            if any(part is None or part.shape != tensor.shape for part in parts):
                raise InputError(f"the weights have no key or value of the shape of {name}")
            out[name.replace(".q.", ".qkv.")] = torch.cat([part for part in parts if part is not None])
    return out
