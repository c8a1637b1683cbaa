"""Where a module comes from: timm, Hugging Face, or a function in a file."""

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import code, process
from core.errors import InputError, said
from core.foreign import checks
from core.foreign.model import Foreign, constants, trained
from core.foreign.places import Watch, blocks, ours, places, reached, shape_of

Build = Callable[[], nn.Module]
_AS: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": False}  # code of a folder is not run
WRITE = "write timm:NAME, hf:FOLDER or module:FILE.py:FUNCTION"


@lru_cache(maxsize=8)
@process.as_it_was()
def load(name: str, image: int, channels: int, classes: int, device: str = "cpu") -> Foreign:
    """The model that `name` means, for images [channels, image, image] and so many classes, its buffers on `device`.

    name: timm:NAME (timm:NAME@pretrained with the weights that timm fetches), hf:FOLDER (a config.json, with weights if
    they lie there; any other NAME is fetched) or module:FILE.py:FUNCTION, a function that returns an nn.Module and may
    take image, channels and classes. Raises InputError for a module that cannot be had or cannot be a pure function.
    """
    kind, _, rest = name.partition(":")
    if kind not in _SOURCES or not rest:
        raise InputError(f"unknown model '{name}'; {WRITE}")
    make = _SOURCES[kind](rest, {"image": image, "channels": channels, "classes": classes})

    def build(seed: int) -> nn.Module:
        with redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make().float().eval()

    return watched(name, build, image, channels, classes, device)


def pretrained(name: str) -> bool:
    """Whether a model comes with weights, as far as its name tells; a function of a file may do what it likes."""
    kind, _, rest = name.partition(":")
    if kind == "hf" and (folder := Path(rest)).is_dir():
        return any(folder.glob("*.safetensors"))
    return kind != "timm" or rest.endswith("@pretrained")


def watched(
    name: str, build: Callable[[int], nn.Module], image: int, channels: int, classes: int, device: str
) -> Foreign:
    """The model, once two images went through it."""
    module = build(0)
    watch = Watch({id(p): n.removesuffix(".weight") for n, p in module.named_parameters() if n.endswith(".weight")})
    checks.refuse(name, module, (channels, image, image), classes, watch)
    checks.refuse_draws(name, module, lambda: build(1))
    prefix = blocks(module)
    found = places(watch.calls, prefix, image, channels, classes)
    counts = reached(watch.calls, prefix)
    if not counts["linear"]:
        raise InputError(
            f"model '{name}' shows none of its linear maps: it calls no F.linear of a parameter of its own; nothing "
            "could be changed in it"
        )
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        module.to(device)
    own = ours(trained(module), found, prefix)
    return Foreign(name, shape_of(found), module, build, found, own, constants(module), counts)


def _timm(name: str, sizes: dict[str, int]) -> Build:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"model 'timm:{name}' needs timm; pip install timm") from error
    from difflib import get_close_matches

    base, at, weights = name.partition("@")
    if at and weights != "pretrained":
        raise InputError(f"model 'timm:{name}' ends in @{weights}; write timm:{base} or timm:{base}@pretrained")
    if not timm.is_model(base):
        close = get_close_matches(base, timm.list_models(), n=1)
        hint = f"; did you mean 'timm:{close[0]}'?" if close else ""
        raise InputError(f"timm has no model '{base}'{hint}")
    options: dict[str, Any] = {"pretrained": bool(at), "num_classes": sizes["classes"], "in_chans": sizes["channels"]}

    hint = f"fetch its weights where there is a network, pass timm:{base}, or another --image"

    def make() -> nn.Module:
        try:
            try:
                return timm.create_model(base, img_size=sizes["image"], **options)
            except TypeError:  # one that takes images of any size
                return timm.create_model(base, **options)
        except Exception as error:
            raise InputError(
                f"timm's '{name}' cannot be made for images of {sizes['image']} pixels ({said(error)}); "
                + (hint if at else "pass another --image")
            ) from error

    return make


def _hugging_face(name: str, sizes: dict[str, int]) -> Build:
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise InputError(f"model 'hf:{name}' needs transformers; pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(name, num_labels=sizes["classes"], trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"model 'hf:{name}' cannot be had ({said(error)}); pass a folder with a config.json, or a name that "
            "Hugging Face has"
        ) from error
    weights = pretrained(f"hf:{name}")
    if not weights and (unread := sorted(str(p.relative_to(name)) for p in Path(name).rglob("*") if _of_weights(p))):
        raise InputError(
            f"model 'hf:{name}' has its weights in {unread[0]}, and only safetensors beside config.json are read; "
            "write them with "
            f"AutoModelForImageClassification.from_pretrained('{name}').save_pretrained('{name}'), or move the file "
            "away to start from random values"
        )

    def make() -> nn.Module:
        try:
            if not weights:
                return AutoModelForImageClassification.from_config(config, **_AS)
            model, loaded = AutoModelForImageClassification.from_pretrained(
                name,
                config=config,
                **_AS,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise InputError(f"model 'hf:{name}' cannot be made ({said(error)}); choose another") from error
        shaped = {key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]}
        random = {*loaded["missing_keys"], *shaped}
        if lacking := sorted(n for n in random if n.startswith(f"{model.base_model_prefix}.")):  # not of the head
            raise InputError(
                f"the weights of model 'hf:{name}' lack {len(lacking)} of its tensors, such as {lacking[0]}, or have "
                "them in another shape than config.json says; choose another"
            )
        return model

    return make


def _of_weights(path: Path) -> bool:
    """Whether a file holds, or lists, weights."""
    return path.name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".safetensors", ".index.json"))


def _module(name: str, sizes: dict[str, int]) -> Build:
    file, colon, function = name.rpartition(":")
    if not colon:
        raise InputError(f"model 'module:{name}' names no function; write module:FILE.py:FUNCTION")
    build = getattr(code.run(file, f"model 'module:{name}'"), function, None)
    if not callable(build):
        raise InputError(f"'{file}' has no function '{function}'; write module:{file}:FUNCTION")
    taken = inspect.signature(build).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    options = {key: value for key, value in sizes.items() if every or key in taken}
    if needed := [key for key in checks.needed(build) if key not in sizes]:
        raise InputError(
            f"'{file}': {function} needs {', '.join(needed)}, and is given {', '.join(sizes)} alone; write defaults"
        )

    def make() -> nn.Module:
        try:
            return _a_module(name, build(**options))
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise InputError(f"'{file}': {function}({options}) raises {said(error)}; mend it") from error

    return make


def _a_module(name: str, made: Any) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise InputError(f"model 'module:{name}' gives no nn.Module but {type(made).__name__}; return one")
    return made


_SOURCES = {"timm": _timm, "hf": _hugging_face, "module": _module}
