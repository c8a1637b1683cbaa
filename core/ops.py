"""Ops: the few primitives a Vision Transformer is written in, and EXACT, the unmodified ones.

A training optimization is a pure function Ops -> Ops that replaces some of these fields. The model never
knows which. Axis letters: B batch, N tokens, D width, h heads, d head width, C channels, P patch side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from core.vit import VitConfig

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Ops:
    """The primitives. A key is an int64 tensor [2] (see core.rng), or None where nothing may be random.

    tokenize: (params, images [B,C,H,W], config) -> tokens [B,N,D], class token and positions included
    linear:   (x [...,I], weight [O,I], bias [O], key) -> [...,O]
    product:  (a [...,M,K], b [...,K,N], key) -> [...,M,N]
    attend:   (ops, q, k, v [B,h,N,d], key) -> [B,h,N,d]
    penalty:  (heads: one [B,h,N,d] a block) -> scalar, added to the cross entropy
    """

    tokenize: Callable[[Params, Tensor, VitConfig], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    attend: Callable[[Ops, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    penalty: Callable[[list[Tensor]], Tensor]


Rewrite = Callable[[Ops], Ops]


def layer_norm(x: Tensor, params: Params, name: str, eps: float) -> Tensor:
    """LayerNorm over the last axis in the precision of its weights, returned in that of x."""
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


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


def linear(x: Tensor, weight: Tensor, bias: Tensor, key: Tensor | None) -> Tensor:
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


def penalty(heads: list[Tensor]) -> Tensor:
    """Zero."""
    return heads[0].new_zeros(())


EXACT = Ops(tokenize, linear, product, attend, penalty)
