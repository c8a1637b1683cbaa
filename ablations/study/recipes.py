"""Recipes: everything a result depends on besides its arm and seed. Each value is an option of run.py."""

from dataclasses import dataclass, replace

import torch

from ablations.study import processes
from ablations.study.arms import AGAIN, BASELINE, PRECISIONS, Arm, parse
from ablations.study.machine import named
from core import engine
from core.account.step import account
from core.data.augment import preparation
from core.data.splits import Data
from core.errors import InputError, choose, said, within
from core.foreign import sources
from core.layers import EXACT
from core.model import Config, asked
from core.optimizers import AdamW, Averaged, Clipped, Optimizer
from core.parallel import ALONE, Share, divided
from core.step import Prepare
from core.targets import Targets
from core.vit import VitConfig

EPOCHS = 1_000_000  # at most
SEEDS_MOST = 10_000
OURS = (  # fields of our own model alone
    *("patch", "width", "depth", "heads", "mlp", "dropout", "patch_norm", "head"),
    *("baseline_width", "baseline_heads", "eps", "weights"),
)

EQUAL = ("uniform.patch", "mrt.tokens", "mrt.min_patch", "mrt.max_patch")  # which a study's settings begin with


@dataclass(frozen=True)
class Recipe:
    """A preset's values."""

    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, cifar100-coarse, folder:PATH or folder:PATH@coarse; several,
    joined by commas: a study each, one after the other."""
    image: int | None = None
    """Side in pixels that images are resized to; None: as they are."""

    model: str | None = None
    """A model of others instead of our own: timm:NAME, hf:FOLDER (of Hugging Face), or module:FILE.py:FUNCTION, a
    function that returns an nn.Module. It decides what --patch to --weights below say of ours."""
    plugin: tuple[str, ...] = ()
    """Python files with optimizations and data sets of your own (docs/api.md); those of installed packages are there
    by themselves."""

    patch: int | None = None
    """Patch side in pixels; None: the smallest from 4 on that cuts the image into 4 to 14 squares a side (of 24 and 32
    pixels 4, of 64 and 96 8, of 224 16), else 4."""
    width: int = 64
    """Embedding width D."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    mlp: int = 256
    """Hidden width of the MLP."""
    dropout: float = 0.0
    """Dropout probability."""
    patch_norm: bool = False
    """LayerNorm after the patch embedding."""
    head: str = "linear"
    """linear, or mlp: Linear(D, D/2), GELU, dropout, Linear."""
    baseline_width: int | None = None
    """Width of the arm `baseline` alone; None: as the others."""
    baseline_heads: int | None = None
    """Heads of the arm `baseline` alone; None: as the others."""
    eps: float | None = None
    """Epsilon of every LayerNorm; None: that of the weights, else 1e-6."""
    weights: str | None = None
    """Pretrained weights to start from, all but the head: vit_b_16 (torchvision's), torchvision:NAME, timm:NAME,
    hf:NAME, or PATH.safetensors (a study's checkpoint, or a state dict of one of these); None: random ones. Positions
    are interpolated to the image's grid, and images normalised as the weights' were (where that is not known: by the
    data's own statistics). mrt and uniform have sinusoidal positions instead."""

    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 3e-3
    """AdamW's learning rate (peak)."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay."""
    decay_all: bool = False
    """Decay every parameter, not matrices only."""
    schedule: str = "cosine"
    """constant or cosine (to zero)."""
    warmup: float = 0.1
    """Share of the steps with a linear warm-up, 0 to below 1."""
    clip: float | None = None
    """Largest global norm of the gradients; None: any."""

    flip: bool | None = None
    """Mirror half of the images; None: if the data allows it (digits do not)."""
    shift: int = 0
    """Shift by up to this many pixels."""
    rotate: float = 5.0
    """Rotate by up to this many degrees."""
    crop: float | None = None
    """Resize a random box of at least this share of the image's area, 3:4 to 4:3, to the whole (RandomResizedCrop of
    torchvision and timm, whose default is 0.08); None: no box. It is taken of images as --image stores them."""
    mixup: float = 0.0
    """Mix each image and its label with another's, by a share of Beta(MIXUP, MIXUP) drawn each step (timm's mixup);
    0: none."""
    smoothing: float = 0.0
    """Label smoothing: the share of a target that all classes have equally."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is evaluated and kept instead of them (timm's
    ModelEmaV3; its usual value is 0.9998); None: none."""
    ema_warmup: bool = False
    """Let that decay grow from 0, after n steps 1 - n^(-2/3), up to its value."""

    device: str = "auto"
    """auto, cpu or cuda."""
    engine: str = "auto"
    """auto, eager, compiled or graphed."""
    regions: bool = True
    """Compile the blocks as one function, so that compiling does not grow with the depth; False where torch cannot."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on cuda, else fp32."""
    parallel: str | None = None
    """How the processes that torchrun started train a cell together: ddp (each has all parameters and its share of the
    batch) or fsdp (its share of the parameters too); None: one process."""
    processes: int | None = None
    """With --parallel: how many these are; None: as many as torchrun started. --plan accounts for any number."""
    set: tuple[str, ...] = ()
    """Parameters of optimizations, added to the preset's: NAME.PARAMETER=VALUE, such as decatt.weight=10."""

    def resolve_machine(self, present: bool = True) -> "Recipe":
        """With device and precision decided; InputError for a device, an engine or a precision that is unknown or not
        to be had.

        present: whether the device must be here.
        """
        choose("precision", self.precision, ("auto", *PRECISIONS))
        device = named(self.device, present)
        engine.resolve(self.engine, device)
        count = processes.count(self.parallel, self.processes, present)
        if self.parallel and self.engine == "graphed":
            raise InputError("engine 'graphed' is for one process; with --parallel pass --engine compiled or eager")
        precision = ("bf16" if device == "cuda" else "fp32") if self.precision == "auto" else self.precision
        return replace(self, device=device, precision=precision, processes=count)

    def resolve_data(self, data: Data) -> "Recipe":
        """With image side, mirroring and tokens decided; InputError for values that do not fit the data."""
        count = len(data.train.labels)
        within("epochs", self.epochs, 1, EPOCHS)
        if not 1 <= self.batch_size <= count:
            raise InputError(f"batch size {self.batch_size} does not fit the {count} training images: 1 to {count}")
        images = divided(self.batch_size, self.processes or 1)
        if self.mixup and images % 2:
            raise InputError(
                f"mixup {self.mixup} mixes images two by two, and a process has {images}; pass an even --batch-size"
            )
        if not 0 <= self.warmup < 1:
            raise InputError(f"warm-up {self.warmup} is outside 0 to below 1: it is a share of the steps")
        if not 0 <= self.shift < data.image:
            raise InputError(f"shift {self.shift} is outside 0 to below the image's {data.image} pixels")
        flip = data.mirrors if self.flip is None else self.flip
        settings = (*self._equal_tokens(data.image), *self.set)
        return replace(self, image=data.image, patch=self.patch_of(data.image), flip=flip, set=settings)

    def resolve_engine(self, data: Data) -> tuple["Recipe", str]:
        """With the engine decided, and why: by the FLOPs of training a cell without any optimization."""
        try:
            counted = account(self.config(parse(BASELINE), data), EXACT, self.batch_size)
        except RuntimeError as error:
            if self.model is None:
                raise
            raise InputError(
                f"model '{self.model}' cannot be counted without values ({said(error)}); take out what reads them, as "
                "item() does and an if of a tensor"
            ) from error
        steps = self.epochs * (len(data.train.labels) // self.batch_size)
        name, why = engine.resolve(self.engine, self.device, float(counted.flops) * steps)
        if self.parallel and name == "graphed":
            name, why = "compiled", "a captured step is for one process"
        return replace(self, engine=name), why

    def _equal_tokens(self, image: int) -> tuple[str, ...]:
        """Settings that give `mrt` the baseline's number of tokens, from half its patch to twice it, and `uniform`
        its patch; for what the preset and the command line leave open."""
        patch = self.patch_of(image)
        if patch < 1:
            raise InputError(f"patch {patch} is too small: at least 1")
        fits = patch % 2 == 0 and image % (2 * patch) == 0
        values = (patch, (image // patch) ** 2, patch // 2, 2 * patch)
        return tuple(f"{name}={value}" for name, value in zip(EQUAL, values, strict=True))[: None if fits else 1]

    def patch_of(self, image: int) -> int:
        """The patch for images of this side: the one that is given, or suits."""
        suited = (p for p in range(4, image // 4 + 1) if image % p == 0 and image // p <= 14)
        return next(suited, 4) if self.patch is None else self.patch

    def config(self, arm: Arm, data: Data) -> Config:
        """The model of an arm, with what its optimizations ask for."""
        return asked(self.plain_config(arm, data), arm.ops)

    def plain_config(self, arm: Arm, data: Data) -> Config:
        """The model of an arm without its optimizations."""
        if self.model is not None:
            sizes = data.image, data.train.images.shape[1], len(data.classes)
            return sources.load(self.model, *sizes, self.device)
        alone = arm.name in (BASELINE, AGAIN)
        return VitConfig(
            image=data.image,
            patch=self.patch_of(data.image),
            width=self.width if self.baseline_width is None or not alone else self.baseline_width,
            depth=self.depth,
            heads=self.heads if self.baseline_heads is None or not alone else self.baseline_heads,
            mlp=self.mlp,
            classes=len(data.classes),
            channels=data.train.images.shape[1],
            dropout=self.dropout,
            patch_norm=self.patch_norm,
            head=self.head,
            eps=1e-6 if self.eps is None else self.eps,
        )

    @property
    def files(self) -> tuple[str, ...]:
        """The user's Python files that it runs."""
        kind, _, rest = (self.model or "").partition(":")
        return (*self.plugin, rest.rpartition(":")[0]) if kind == "module" else self.plugin

    @property
    def terms(self) -> str:
        """What is done to the images: "of 64 pixels (patch 8, mixup 0.8)"."""
        names = ("patch", "crop", "mixup", "smoothing", "ema")[self.model is not None :]
        given = ", ".join(f"{name} {getattr(self, name):g}" for name in names if getattr(self, name))
        return f"of {self.image} pixels" + (f" ({given})" if given else "")

    def dtype(self, arm: Arm) -> torch.dtype:
        """What an arm computes in; InputError for an arm that names the recipe's own precision."""
        if arm.precision == self.precision:
            raise InputError(
                f"{self.precision} is the precision of the whole study; leave it out, or pass another --precision"
            )
        return PRECISIONS[choose("precision", arm.precision or self.precision, PRECISIONS)]

    def optimizer(self, steps_per_epoch: int, share: Share = ALONE) -> Optimizer:
        """AdamW over the whole run, and the average of the weights if there is one."""
        steps = self.epochs * steps_per_epoch
        adamw = AdamW(
            self.learning_rate,
            self.weight_decay,
            decay_all=self.decay_all,
            schedule=self.schedule,
            warmup=int(self.warmup * steps),
            steps=steps,
        )
        clipped = adamw if self.clip is None else Clipped(adamw, self.clip, share.norm)
        if self.ema is None and self.ema_warmup:
            raise InputError("ema_warmup is of an average of the weights, and there is none; pass --ema 0.9998 too")
        return clipped if self.ema is None else Averaged(clipped, self.ema, self.ema_warmup)

    @property
    def targets(self) -> Targets:
        """What of a batch is learned."""
        return Targets(self.mixup, self.smoothing)

    def prepare(self, data: Data, share: Share = ALONE) -> Prepare:
        """Augmentation and normalisation of a process's share of each batch."""
        return preparation(data.mean, data.std, bool(self.flip), self.shift, self.rotate, share, self.crop)
