"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + B A with a small inner width, all but these and the head frozen."""

import torch.nn.functional as F

from core.ops import Parameter, Rewrite, rewrite
from core.vit import uniform

MAPS = {"attn.qkv": 3, "attn.proj": 1}  # outputs in units of the width


def lora(rank: int = 4) -> Rewrite:
    """rank: the inner width. B starts at zero, so the first loss is the model's own."""

    def linear(inner, site, before, *inputs):
        y = inner(site, before, *inputs)
        down, up = (site.params[f"{site.name}.lora_{half}"].to(y.dtype) for half in ("down", "up"))
        return y + F.linear(F.linear(before(*inputs), down), up)

    def parameters(config):
        D, bound = config.width, config.width**-0.5
        out = {}
        for name, outputs in ((f"blocks.{i}.{m}", n) for i in range(config.depth) for m, n in MAPS.items()):
            out[f"{name}.lora_down"] = Parameter((rank, D), uniform(bound))
            out[f"{name}.lora_up"] = Parameter((outputs * D, rank))
        return out

    def frozen(name):
        return ".lora_" not in name and not name.startswith("head")

    return rewrite("lora", wrap={"linear": linear}, at=tuple(MAPS), parameters=parameters, frozen=frozen)
