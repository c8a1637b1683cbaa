"""Readout: the last block for the class token alone.

With class-token pooling nobody reads what the last block makes of the other tokens; they are its keys and values. Their
query, projection and MLP are left out. Contract: exact; with the model's dropout in distribution, for fewer draws are
made. Saved, of a block's u = B·N·D elements kept, all but the input, its LayerNorm, keys and values (and the queries
and heads that a penalty reads).
"""

from collections.abc import Callable

from einops import rearrange
from torch import Tensor

from core import layers
from core.ops import Carry, Rewrite, Site, rewrite


def readout() -> Rewrite:
    """The last block becomes one of the class token's, which attends to all."""
    return rewrite("readout", replace={"attention": attention}, wrap={"block": block}, positional=(-1,))


def block(inner: Callable[..., tuple[Tensor, Carry]], site: Site, x: Tensor) -> tuple[Tensor, Carry]:
    """The last block of x [B,N,D] -> [B,1,D]: whatever it is made of sees the class token, and `attention` the rest."""
    if site.block != site.config.depth - 1:
        return inner(site, x)
    y, carry = inner(site._replace(carry={**site.carry, "readout": x}), x[:, :1])
    return y, {name: t for name, t in carry.items() if name != "readout"}


def attention(site: Site, x: Tensor) -> tuple[Tensor, Carry]:
    """The first branch; in the last block that of the class token x [B,1,D], by keys and values of all tokens."""
    tokens = site.carry.get("readout")
    if tokens is None:
        return layers.attention(site, x)
    ops, own, h = site.ops, site.child("attn"), site.config.heads
    if ops.observed:  # of all tokens, then
        qkv = layers.after_norm(site, "norm1", "attn.qkv", tokens)
        q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=h).unbind(0)
    else:
        queries, others = separated(site)
        q = rearrange(layers.after_norm(queries, "norm1", "attn.qkv", x), "B N (h d) -> B h N d", h=h)
        kv = layers.after_norm(others, "norm1", "attn.qkv", tokens)
        k, v = rearrange(kv, "B N (two h d) -> two B h N d", two=2, h=h).unbind(0)
    heads = ops.attend(own, q, k, v)
    carry = ops.observe(own, q, k, v, heads)
    y = ops.linear(own.child("proj"), lambda heads: rearrange(heads, "B h N d -> B N (h d)"), heads[:, :, :1])
    return layers.dropout(own, y), carry


def separated(site: Site) -> tuple[Site, Site]:
    """The block's site with the queries' rows alone of all that the map attn.qkv has a row of for each of its outputs;
    and with those of keys and values."""
    D = site.config.width
    rows = {n: p.split((D, 2 * D)) for n, p in site.params.items() if n.startswith("attn.qkv.") and len(p) == 3 * D}
    queries, others = ({n: parts[i] for n, parts in rows.items()} for i in range(2))
    return site._replace(params=site.params | queries), site._replace(params=site.params | others)
