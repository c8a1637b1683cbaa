"""The layers of a Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929), written in the primitives:
EXACT, and the pure functions that it and transforms of it share.

Axis letters: B batch, N tokens (class token included), D width, h heads, d head width, C channels, P patch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core import rng
from core.ops import Carry, Ops, Site

MAPS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # a block's linear maps


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis in the precision of its weights, returned in that of x."""
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def norm(site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm."""
    return normalize(x, weight, bias, site.config.eps)


def linear(site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """before(*inputs) W^T + b in the precision of what `before` gives."""
    x = before(*inputs)
    return F.linear(x, *site.affine(x.dtype))


def embed(site: Site, patches: Tensor) -> Tensor:
    """Flattened patches [B,N,C·P·P] -> tokens [B,N,D] by the patch embedding, without positions; site: the model's."""
    weight, bias = site.child("patch_embed.proj").affine(site.dtype)
    tokens = F.linear(patches.to(site.dtype), weight.flatten(1), bias)
    if not site.config.patch_norm:
        return tokens
    own = site.child("patch_embed.norm")
    return site.ops.norm(own, tokens, *own.affine())


def with_class_token(site: Site, tokens: Tensor) -> Tensor:
    """Tokens [B,N,D] -> [B,1+N,D]: the class token goes first."""
    first = site.params["cls_token"].to(tokens.dtype)
    return torch.cat((first.expand(len(tokens), -1, -1), tokens), dim=1)


def tokenize(site: Site, images: Tensor) -> Tensor:
    """The uniform grid of patches in raster order, the class token first, learned positions added."""
    P = site.config.patch
    patches = rearrange(images, "B C (y p) (x q) -> B (y x) (C p q)", p=P, q=P)
    tokens = with_class_token(site, embed(site, patches))
    return tokens + site.params["pos_embed"].to(tokens.dtype)


def after_norm(site: Site, norm: str, linear: str, x: Tensor) -> Tensor:
    """The linear map of the LayerNorm of x [...,D], by the names of both sites."""
    own = site.child(norm)
    return site.ops.linear(site.child(linear), lambda *inputs: site.ops.norm(own, *inputs), x, *own.affine())


def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v (Vaswani et al. 2017, equation 1), the softmax in at least float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def attention(site: Site, x: Tensor) -> tuple[Tensor, Carry]:
    """The first branch; what it computes on the way dies with it, unless the penalty reads it."""
    ops, own = site.ops, site.child("attn")
    qkv = after_norm(site, "norm1", "attn.qkv", x)
    q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=site.config.heads).unbind(0)
    heads = ops.attend(own, q, k, v)
    carry = ops.observe(own, q, k, v, heads)
    y = ops.linear(own.child("proj"), lambda heads: rearrange(heads, "B h N d -> B N (h d)"), heads)
    return dropout(own, y), carry


def mlp(site: Site, x: Tensor) -> Tensor:
    """The second branch: Linear, GELU, dropout, Linear of the LayerNorm of x [B,N,D]."""
    own = site.child("mlp")
    y = after_norm(site, "norm2", "mlp.fc1", x)
    mask = kept(own, y.shape)
    return site.ops.linear(own.child("fc2"), lambda y, *mask: activate(y, site.config.dropout, *mask), y, *mask)


def activate(y: Tensor, probability: float, *mask: Tensor) -> Tensor:
    """GELU, then dropout by a mask of `kept`."""
    return drop(F.gelu(y), probability, *mask)


def block(site: Site, x: Tensor) -> tuple[Tensor, Carry]:
    """Pre-norm block: x [B,N,D] plus its attention, and plus the MLP of that."""
    branch, carry = site.ops.attention(site, x)
    x = x + branch
    del branch  # or it would live through the MLP
    return x + site.ops.mlp(site, x), carry


def readout(site: Site, x: Tensor) -> Tensor:
    """The class token's LayerNorm and the head: x [B,N,D] -> logits [B,K]."""
    own = site.child("norm")
    x = site.ops.norm(own, x[:, 0].clone(), *own.affine())  # of a view, it would keep all of x
    head = site.child("head")
    if site.config.head == "linear":
        return site.ops.linear(head, lambda x: x, x)
    y = site.ops.linear(head.child("fc1"), lambda x: x, x)
    mask = kept(head, y.shape)
    return site.ops.linear(head.child("fc2"), lambda y, *mask: activate(y, site.config.dropout, *mask), y, *mask)


def observe(site: Site, q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Carry:
    """The carry, and this block's penalty."""
    return {**site.carry, "penalty": site.ops.penalty(site, heads)}


def penalty(site: Site, heads: Tensor) -> Tensor:
    """Zero."""
    return heads.new_zeros(())


def kept(site: Site, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Which elements the site's dropout keeps, a boolean mask in a tuple; () where it keeps all (no key)."""
    probability = site.config.dropout
    key = site.key("dropout") if probability else None
    return () if key is None else (rng.bernoulli(key, shape, 1 - probability),)


def drop(x: Tensor, probability: float, *mask: Tensor) -> Tensor:
    """Zero what a mask of `kept` leaves out and rescale the rest; x itself without a mask."""
    return x * mask[0] / (round((1 - probability) * 65536) / 65536) if mask else x


def dropout(site: Site, x: Tensor) -> Tensor:
    """Zero each element with the model's probability (to 1/65536) and rescale the rest; no key: x itself."""
    return drop(x, site.config.dropout, *kept(site, x.shape))


EXACT = Ops(tokenize, norm, linear, attend, attention, mlp, block, readout, observe, penalty)
"""The unmodified primitives."""
