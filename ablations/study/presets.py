"""The presets: a recipe a question, each a default of run.py."""

from dataclasses import replace

from ablations.study.arms import BASELINE
from ablations.study.recipes import Recipe

_QUICK = Recipe(image=16, width=32, depth=2, mlp=128, epochs=8, learning_rate=5e-3, clip=0.3)
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
_MIXED = ("mrt.tokens=64", "mrt.min_patch=16", "mrt.max_patch=64", "mrt.image=256")
_PUBLISHED = replace(
    _MATCHED,
    baseline_width=384,
    baseline_heads=6,
    schedule="constant",
    warmup=0.0,
    set=(*_MATCHED.set, *_MIXED, "mrt.scorer=features", "mrt.patch_norm=False"),
)
_MATCHED_256 = replace(_MATCHED, set=(*_MATCHED.set, *_MIXED, "uniform.patch=16", "uniform.image=256"))
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
    "quick": "27,000 parameters on digits, five seeds, minutes on a CPU; the default without an accelerator",
    "matched": "the published study with one model for all arms, cosine schedule; the default on a GPU",
    "matched-256": "matched, images resized to 256: --arms mrt,uniform compares 64 mixed tokens with all 256",
    "published": "the published study as it was: a baseline of 12.0 M parameters against arms of 4.2 M",
    "finetune": "the published study of column-row sampling: a pretrained ViT-B/16 on CIFAR-10, 8 epochs",
    "pretrain": "the same model from scratch: its best.safetensors is what finetune --weights takes",
}
ARMS = {"published": "published", "finetune": "finetune", "pretrain": BASELINE}  # unless given; of the others: all
SEEDS = {"quick": 5}  # unless given; of the others: 1
