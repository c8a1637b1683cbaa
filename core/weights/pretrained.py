"""Pretrained weights to start from: fetched, or read from a file, and fitted to a model of their shape."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from core import files
from core.errors import InputError, choose
from core.layers import EXACT
from core.ops import Ops, Params
from core.vit import VitConfig
from core.weights import checkpoints
from core.weights.names import rename

TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
SOURCES = (
    *TORCHVISION,
    "torchvision:NAME",
    "timm:NAME",
    "hf:NAME",
    "PATH.safetensors",
    "PATH.safetensors@heads=N",
    "a cell's folder",
)
SHAPE = ("width", "depth", "heads", "mlp", "patch", "patch_norm")  # what a model must share with its weights

Values = tuple[float, ...]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ESSENTIAL = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}  # axes
_OFFLINE = "pass --weights PATH.safetensors, such as the best.safetensors of a study of `--preset pretrain`"


class _Told(BaseModel, strict=True, allow_inf_nan=False):
    """What a state dict does not tell of its model's shape."""

    heads: Annotated[int, Field(ge=1)] | None = None
    eps: Annotated[float, Field(gt=0)] | None = None


class _About(BaseModel, strict=True, allow_inf_nan=False):
    """What a file's description says of weights."""

    config: _Told = _Told()
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None


class Pretrained(NamedTuple):
    """source: as asked for. params: timm's names, float32, without a head. shape: fields of VitConfig, `eps` only where
    the source tells it. mean, std: per channel, which its images were normalised with, if known."""

    source: str
    params: Params
    shape: dict[str, Any]
    mean: Values | None
    std: Values | None

    def digest(self) -> str:
        """SHA-256 of the parameters."""
        return files.digests(self.params)

    def differences(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """The values of SHAPE, by name, that `shape` has otherwise."""
        return {n: self.shape[n] for n in SHAPE if n in shape and self.shape.get(n, shape[n]) != shape[n]}


@lru_cache(maxsize=1)
def load(source: str) -> Pretrained:
    """The weights that one of SOURCES names.

    A state dict does not tell its heads: those of a file without a description are the published ones of its width
    (64 wide, and 16 above width 1024), unless its name is followed by @heads=N. Raises InputError for an unknown
    source, a failed download or a missing package, weights that are not a plain ViT's, and where nothing tells the
    heads.
    """
    if (Path(source) / "best.safetensors").is_file():
        source = str(Path(source) / "best.safetensors")
    if file := re.fullmatch(r"(.+\.safetensors)(?:@heads=(\d+))?", source):
        state, about = checkpoints.load(Path(file[1]))
        try:
            said = _About.model_validate(about)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            raise InputError(f"weights '{source}' describe themselves wrongly ({at}: {first['msg']})") from error
        told = said.config.model_dump(exclude_none=True) | ({"heads": int(file[2])} if file[2] else {})
        return _described(source, state, told, *(tuple(of) if of else None for of in (said.mean, said.std)))
    scheme, colon, name = source.partition(":")
    if source.endswith((".pth", ".pt", ".bin", ".ckpt")):
        raise InputError(
            f"weights '{source}' may hold code, and only safetensors are read; write them as such: python -c 'import "
            f'torch, safetensors.torch as s; s.save_file(torch.load("{source}", weights_only=True), "w.safetensors")\''
        )
    if not colon:
        scheme, name = "torchvision", choose("weights", source, SOURCES)
    fetch = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}
    choose("source of weights", scheme, fetch)
    try:
        model, mean, std = fetch[scheme](name)
    except InputError:
        raise
    except Exception as error:  # a network, a cache or a package can raise nearly anything
        missing = f"install {error.name} (pip install {error.name}), or " if isinstance(error, ImportError) else ""
        reason = next(iter(str(error).splitlines()), "")
        text = f"weights '{source}' could not be had ({type(error).__name__}: {reason}); {missing}{_OFFLINE}"
        raise InputError(text) from error
    eps = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    heads = {n for m in model.modules() for a in ("num_heads", "num_attention_heads") if (n := getattr(m, a, None))}
    told = {k: v.pop() for k, v in (("heads", heads), ("eps", eps)) if len(v) == 1}
    return _described(source, model.state_dict(), told, mean, std)


def _torchvision(name: str) -> tuple[nn.Module, Values, Values]:
    choose("torchvision ViT", name, TORCHVISION)
    from torchvision.models import get_model

    return get_model(name, weights="DEFAULT"), *_IMAGENET


def _timm(name: str) -> tuple[nn.Module, Values, Values]:
    import timm

    if ":" not in name and not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name, timm.list_models("*vit*", pretrained=True), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "; timm.list_models('vit_*', pretrained=True) lists them"
        raise InputError(f"unknown timm model '{name}'{hint}")
    model = timm.create_model(name, pretrained=True)
    description: Any = model.pretrained_cfg
    return model, tuple(description["mean"]), tuple(description["std"])


def _hugging_face(name: str) -> tuple[nn.Module, Values, Values]:
    from transformers import AutoModel, ViTImageProcessor

    model, loaded = AutoModel.from_pretrained(name, output_loading_info=True)
    if lacking := sorted(n for n in loaded["missing_keys"] if not n.startswith("pooler.")):
        raise InputError(
            f"weights 'hf:{name}' lack {len(lacking)} of the model's tensors, such as {lacking[0]}; choose others"
        )
    try:
        images, _ = ViTImageProcessor.get_image_processor_dict(name)
    except OSError:  # a model without a description of its images
        images = {}
    mean, std = (tuple(images.get(k) or (0.5,) * 3) for k in ("image_mean", "image_std"))
    return model, mean, std


def _described(
    source: str, state: Mapping[str, Tensor], told: dict[str, Any], mean: Values | None, std: Values | None
) -> Pretrained:
    renamed = rename(state)
    if odd := [n for n, t in renamed.items() if not (t.is_floating_point() and t.float().isfinite().all())]:
        raise InputError(f"weights '{source}': {odd[0]} is {renamed[odd[0]].dtype} or not finite; they are no weights")
    params = {n: t.detach().float() for n, t in renamed.items() if n.split(".")[0] not in ("head", "heads", "pooler")}
    lacking = [name for name in _ESSENTIAL if name not in params]
    if lacking:
        raise InputError(f"weights '{source}' are not those of a plain ViT with a class token: no {lacking[0]}")
    if odd := [name for name, axes in _ESSENTIAL.items() if params[name].ndim != axes or not params[name].numel()]:
        raise InputError(f"weights '{source}' are no plain ViT's: {odd[0]} has shape {tuple(params[odd[0]].shape)}")
    width = params["cls_token"].shape[-1]
    if "heads" not in told:
        if width % 64:
            raise InputError(
                f"weights '{source}' do not tell how many heads their width of {width} has; write the number after "
                f"the name: {source}@heads=N"
            )
        told["heads"] = width // 64 if width <= 1024 else 16
    blocks = {name.split(".")[1] for name in params if name.startswith("blocks.")}
    _, channels, patch, _ = params["patch_embed.proj.weight"].shape
    if any(values is not None and len(values) != channels for values in (mean, std)):
        raise InputError(f"weights '{source}' have {channels} channels, and as many means and deviations they need")
    shape = {
        "width": width,
        "depth": len(blocks),
        "mlp": len(params["blocks.0.mlp.fc1.weight"]),
        "patch": patch,
        "patch_norm": "patch_embed.norm.weight" in params,
        "channels": channels,
        **told,
    }
    return Pretrained(source, params, shape, mean, std)


def fit(pretrained: Pretrained, initial: Params, config: VitConfig, ops: Ops = EXACT) -> Params:
    """The weights as those of `config`, with positions for its grid; of `initial` the head, and what `ops` bring anew.

    Raises InputError for weights of another shape, and for those of more, or less, than this model.
    """
    if pretrained.shape["channels"] != config.channels:
        raise InputError(
            f"weights '{pretrained.source}' are for images of {pretrained.shape['channels']} channels, the data has "
            f"{config.channels}; choose weights of {config.channels}"
        )
    positions = resample(pretrained.params["pos_embed"], config.image // config.patch)
    brought = ops.parameters(config)
    fresh = {name for name in brought if name not in pretrained.params}
    own = {name: tensor for name, tensor in initial.items() if name.startswith("head.") or name in fresh}
    try:
        return checkpoints.check(pretrained.params | {"pos_embed": positions} | own, config, ops)
    except InputError as error:
        raise InputError(f"weights '{pretrained.source}' do not fit: {error}") from error


def resample(positions: Tensor, side: int) -> Tensor:
    """Positions [1,1+g²,D] of the class token and a g x g grid -> [1,1+side²,D]: the grid bicubic with antialiasing
    (as timm does), the class token's unchanged. Raises InputError where there is no such grid."""
    grid = isqrt(positions.shape[1] - 1)
    if grid == side and positions.shape[1] == 1 + side * side:
        return positions
    if not grid or grid * grid != positions.shape[1] - 1:
        raise InputError(f"{positions.shape[1]} positions are no square grid and a class token: not a plain ViT's")
    old = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    new = F.interpolate(old, (side, side), mode="bicubic", antialias=True)
    return torch.cat((positions[:, :1], new.flatten(2).mT), dim=1)
