"""What a module must be: a function of images and parameters, the same in training and again."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from core.errors import InputError, said
from core.foreign.model import constants
from core.foreign.places import Watch


def refuse(name: str, module: nn.Module, image: tuple[int, int, int], classes: int, watch: Watch) -> None:
    """InputError, by name, for a module that is none. Under `watch` two images [C,H,W] go through it."""
    _refuse_parameters(name, module)
    try:
        inputs = needed(module.forward)
    except ValueError as error:
        raise InputError(f"model '{name}' is not written in Python ({said(error)}); pass one that is") from error
    if len(inputs) > 1:
        raise InputError(f"model '{name}' needs {', '.join(inputs)}; its forward may need the images alone")
    images = torch.linspace(-1, 1, 2 * image[0] * image[1] * image[2]).view(2, *image)
    before = _state(module)
    try:
        with torch.no_grad(), watch:
            output = module(images.clone())
        with torch.no_grad():
            singly = [module(image[None].clone()) for image in images]
            same = module(images.clone())
        module.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            again = functional_call(module, dict(module.named_parameters()), (images.clone(),))
        module.eval()
    except (Exception, SystemExit) as error:
        sizes = " x ".join(map(str, image))
        raise InputError(
            f"model '{name}' does not take images of {sizes} ({said(error)}); {_sizes(module, image[-1])}"
        ) from error
    logits = _logits(name, output, classes)
    _refuse_state(name, module, before)
    if not logits.equal(_logits(name, same, classes)):
        raise InputError(f"model '{name}' gives other logits of the same images each time; take out what it draws")
    alone = torch.cat([_logits(name, one, classes, count=1) for one in singly])
    if not torch.allclose(alone, logits, rtol=1e-3, atol=1e-4):
        raise InputError(
            f"model '{name}' gives an image other logits beside another one than alone; compute each from itself"
        )
    again = _logits(name, again, classes)
    if not again.requires_grad:
        raise InputError(f"model '{name}' gives logits without a gradient; take out what detaches them (no_grad, long)")
    _refuse_randomness(name, module, logits, again)


def refuse_draws(name: str, module: nn.Module, again: Callable[[], nn.Module]) -> None:
    """InputError for a module that is built otherwise with another seed, and for what is not trained and is another in
    that: all seeds compute with one."""
    anew = again()
    shapes, others = ({(n, p.shape) for n, p in m.named_parameters()} for m in (module, anew))
    if differing := sorted({n for n, _ in shapes ^ others}):
        raise InputError(f"model '{name}' is built otherwise each time, in {_some(differing)}; build it alike")
    held, other = constants(module), constants(anew)
    if drawn := [n for n, t in held.items() if not torch.equal(t, other[n])]:
        raise InputError(
            f"model '{name}' draws {_some(drawn)} at random and does not train it, so that every seed would have the "
            "first one's; draw it from a torch.Generator with a seed of its own, or train it"
        )


def needed(function: Callable[..., Any]) -> list[str]:
    """The arguments without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken = inspect.signature(function).parameters.values()
    return [p.name for p in taken if p.default is p.empty and p.kind not in kinds]


def _refuse_parameters(name: str, module: nn.Module) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for what, wrong in (
        ("no size yet", [n for n, t in tensors.items() if is_lazy(t)]),
        ("no values", [n for n, t in tensors.items() if t.is_meta]),
        ("complex values", [n for n, t in tensors.items() if t.is_complex()]),
    ):
        if wrong:
            raise InputError(f"model '{name}' has {what} in {_some(wrong)}; build it of real numbers")
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError(f"model '{name}' has no parameter that requires a gradient; nothing could be trained")


def _logits(name: str, output: Any, classes: int, count: int = 2) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"model '{name}' returns {type(output).__name__}; its forward may return logits [{count}, {classes}] "
            f"for {count} images, or what has them as .logits"
        )
    if found.shape != (count, classes):
        raise InputError(
            f"model '{name}' gives {list(found.shape)} for {count} images, not logits [{count}, {classes}]; give it "
            f"{classes} classes"
        )
    if not found.isfinite().all():
        raise InputError(f"model '{name}' gives logits that are NaN or infinite, of images between -1 and 1; mend it")
    return found


def _state(module: nn.Module) -> dict[str, Tensor | float]:
    """What a module computes with: parameters, buffers, and the numbers and tensors that are its attributes."""
    own = {f"{n}.{k}".lstrip("."): v for n, m in module.named_modules() for k, v in vars(m).items() if k != "training"}
    plain: dict[str, Tensor | float] = {n: v for n, v in own.items() if isinstance(v, int | float)}
    tensors = {n: v for n, v in own.items() if isinstance(v, Tensor)}
    tensors |= {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return plain | {n: t.detach().clone() for n, t in tensors.items()}


def _refuse_state(name: str, module: nn.Module, before: dict[str, Tensor | float]) -> None:
    after = _state(module)
    buffers = [n for n, _ in module.named_buffers() if n not in before]
    changed = buffers + [n for n, v in before.items() if not _equal(v, after.get(n))]
    statistics = [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if changed or statistics:
        raise InputError(
            f"model '{name}' has batch statistics or other state that a step changes ({_some(statistics or changed)}); "
            "use LayerNorm"
        )


def _equal(one: Tensor | float, other: Tensor | float | None) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return one == other


def _refuse_randomness(name: str, module: nn.Module, logits: Tensor, again: Tensor) -> None:
    if not torch.allclose(again, logits, rtol=1e-4, atol=1e-5):
        drops = [f"{n} {getattr(m, key):g}" for n, m in module.named_modules() for key in _RATES if _rate(m, key)]
        where = f" ({_some(drops)})" if drops else ""
        raise InputError(
            f"model '{name}' computes something else in training{where}: dropout, stochastic depth or a second head, "
            "which draw from torch's generator or change the loss; build it with these at zero"
        )


_RATES = ("p", "drop_prob")


def _rate(module: nn.Module, key: str) -> bool:
    value = getattr(module, key, None)
    return isinstance(value, int | float) and value > 0


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _sizes(module: nn.Module, given: int) -> str:
    found = getattr(getattr(module, "config", None), "image_size", None)
    found = found or getattr(getattr(module, "patch_embed", None), "img_size", None)
    side = found[0] if isinstance(found, list | tuple) else found
    return f"pass --image {side}" if side and side != given else "pass --image with a side that it takes"
