"""The Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) as pure functions: its shape,
its parameters, and the pass through all blocks. The layers are in layers.py.

Parameters are a flat dict under timm's names, so that weights load from timm and back without renaming.
Axis letters: B batch, N tokens (class token included), D width, h heads, d head width, C channels, P patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core import rng
from core.errors import InputError, choose, within
from core.initializers import draw, normal, uniform
from core.layers import EXACT
from core.ops import Carry, Ops, Parameter, Params, Site, joined

HEADS = ("linear", "mlp")
MOST = {  # far above what was ever trained: larger ones are slips, and would take hours to be refused by the memory
    **{"image": 2**14, "patch": 2**14, "width": 2**17, "depth": 2**10, "heads": 2**12, "mlp": 2**19},
    **{"classes": 2**24, "channels": 2**10},
}


@dataclass(frozen=True)
class VitConfig:
    """Shape of a Vision Transformer; the defaults of the optional fields give timm's VisionTransformer.

    image, patch: side in pixels; width: D; mlp: hidden width of the MLP in units (not a ratio).
    dropout: probability, training only, after the attention projection, the MLP's GELU and the GELU of an
        "mlp" head. (Attention probabilities are never dropped: fused attention cannot draw from a key.)
    patch_norm: LayerNorm after the patch embedding.
    head: "linear", or "mlp" = Linear(D, D/2), GELU, dropout, Linear(D/2, classes).
    eps: of every LayerNorm.

    Raises InputError if the patch does not divide the image, the heads the width, or a size is below 1.
    """

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp: int
    classes: int
    channels: int = 3
    dropout: float = 0.0
    patch_norm: bool = False
    head: str = "linear"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            within(name, getattr(self, name), 1, most)
        choose("head", self.head, HEADS)
        if not 0 <= self.dropout <= 0.9999:
            raise InputError(f"dropout {self.dropout} is outside 0 to 0.9999")
        if not 0 < self.eps < 1:
            raise InputError(f"eps {self.eps} is outside 0 to 1, both excluded")
        if self.image % self.patch:
            raise InputError(f"patch {self.patch} does not divide image {self.image}; legal: {_divisors(self.image)}")
        if self.width % self.heads:
            raise InputError(f"heads {self.heads} do not divide width {self.width}; legal: {_divisors(self.width)}")

    @property
    def tokens(self) -> int:
        """Tokens a uniform grid gives, the class token included."""
        return (self.image // self.patch) ** 2 + 1


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def layout(config: VitConfig, ops: Ops = EXACT) -> dict[str, Parameter]:
    """Every parameter in the model's order, those that transforms bring at the end.

    Initial values by the rule of the first ViT (arXiv 2010.11929, its published code): matrices uniform by Glorot,
    biases 0, positions normal with deviation 0.02, class token with 1e-6, LayerNorm 1 and 0; the patch embedding
    uniform in +-1/sqrt(fan in). (timm's flat deviation of 0.02 starves narrow models: 0.2 M parameters reached 33 %
    where this rule reaches 96 % on digits in 350 steps.)
    """
    D, M, P = config.width, config.mlp, config.patch
    bound = (config.channels * P**2) ** -0.5
    out = {
        "cls_token": Parameter((1, 1, D), normal(1e-6)),
        "pos_embed": Parameter((1, config.tokens, D), normal(0.02)),
        "patch_embed.proj.weight": Parameter((D, config.channels, P, P), uniform(bound)),
        "patch_embed.proj.bias": Parameter((D,), uniform(bound)),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        out[f"{name}.weight"] = Parameter((outputs, inputs), uniform((6 / (outputs + inputs)) ** 0.5))
        out[f"{name}.bias"] = Parameter((outputs,))

    def norm(name: str) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = Parameter((D,), 1.0), Parameter((D,))

    if config.patch_norm:
        norm("patch_embed.norm")
    for i in range(config.depth):
        norm(f"blocks.{i}.norm1")
        linear(f"blocks.{i}.attn.qkv", 3 * D, D)
        linear(f"blocks.{i}.attn.proj", D, D)
        norm(f"blocks.{i}.norm2")
        linear(f"blocks.{i}.mlp.fc1", M, D)
        linear(f"blocks.{i}.mlp.fc2", D, M)
    norm("norm")
    if config.head == "mlp":
        linear("head.fc1", D // 2, D)
        linear("head.fc2", config.classes, D // 2)
    else:
        linear("head", config.classes, D)
    return joined(out, ops.parameters(config))


def init(config: VitConfig, seed: int, ops: Ops = EXACT, device: torch.device | str | None = None) -> Params:
    """Initial parameters, float32, drawn on the CPU; each tensor depends on the seed and its name only."""
    return {name: tensor.to(device) for name, tensor in draw(layout(config, ops), seed).items()}


class Output(NamedTuple):
    """logits [B,K], and the blocks' penalties summed, a scalar."""

    logits: Tensor
    penalty: Tensor


Block = Callable[[Params, Tensor | None, Tensor, Carry, int | None], tuple[Tensor, Carry]]


def blockwise(config: VitConfig, ops: Ops, dtype: torch.dtype) -> Block:
    """One block as a function of its own parameters (by their names in it), keys, x, the carry, and its number if a
    transform asks for it: what a compiler may compile once for all blocks."""

    def run(own: Params, keys: Tensor | None, x: Tensor, carry: Carry, number: int | None) -> tuple[Tensor, Carry]:
        y, left = ops.block(Site("", own, config, ops, keys, dtype, dict(carry), number), x)
        given = (x, *carry.values())  # a region that hands back an input of its own is miscomputed by torch's inductor
        new = {name: t.clone() if any(t is g for g in given) else t for name, t in {**left, "": y}.items()}
        return new.pop(""), new

    return run


def forward(
    params: Params,
    images: Tensor,
    config: VitConfig,
    ops: Ops = EXACT,
    key: Tensor | None = None,
    dtype: torch.dtype | None = None,
    run: Block | None = None,
) -> Output:
    """Normalised images [B,C,H,W] -> Output. Without a key nothing is random.

    dtype: of the linear maps and attention; the parameters' if not given. LayerNorms compute in the parameters'.
    run: `blockwise` of these three, compiled or not.
    """
    outer, blocks = _by_block(params, config.depth)
    dtype = dtype or params["cls_token"].dtype
    run = run or blockwise(config, ops, dtype)
    model = Site("", outer, config, ops, key, dtype, {})
    x = ops.tokenize(model, images)
    carry: Carry = {}
    penalty = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    for i, own in enumerate(blocks):
        keys = None if key is None else rng.named(key, f"blocks.{i}")
        x, carry = run(own, keys, x, carry, ops.number(i, config.depth))
        penalty = penalty + carry.pop("penalty")
    return Output(ops.readout(model, x), penalty)


def _by_block(params: Params, depth: int) -> tuple[Params, list[Params]]:
    """Parameters outside the blocks, and each block's by their names in it."""
    outer: Params = {}
    blocks: list[Params] = [{} for _ in range(depth)]
    for name, tensor in params.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            blocks[int(number)][rest] = tensor
        else:
            outer[name] = tensor
    return outer, blocks
