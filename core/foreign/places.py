"""Where in a module its linear maps, LayerNorms and attentions stand, in the words of our own ViT.

One forward pass is watched. A call of F.linear or F.layer_norm is known by the parameter that it reads; blocks are the
elements of the module's longest list of modules of one class. Within a block, maps of a LayerNorm's output are attn.qkv
before the attention and mlp.fc1 after it, the first map after it is attn.proj, and the last one, of a GELU's output,
mlp.fc2: these names say what a map reads: transforms rely on it. What is called twice has none of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (F.conv1d, F.conv2d)
MAPS = ("linear", "conv")
READ = (*MAPS, "norm")  # calls that read parameters


class Shape(NamedTuple):
    """What transforms ask of a model's config, as in core.vit.VitConfig; eps: of the LayerNorm asked for."""

    image: int
    channels: int
    classes: int
    width: int
    depth: int
    heads: int
    mlp: int
    eps: float = 1e-6
    dropout: float = 0.0


class Call(NamedTuple):
    """A call that was watched. kind: "linear", "conv", "norm", "attend", or "masked", an attention that is not
    softmax(q k^T / sqrt d) v alone, of q, k and v alike. name: of the parameter without ".weight", of an attention that
    of the call before it. sizes: inputs and outputs of a map, heads of an attention and their width. of: whose output a
    map reads as it was made, "norm", "gelu" or neither. eps: of a norm, and of that before a map."""

    kind: str
    name: str
    sizes: tuple[int, ...] = ()
    eps: float = 1e-6
    of: str = ""


class Place(NamedTuple):
    """Where a map, convolution or norm (`kind`) stands: the block's number (None: outside), its name in our own ViT,
    and the config that it sees. ends: the branch of the block whose last map it is, "attention", "mlp" or neither.
    of: see `Call`."""

    kind: str
    block: int | None
    role: str
    config: Shape
    ends: str = ""
    of: str = ""


class Watch(TorchFunctionMode):
    """Notes the calls of a forward pass. names: of the module's parameters, by identity."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.calls, self.last = names, list[Call](), ""
        self.eps = 1e-6
        self.made: tuple[str, Tensor | None, int] = ("", None, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, _ = linear_arguments(*args, **kwargs)
            if name := self.names.get(id(weight)):
                self.last = name
                of, made, version = self.made
                of = of if made is x and x._version == version else ""
                self.calls.append(Call("linear", name, (weight.shape[1], weight.shape[0]), self.eps, of))
        elif func is F.layer_norm:
            _, scale, bias, eps = norm_arguments(*args, **kwargs)
            if bias is not None and (name := self.names.get(id(scale))):
                self.eps, self.last = eps, name
                self.calls.append(Call("norm", name, eps=eps))
                return self._make("norm", func(*args, **kwargs))
        elif func is F.gelu:
            return self._make("gelu", func(*args, **kwargs))
        elif func in CONVOLUTIONS:
            if name := self.names.get(id(convolution_weight(*args, **kwargs))):
                self.last = name
                self.calls.append(Call("conv", name))
        elif func is F.scaled_dot_product_attention:
            self.made = "", None, 0
            kind = "attend" if plain_attention(*args, **kwargs) else "masked"
            query, *_ = attention_inputs(*args, **kwargs)
            self.calls.append(Call(kind, self.last, (query.shape[-3], query.shape[-1])))
        return func(*args, **kwargs)

    def _make(self, kind: str, out: Tensor) -> Tensor:
        self.made = kind, out, out._version
        return out


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those of a call of F.linear."""
    return input, weight, bias


def norm_arguments(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """Those of a call of F.layer_norm."""
    return input, weight, bias, eps


def convolution_weight(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    """That of a call of one of CONVOLUTIONS."""
    return weight


def attention_inputs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a call of F.scaled_dot_product_attention."""
    return query, key, value


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v of a call of F.scaled_dot_product_attention that is softmax(q k^T / sqrt d) v and no more, of as many
    heads of one width in all three, else None."""
    other = attn_mask is not None or dropout_p or is_causal or enable_gqa or query.dim() != 4
    other = other or key.shape != value.shape or key.shape[:2] != query.shape[:2]
    own_scale = scale is not None and scale != query.shape[-1] ** -0.5
    return None if other or own_scale else (query, key, value)


def blocks(module: nn.Module) -> str:
    """The name of the module's longest list of modules of one class; "" if there is none."""
    found = {
        name: len(children)
        for name, children in module.named_modules()
        if isinstance(children, nn.ModuleList | nn.Sequential) and len({type(child) for child in children}) == 1
    }
    return max(found, key=lambda name: found[name], default="")


def places(calls: Sequence[Call], prefix: str, image: int, channels: int, classes: int) -> dict[str, Place]:
    """The place of every map and norm by the name of its parameter. prefix: of the blocks, see `blocks`."""
    repeated = _repeated(calls)
    calls = [call._replace(of="") if call.name in repeated else call for call in calls]
    inside = [(_block(call.name, prefix), call) for call in calls]
    roles: dict[str, tuple[int | None, str]] = {}
    ends: dict[str, str] = {}
    for number in dict.fromkeys(block for block, _ in inside):
        own = [call for block, call in inside if block == number]
        ends |= {} if number is None else _ends(own)
        roles |= {name: (number, role) for name, role in (_outside if number is None else _within)(own, prefix).items()}
    numbers = {block for block, _ in inside if block is not None}
    sized = {role: call.sizes for call in calls for _, role in [roles[call.name]] if call.kind == "linear"}
    attentions = [call.sizes for block, call in inside if block is not None and call.kind in ("attend", "masked")]
    heads, each = max(attentions, default=(1, 0))
    shape = Shape(
        *(image, channels, classes),
        width=sized.get("attn.qkv", (heads * each,))[0],
        depth=len(numbers),
        heads=heads,
        mlp=sized.get("mlp.fc1", (0, 0))[1],
    )
    return {
        call.name: Place(call.kind, *roles[call.name], shape._replace(eps=call.eps), ends.get(call.name, ""), call.of)
        for call in calls
        if call.kind in READ
    }


def shape_of(found: Mapping[str, Place]) -> Shape:
    """The shape that all places share."""
    return next(iter(found.values())).config


def reached(calls: Sequence[Call], prefix: str) -> Counter[str]:
    """How many calls of each kind there are: of attentions those within blocks."""
    attentions = [c.kind for c in calls if c.kind in ("attend", "masked") and _block(c.name, prefix) is not None]
    return Counter(attentions + [c.kind for c in calls if c.kind in ("linear", "norm")])


def _block(name: str, prefix: str) -> int | None:
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) if prefix else None
    return int(match[1]) if match else None


def _outside(calls: Sequence[Call], prefix: str) -> dict[str, str]:
    roles = {call.name: call.name for call in calls}
    norms, maps = ([call for call in calls if call.kind == kind] for kind in ("norm", "linear"))
    roles |= {call.name: "norm" for call in norms[-1:]}
    roles |= {call.name: f"head.{call.name}" for call in maps if call.sizes == maps[-1].sizes}  # several heads
    return roles | {call.name: "head" for call in maps[-1:]}


def _within(calls: Sequence[Call], prefix: str) -> dict[str, str]:
    short = {call.name: re.sub(rf"^{re.escape(prefix)}\.\d+\.", "", call.name) for call in calls}
    # What is named like a map of ours, and may read something else, keeps its whole name.
    roles = {name: name if rest in ("attn.qkv", "mlp.fc1", "mlp.fc2") else rest for name, rest in short.items()}
    attention = _attention(calls)
    if attention is None:
        return roles
    maps = [(i, call) for i, call in enumerate(calls) if call.kind in MAPS]
    norms = [(i, call.name) for i, call in enumerate(calls) if call.kind == "norm"]
    after = [(i, call) for i, call in maps if i > attention]
    roles |= {call.name: "attn.qkv" for i, call in maps if i < attention and call.of == "norm"}
    roles |= {name: "norm1" for i, name in norms[:1] if maps and i < maps[0][0]}
    roles |= {call.name: "attn.proj" for _, call in after[:1] if call.kind == "linear"}
    roles |= {call.name: "mlp.fc1" for _, call in after[1:] if call.of == "norm"}
    roles |= {call.name: "mlp.fc2" for _, call in after[2:][-1:] if call.of == "gelu"}
    if len(after) > 1:
        roles |= {name: "norm2" for i, name in norms if after[0][0] < i < after[1][0]}
    return roles | {name: name for name in _repeated(calls)}


def _repeated(calls: Sequence[Call]) -> set[str]:
    """Of what is called more than once."""
    counts = Counter(call.name for call in calls if call.kind in READ)
    return {name for name, count in counts.items() if count > 1}


def _attention(calls: Sequence[Call]) -> int | None:
    return next((i for i, call in enumerate(calls) if call.kind in ("attend", "masked")), None)


def _ends(calls: Sequence[Call]) -> dict[str, str]:
    """The branches of a block by their last maps: the first one after the attention, and the last of all."""
    attention, repeated = _attention(calls), _repeated(calls)
    after = [call.name for call in calls[attention:] if call.kind in MAPS and attention is not None]
    ends = {after[-1]: "mlp", after[0]: "attention"} if after else {}
    return {name: branch for name, branch in ends.items() if name not in repeated}


def ours(names: Iterable[str], found: Mapping[str, Place], prefix: str) -> dict[str, str]:
    """Parameters by their names in our own ViT, as far as these are of one parameter alone."""
    roles = Counter((place.block, place.role) for place in found.values())
    out = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        block, place = _block(name, prefix), found.get(layer)
        single = place is not None and roles[place.block, place.role] == 1
        rest = f"{place.role}.{kind}" if place and single else name.removeprefix(f"{prefix}.{block}.")
        out[name] = rest if block is None else f"blocks.{block}.{rest}"
    return out
