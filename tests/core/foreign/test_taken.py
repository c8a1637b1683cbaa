"""Which transforms a module of others takes, which it refuses by name, and what those that it takes do, in float64."""

import pytest
import torch
from foreign import CLASSES, MRT, NAMES, distance, moved, run

from ablations.study.arms import parse
from core import model, rng, vit
from core.account.step import account
from core.errors import InputError
from core.foreign import places
from core.layers import EXACT, MAPS
from core.optimizers import AdamW

OF_OURS = (
    "droppath@0.5",
    "readout",
    "mrt",
    "uniform@16",
    "mrt+readout+droppath@0.5",
    "decatt+readout",
    "qknorm+readout",
)


@pytest.mark.parametrize("arm", OF_OURS)
def test_timms_vit_under_a_transform_is_ours(load, arm):
    """The same loss, draws included, and gradients of the same parameters."""
    config = load("timm:vit_tiny_patch16_224", 64)
    ours = vit.VitConfig(image=64, patch=16, width=24, depth=2, heads=2, mlp=96, classes=CLASSES)
    value, _, gradients = run(config, arm)
    expected, _, exact = run(config, arm, of=ours)
    plain, *_ = run(config)
    assert (value.item() == pytest.approx(plain.item(), rel=1e-12)) == (arm == "readout")
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert gradients.keys() == exact.keys()
    assert distance(gradients, exact) < 1e-9


TAKE = {  # which of these a model takes
    "timm:vit_tiny_patch16_224": {"droppath", "readout", "mrt"},
    "timm:deit3_small_patch16_224": {"droppath", "readout", "mrt"},
    "timm:vit_base_patch16_siglip_224": {"droppath"},
    "timm:eva02_tiny_patch14_224": {"droppath"},
    "timm:beit_base_patch16_224": {"droppath"},
    "timm:vit_small_patch16_rope_224": {"droppath", "readout"},
    "hf:vit": {"droppath", "readout"},
    "hf:dinov2": {"droppath"},
    "hand_written": {"droppath"},
    "post_norm": set(),
}


REFUSED = {
    "droppath": r"droppath changes the model's attention, .* \(its blocks are not x plus the branches",
    "readout": r"readout computes the last block for the class token alone, and .* reads other tokens too",
    "mrt": r"mrt changes the model's tokenize, .* positions and class token of timm's VisionTransformer\)",
    "budget": r"budget changes the model's mlp, which is not reached in .* \(recompute is\)",
    "registers": r"registers changes the model's tokenize, .* \(--model timm:vit_small_patch14_reg4_.* has its own\)",
    "layerscale": r"layerscale changes the model's attention, .*\(--model timm:deit3_small_patch16_224 has its own\)",
    "tome": r"tome changes the model's block, which is not reached in",
    "patchdrop": r"patchdrop changes the model's tokenize, which is not reached in",
}


@pytest.mark.parametrize("name", TAKE)
def test_what_is_taken_and_what_is_refused_by_name(load, name):
    config = load(name)
    for arm, message in REFUSED.items():
        if arm in TAKE[name]:
            model.fit(parse(arm, MRT).ops, config)
        else:
            with pytest.raises(InputError, match=f"{message}.*; leave it out, or use our own model"):
                model.fit(parse(arm, MRT).ops, config)
    if "mrt" in TAKE[name]:
        with pytest.raises(InputError, match="mrt wants patch=2, and .* has patch=16; .* --set mrt.min_patch=16 or"):
            model.fit(parse("mrt").ops, config)


@pytest.mark.parametrize("name", ["hf:vit", "hand_written", "timm:beit_base_patch16_224"])
def test_droppath_leaves_out_branches_of_some_images(load, name):
    """Of the last block, at rate 0.5, both of a quarter's, where the block is then what it was given; the first block
    has none left out; what is kept is twice the branch: of a block whose second branch is left out too."""
    config, seen = load(name), []
    ops, params = model.fit(parse("droppath@0.5").ops, config), moved(config, EXACT)
    block = [*config.module.get_submodule(places.blocks(config.module))][-1]
    hook = block.register_forward_hook(lambda block, args, output: seen.append((args[0], output)))
    images = (rng.uniform(rng.key(5), (64, 3, config.image, config.image)) * 2 - 1).double()
    forward = model.bind(config, ops)
    forward(params, images, rng.key(3))
    plain = forward(params, images, None).logits
    hook.remove()
    (x, y), (x_plain, y_plain) = seen
    left_out = (y == x).flatten(1).all(1)
    assert 5 < left_out.sum() < 30
    if config.depth == 2:
        assert torch.equal(x, x_plain)
        assert not (y == y_plain).flatten(1).all(1).any()
    assert torch.equal(plain, model.bind(config, EXACT)(params, images, None).logits)


def test_readout_saves_what_it_says(load):
    """FLOPs of the last block, gradients included: products of the others' queries, their projection and MLP; bytes."""
    config = load("timm:vit_tiny_patch16_224", 64)
    plain, alone = (account(config, model.fit(parse(arm).ops, config), 8) for arm in ("baseline", "readout"))
    B, N, D, M = 8, 17, 24, 96
    assert plain.flops - alone.flops == 3 * (2 * B * (N - 1) * D * (D + 2 * M) + 4 * B * (N - 1) * N * D)
    assert alone.kept_by_block["1"] < 0.5 * plain.kept_by_block["1"]
    assert alone.kept_by_block["0"] == plain.kept_by_block["0"]
    assert alone.kept_by_block["head"] < 0.1 * plain.kept_by_block["head"]


@pytest.mark.parametrize("name", NAMES)
def test_lora_and_muon_or_a_named_refusal(load, name):
    config = load(name)
    _, _, exact = run(config)
    if sum(place.role == "attn.qkv" for place in config.places.values()) > config.depth:
        with pytest.raises(InputError, match=r"lora brings blocks.0.attn.qkv.lora.A, .* no single map"):
            run(config, "lora")
    else:
        _, _, gradients = run(config, "lora")
        trained = {n for n in gradients if ".lora." in n or config.ours.get(n, n).startswith("head.")}
        assert len(gradients) == len(trained) > 4 * config.depth
    steps = {}
    for arm in ("baseline", "muon"):
        ops, params = model.fit(parse(arm).ops, config), moved(config, EXACT)
        optimizer = ops.optimizer(AdamW(1e-2))
        state, count = optimizer.init(params), torch.zeros((), dtype=torch.int64)
        steps[arm], _ = optimizer.update(params, exact, state, count)
    changed = {n for n in exact if not torch.equal(steps["muon"][n], steps["baseline"][n])}
    assert {f"{n}.weight" for n, p in config.places.items() if p.role in MAPS} <= changed
    assert changed == {n for n in exact if config.ours[n].startswith("blocks.") and exact[n].ndim == 2}
