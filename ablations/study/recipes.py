"""Recipes: everything a result depends on besides its arm and seed. Each value is an option of run.py."""

from dataclasses import dataclass, replace

import torch

from ablations.study.arms import AGAIN, BASELINE, PRECISIONS, Arm, parse
from core import engine
from core.account.step import account
from core.data.augment import preparation
from core.data.splits import Data
from core.errors import InputError, choose
from core.ops import EXACT
from core.step import DIFFERENTIATORS, AdamW, Prepare
from core.vit import VitConfig

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Recipe:
    """A preset's values."""

    data: str = "digits"
    """digits, cifar10, cifar100, cifar100-coarse, folder:PATH or folder:PATH@coarse; several, joined by commas: a study
    each, one after the other."""
    image: int | None = None
    """Side in pixels that images are resized to; None: as they are."""

    patch: int = 4
    """Patch side in pixels."""
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

    device: str = "auto"
    """auto, cpu or cuda."""
    engine: str = "auto"
    """auto, eager, compiled or graphed."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 on cuda, else fp32."""
    differentiator: str = "autograd"
    """autograd or func (torch.func)."""
    set: tuple[str, ...] = ()
    """Parameters of optimizations, added to the preset's: NAME.PARAMETER=VALUE, such as decatt.weight=10."""

    def resolve_machine(self) -> "Recipe":
        """With device, engine and precision decided; InputError for one that is unknown or not to be had."""
        choose("device", self.device, DEVICES)
        choose("precision", self.precision, ("auto", *PRECISIONS))
        choose("differentiator", self.differentiator, DIFFERENTIATORS)
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise InputError("device 'cuda' is not available here: pass --device cpu, or install a CUDA build of torch")
        device = ("cuda" if available else "cpu") if self.device == "auto" else self.device
        precision = ("bf16" if device == "cuda" else "fp32") if self.precision == "auto" else self.precision
        engine.resolve(self.engine, device)
        return replace(self, device=device, precision=precision)

    def resolve_engine(self, data: Data) -> tuple["Recipe", str]:
        """With the engine decided, and why: by the FLOPs of training a cell without any optimization."""
        flops = account(self.model(parse(BASELINE), data), EXACT, self.batch_size).flops
        steps = self.epochs * (len(data.train.labels) // self.batch_size)
        name, why = engine.resolve(self.engine, self.device, float(flops) * steps)
        return replace(self, engine=name), why

    def resolve_data(self, data: Data) -> "Recipe":
        """With image side and mirroring decided; InputError for sizes that do not fit the data."""
        count = len(data.train.labels)
        if self.epochs < 1:
            raise InputError(f"epochs {self.epochs} is too small: at least 1")
        if not 1 <= self.batch_size <= count:
            raise InputError(f"batch size {self.batch_size} does not fit the {count} training images: 1 to {count}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warm-up {self.warmup} is outside 0 to below 1: it is a share of the steps")
        return self.resolve_shape(data)

    def resolve_shape(self, data: Data) -> "Recipe":
        """With image side, mirroring and tokens decided, whatever the number of images."""
        flip = data.mirrors if self.flip is None else self.flip
        return replace(self, image=data.image, flip=flip, set=(*self._equal_tokens(data.image), *self.set))

    def _equal_tokens(self, image: int) -> tuple[str, ...]:
        """Settings that give `mrt` the baseline's number of tokens, from half its patch to twice it, and `uniform`
        its patch; for what the preset and the command line leave open."""
        if self.patch < 1:
            raise InputError(f"patch {self.patch} is too small: at least 1")
        same = (f"uniform.patch={self.patch}",)
        if self.patch % 2 or image % (2 * self.patch):
            return same
        tokens = (image // self.patch) ** 2
        return (*same, f"mrt.tokens={tokens}", f"mrt.min_patch={self.patch // 2}", f"mrt.max_patch={2 * self.patch}")

    def model(self, arm: Arm, data: Data) -> VitConfig:
        """The model of an arm: the recipe's, with what the arm's transforms ask for."""
        alone = arm.name in (BASELINE, AGAIN)
        own = VitConfig(
            image=data.image,
            patch=self.patch,
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
        return replace(own, **arm.shape)

    def dtype(self, arm: Arm) -> torch.dtype:
        """What an arm computes in; InputError for an arm that names the recipe's own precision."""
        if arm.precision == self.precision:
            raise InputError(
                f"{self.precision} is the precision of the whole study; leave it out, or pass another --precision"
            )
        return PRECISIONS[arm.precision or self.precision]

    def optimizer(self, steps_per_epoch: int) -> AdamW:
        """AdamW over the whole run."""
        steps = self.epochs * steps_per_epoch
        return AdamW(
            self.learning_rate,
            self.weight_decay,
            decay_all=self.decay_all,
            schedule=self.schedule,
            warmup=int(self.warmup * steps),
            steps=steps,
            clip=self.clip,
        )

    def prepare(self, data: Data) -> Prepare:
        """Augmentation and normalisation."""
        return preparation(data.mean, data.std, bool(self.flip), self.shift, self.rotate)


_QUICK = Recipe()
_MATCHED = Recipe(
    data="cifar10",
    width=192,
    depth=12,
    heads=3,
    mlp=512,
    dropout=0.1,
    patch_norm=True,
    head="mlp",
    epochs=50,
    batch_size=256,
    learning_rate=1e-3,
    weight_decay=1e-3,
    decay_all=True,
    flip=True,
    rotate=15.0,
    set=("decatt.weight=150", "decatt.norm=frobenius"),
)
_PUBLISHED = replace(
    _MATCHED,
    baseline_width=384,
    baseline_heads=6,
    schedule="constant",
    warmup=0.0,
    set=(
        *_MATCHED.set,
        "mrt.tokens=64",
        "mrt.min_patch=16",
        "mrt.max_patch=64",
        "mrt.scorer=features",
        "mrt.image=256",
        "mrt.patch_norm=False",
    ),
)
_MATCHED_256 = replace(
    _MATCHED,
    set=(
        *_MATCHED.set,
        "mrt.tokens=64",
        "mrt.min_patch=16",
        "mrt.max_patch=64",
        "mrt.image=256",
        "uniform.patch=16",
        "uniform.image=256",
    ),
)
_FINETUNE = Recipe(
    data="cifar10",
    image=224,
    patch=16,
    width=768,
    depth=12,
    heads=12,
    mlp=3072,
    weights="torchvision:vit_b_16",
    epochs=8,
    batch_size=64,
    learning_rate=3e-5,  # the write-ups give none
    weight_decay=0.01,
    clip=1.0,
    rotate=0.0,
    precision="fp32",
    set=("crs.scope=published",),
)
_PRETRAIN = replace(
    _FINETUNE,
    data="cifar100",
    weights=None,
    epochs=100,
    batch_size=128,
    learning_rate=5e-4,
    weight_decay=0.05,
    precision="auto",
    set=(),
)

PRESETS: dict[str, Recipe] = {
    "quick": _QUICK,
    "matched": _MATCHED,
    "matched-256": _MATCHED_256,
    "published": _PUBLISHED,
    "finetune": _FINETUNE,
    "pretrain": _PRETRAIN,
}
ABOUT: dict[str, str] = {
    "quick": "0.2 M parameters on digits, minutes on a CPU; the default without an accelerator",
    "matched": "the published study with one model for all arms, cosine schedule; the default on a GPU",
    "matched-256": "matched, images resized to 256: --arms mrt,uniform compares 64 mixed tokens with all 256",
    "published": "the published study as it was: a baseline of 12.0 M parameters against arms of 4.2 M",
    "finetune": "the published study of column-row sampling: a pretrained ViT-B/16 on CIFAR-10, 8 epochs",
    "pretrain": "the same model from scratch: its best.safetensors is what finetune --weights takes",
}
ARMS = {"published": "published", "finetune": "finetune", "pretrain": BASELINE}  # unless given; of the others: all
