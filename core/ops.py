"""Ops: the few primitives a Vision Transformer is written in, and EXACT, the unmodified ones.

A training optimization is a pure function Ops -> Ops that replaces some of these fields. The model never
knows which. Axis letters: B batch, N tokens, D width, h heads, d head width, C channels, P patch side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core import rng

if TYPE_CHECKING:
    from core.vit import VitConfig

Params = dict[str, Tensor]


class Site(NamedTuple):
    """Where a linear map stands, for transforms that choose what to keep for the backward pass.

    layer: the map's name in its block, such as "attn.qkv". ops: the arm's primitives.
    before, inputs: the function whose result the map takes: x == before(*inputs); None if x is no such result.
    norms: |dL/dy| of each row of the map's output [B,N] at the images' last visit, 0 for none; None if nobody keeps
        them (step.py does, on demand). A transform that uses them gives the new ones as their gradient.
    """

    layer: str
    ops: Ops
    before: Callable[..., Tensor] | None = None
    inputs: tuple[Tensor, ...] = ()
    norms: Tensor | None = None


@dataclass(frozen=True)
class Ops:
    """The primitives. A key is an int64 tensor [2] (see core.rng), or None where nothing may be random.

    tokenize: (params, images [B,C,H,W], config) -> tokens [B,N,D], class token and positions included
    linear:   (x [...,I], weight [O,I], bias [O], key, site) -> [...,O]
    product:  (a [...,M,K], b [...,K,N], key) -> [...,M,N]
    attend:   (ops, q, k, v [B,h,N,d], key) -> [B,h,N,d]
    mlp:      (ops, params, block name, x [B,N,D], config, keys [3,2]) -> [B,N,D], LayerNorm included
    penalty:  (heads: one [B,h,N,d] a block) -> scalar, added to the cross entropy
    """

    tokenize: Callable[[Params, Tensor, VitConfig], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, Site | None], Tensor]
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    attend: Callable[[Ops, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    mlp: Callable[[Ops, Params, str, Tensor, VitConfig, Tensor | None], Tensor]
    penalty: Callable[[list[Tensor]], Tensor]


Rewrite = Callable[[Ops], Ops]


def layer_norm(x: Tensor, params: Params, name: str, eps: float) -> Tensor:
    """LayerNorm over the last axis in the precision of its weights, returned in that of x."""
    return normalize(x, *affine(params, name), eps)


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` of given weight and bias."""
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def affine(params: Params, name: str) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a layer."""
    return params[f"{name}.weight"], params[f"{name}.bias"]


def after_norm(
    ops: Ops, params: Params, block: str, norm: str, layer: str, x: Tensor, eps: float, key: Tensor | None
) -> Tensor:
    """`linear` of the LayerNorm of x [...,D], by the names of both in the block."""
    scale, shift = affine(params, f"{block}.{norm}")
    norms = params.get(f"{block}.{layer}.norms")
    site = Site(layer, ops, lambda x, scale, shift: normalize(x, scale, shift, eps), (x, scale, shift), norms)
    return ops.linear(normalize(x, scale, shift, eps), *affine(params, f"{block}.{layer}"), key, site)


def kept(shape: Sequence[int], probability: float, key: Tensor | None) -> tuple[Tensor, ...]:
    """Which elements dropout keeps, a boolean mask in a tuple; () where it keeps all (no key)."""
    return () if key is None or probability == 0 else (rng.bernoulli(key, shape, 1 - probability),)


def drop(x: Tensor, probability: float, *mask: Tensor) -> Tensor:
    """Zero what a mask of `kept` leaves out and rescale the rest; x itself without a mask."""
    return x * mask[0] / (round((1 - probability) * 65536) / 65536) if mask else x


def embed(params: Params, patches: Tensor, config: VitConfig) -> Tensor:
    """Flattened patches [B,N,C·P·P] -> tokens [B,N,D] by the patch embedding, without positions, in its precision."""
    weight = params["patch_embed.proj.weight"].flatten(1)
    tokens = F.linear(patches.to(weight.dtype), weight, params["patch_embed.proj.bias"])
    return layer_norm(tokens, params, "patch_embed.norm", config.eps) if config.patch_norm else tokens


def with_class_token(params: Params, tokens: Tensor) -> Tensor:
    """Tokens [B,N,D] -> [B,1+N,D]: the class token goes first."""
    return torch.cat((params["cls_token"].expand(len(tokens), -1, -1), tokens), dim=1)


def tokenize(params: Params, images: Tensor, config: VitConfig) -> Tensor:
    """The uniform grid of patches in raster order, the class token first, learned positions added."""
    P = config.patch
    patches = rearrange(images, "B C (y p) (x q) -> B (y x) (C p q)", p=P, q=P)
    return with_class_token(params, embed(params, patches, config)) + params["pos_embed"]


def linear(x: Tensor, weight: Tensor, bias: Tensor, key: Tensor | None, site: Site | None = None) -> Tensor:
    """x W^T + b."""
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, key: Tensor | None) -> Tensor:
    """a @ b."""
    return a @ b


def attend(ops: Ops, q: Tensor, k: Tensor, v: Tensor, key: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt d) v (Vaswani et al. 2017, equation 1), the softmax in at least float32."""
    scores = ops.product(q * q.shape[-1] ** -0.5, k.mT, key)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return ops.product(weights, v, None if key is None else key.flip(0))  # another key for the second draw


def mlp(ops: Ops, params: Params, block: str, x: Tensor, config: VitConfig, keys: Tensor | None) -> Tensor:
    """Linear, GELU, dropout, Linear of the LayerNorm of x [B,N,D], without the residual."""
    first, mask, second = (None,) * 3 if keys is None else keys
    y = after_norm(ops, params, block, "norm2", "mlp.fc1", x, config.eps, first)
    inputs = (y, *kept(y.shape, config.dropout, mask))
    norms = params.get(f"{block}.mlp.fc2.norms")
    site = Site("mlp.fc2", ops, lambda y, *mask: activate(y, config.dropout, *mask), inputs, norms)
    return ops.linear(activate(y, config.dropout, *inputs[1:]), *affine(params, f"{block}.mlp.fc2"), second, site)


def activate(y: Tensor, probability: float, *mask: Tensor) -> Tensor:
    """GELU, then dropout by a mask of `kept`."""
    return drop(F.gelu(y), probability, *mask)


def penalty(heads: list[Tensor]) -> Tensor:
    """Zero."""
    return heads[0].new_zeros(())


EXACT = Ops(tokenize, linear, product, attend, mlp, penalty)
