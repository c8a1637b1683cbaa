"""What a cell starts from: parameters drawn by its seed, or pretrained weights with a fresh head."""

from dataclasses import replace

from ablations.study.arms import Arm
from ablations.study.recipes import Recipe
from core import model
from core.data.splits import Data
from core.errors import InputError
from core.foreign.model import Foreign
from core.ops import Params
from core.weights import pretrained


def resolve(recipe: Recipe) -> Recipe:
    """With LayerNorm's epsilon as the weights have it; InputError for weights that are not to be had, or whose shape
    is not the recipe's."""
    if recipe.weights is None:
        return recipe
    if recipe.baseline_width is not None or recipe.baseline_heads is not None:
        raise InputError(
            "weights are those of one model, and the recipe's baseline is another; pass --baseline-width None "
            "--baseline-heads None too, or --preset matched"
        )
    source = pretrained.load(recipe.weights)
    if wanted := source.differences(vars(recipe)):
        theirs, ours = (", ".join(f"{name} {of[name]}" for name in wanted) for of in (wanted, vars(recipe)))
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wanted.items())
        plain = "heads" in wanted and recipe.weights.endswith(".safetensors")  # which may not tell its heads
        other = f", or --weights {recipe.weights}@heads=N if its heads are others" if plain else ""
        raise InputError(f"weights '{recipe.weights}' have {theirs}, the model has {ours}; pass {flags}{other}")
    return replace(recipe, eps=source.shape.get("eps") if recipe.eps is None else recipe.eps)


def normalise(recipe: Recipe, data: Data) -> Data:
    """The data with the statistics that the weights' own images were normalised by, where these are known."""
    source = pretrained.load(recipe.weights) if recipe.weights else None
    return replace(data, mean=source.mean, std=source.std) if source and source.mean and source.std else data


def initial(recipe: Recipe, arm: Arm, data: Data, seed: int) -> Params:
    """Parameters by the seed, on the CPU; with weights, all but the head are these, the same for every seed.

    Raises InputError for an arm whose transforms ask for a model that the weights are not of.
    """
    config = recipe.config(arm, data)
    params = model.init(config, seed, model.fit(arm.ops, config))
    if recipe.weights is None or isinstance(config, Foreign):
        return params
    source = pretrained.load(recipe.weights)
    if wanted := source.differences(vars(config)):
        pairs = ", ".join(f"{name} {vars(config)[name]} (the weights: {value})" for name, value in wanted.items())
        patch = recipe.patch_of(data.image)
        raise InputError(
            f"its transforms ask for a model of {pairs}; give them other values, such as --set "
            f"mrt.min_patch={patch} mrt.max_patch={4 * patch}, or leave the arm out"
        )
    return pretrained.fit(source, params, config, arm.ops)
