"""Weights in from timm, torchvision and Hugging Face, and checkpoints in and out as safetensors (never pickle).

Ours carry timm's names, so they go back as they are: functional_call(timm_model, params, images).
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import InputError
from core.ops import Params
from core.vit import VitConfig, shapes

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


def convert(state: Mapping[str, Tensor], config: VitConfig) -> Params:
    """A state dict of timm's, torchvision's or Hugging Face's ViT (told by its names) -> Params of `config`.

    Raises InputError if a parameter is missing, is left over, or has another shape.
    """
    return check(rename(state), config)


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
        out[name] = tensor
    return out


def _join_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate query, key and value maps become one, stacked in this order."""
    out = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name, tensor in state.items():
        if ".attn.q." in name:
            parts = (tensor, state[name.replace(".q.", ".k.")], state[name.replace(".q.", ".v.")])
            out[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return out


def check(state: Mapping[str, Tensor], config: VitConfig) -> Params:
    """The parameters in the model's order, if they are exactly those of `config`; else InputError."""
    wanted = shapes(config)
    for problem, names in (
        ("lack", [n for n in wanted if n not in state]),
        ("have the unknown", [n for n in state if n not in wanted]),
    ):
        if names:
            raise InputError(f"the weights {problem} {', '.join(names[:3])} ({len(names)} in all) for {config}")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise InputError(f"{name} has shape {tuple(state[name].shape)}, the model needs {shape}: {config}")
    return {name: state[name].detach() for name in wanted}


def save(path: Path, params: Params, about: dict[str, Any]) -> None:
    """Write parameters and what they are (JSON) to a safetensors file, atomically."""
    temporary = path.with_suffix(".partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in params.items()}
    save_file(tensors, temporary, metadata={"about": json.dumps(about)})
    os.replace(temporary, path)


def load(path: Path) -> tuple[Params, dict[str, Any]]:
    """Parameters (CPU) and description from a file of `save`; description {} where it has none.

    Raises InputError if the file does not exist or is not safetensors.
    """
    if not path.is_file():
        raise InputError(f"checkpoint '{path}' does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return params, json.loads((file.metadata() or {}).get("about", "{}"))
    except SafetensorError as error:
        raise InputError(f"'{path}' is not a safetensors file ({error})") from error
