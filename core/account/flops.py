"""FLOPs of an operation by the shapes of its operands, two a multiply-add: matrix products, convolutions, attention."""

import re
from typing import Any

from torch.utils.flop_counter import flop_registry

# operations that attend, what their names end in, and which axis of q, k and v counts the tokens
_ATTENTION = (
    (re.compile(r"aten::_scaled_dot_product_\w+?(_backward)?"), -2),
    (re.compile(r"vit_ablations::flash_attn(_backward)?"), 1),
)


def flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one call of an operation (torch.ops.NAMESPACE.NAME.OVERLOAD); 0 for one without products.

    A fused attention kernel counts as the products it stands for: two forward (q k^T, and the weights times v), and
    their gradients, two for each, whatever tiles it computes again inside: so that arms which compute the same count
    the same, on every version of torch. What an arm computes again in operations of its own does count. For all other
    operations torch's registry is asked, where the author of a custom operator adds its formula
    (torch.utils.flop_counter.register_flop_formula).
    """
    for pattern, tokens in _ATTENTION:
        if match := pattern.fullmatch(operation.name().partition(".")[0]):
            q, k, v = args[1:4] if match[1] else args[:3]
            products = 2 * k.shape[tokens] * q.numel() * (1 + v.shape[-1] / q.shape[-1])
            return int(products) * (2 if match[1] else 1)
    formula = flop_registry.get(operation.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0
