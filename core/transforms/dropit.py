"""DropIT: weight gradients from the largest elements of a linear map's input; the others are not kept.

Chen et al., ICLR 2023, arXiv 2202.13808 ("min-k"). Contract: biased gradient, of the weights alone: values, input and
bias gradients of the maps are exact. An element that is kept takes its value and a 32-bit index.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core import layers
from core.attached import attach
from core.errors import InputError
from core.ops import Rewrite, Site, rewrite


def dropit(rate: float = 0.7) -> Rewrite:
    """Drop the share `rate` of the elements of a map's input, those of the smallest magnitude in the batch; 0 changes
    nothing. proj's input is left as it is under fused attention, which keeps it anyway.

    Raises InputError for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise InputError(f"dropit rate {rate} is outside [0, 1): write the share of elements to drop, such as 0.7")

    def linear(site: Site, before: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if site.name == "attn.proj" and site.ops.replaces("attend"):
            return layers.linear(site, before, *inputs)
        x = before(*inputs)
        weight, bias = site.affine(x.dtype)
        flat, width = x.detach().flatten(), x.shape[-1]
        count = len(flat)
        index = flat.abs().topk(max(1, int(count * (1 - rate) + 1e-9)), sorted=False).indices

        def gradient(G: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor]:
            sparse = torch.zeros(count, dtype=values.dtype, device=values.device).scatter(0, index.long(), values)
            return (G.flatten(0, -2).mT @ sparse.view(-1, width),)

        return attach(F.linear(x, weight.detach(), bias), [weight], [flat[index], index.int()], gradient)

    if rate == 0:
        return lambda ops: ops
    return rewrite("dropit", replace={"linear": linear}, at=layers.MAPS)
