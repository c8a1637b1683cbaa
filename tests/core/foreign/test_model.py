"""Modules of timm, Hugging Face and one's own under the transforms, against the modules themselves, in float64."""

import pytest
import torch
from foreign import CLASSES, IMAGE, MRT, batch_of, cosine, distance, moved, run
from torch.func import functional_call

from ablations.study.arms import parse
from core import engine, model, rng, vit
from core.account.step import account
from core.errors import InputError
from core.foreign import places, sources
from core.foreign.model import trained
from core.layers import EXACT, MAPS
from core.optimizers import AdamW
from core.step import start

TIMM = (
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_small_patch16_rope_224",
)
NAMES = (*(f"timm:{name}" for name in TIMM), "hf:vit", "hf:dinov2", "hand_written")


@pytest.fixture
def load(request, monkeypatch):
    """The model of a name, those of timm small."""
    import timm

    small = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options, **small))
    sources.load.cache_clear()

    def loaded(name, image=None):
        image = image or (32 if "16" in name else IMAGE)
        if name.startswith("hf:"):
            name = f"hf:{request.getfixturevalue('hugging_face') / name[3:]}"
        if name in ("hand_written", "post_norm"):
            name = request.getfixturevalue(name)
        return sources.load(name, image, 3, CLASSES)

    yield loaded
    sources.load.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_without_transforms_it_is_the_module_bit_for_bit(load, name):
    config = load(name)
    own = config.build(0).double()
    own.load_state_dict(moved(config, EXACT), strict=False)
    images, labels = batch_of(config)
    output = own(images)
    expected = torch.nn.functional.cross_entropy(getattr(output, "logits", output), labels)
    expected.backward()
    value, _, gradients = run(config)
    assert value.item() == expected.item()
    for n, p in own.named_parameters():
        if p.requires_grad:
            assert torch.equal(gradients.pop(n), torch.zeros_like(p) if p.grad is None else p.grad), n
    assert not gradients


@pytest.mark.parametrize("name", NAMES)
def test_the_transforms_keep_their_contracts(load, name):
    config = load(name)
    value, _, exact = run(config)
    for arm in ("recompute", "flash", "flash+recompute"):
        if "flash" in arm and config.reached["masked"]:
            with pytest.raises(InputError, match="flash changes the model's attend, .* with a mask"):
                run(config, arm)
            continue
        other, _, gradients = run(config, arm)
        assert other.item() == pytest.approx(value.item(), rel=1e-12)
        assert distance(gradients, exact) < 1e-9
    other, aux, gradients = run(config, "decatt")
    assert aux.penalty.item() > 1e-3
    assert other.item() == pytest.approx(value.item() + aux.penalty.item(), rel=1e-12)
    assert distance(gradients, exact) > 1e-6
    unbiased(config, "crs@0.5", value, exact)
    unbiased(config, "int8", value, exact)
    other, _, gradients = run(config, "lowbp")
    assert other.item() == pytest.approx(value.item(), rel=1e-12)
    if any(place.role == "mlp.fc2" for place in config.places.values()):
        assert distance(gradients, exact) > 1e-6
        assert cosine(gradients, exact) > 0.7  # of unrelated ones it is 0
    else:  # a gated MLP, whose activation is left as it is
        assert distance(gradients, exact) < 1e-9


def unbiased(config, arm, value, exact):
    """The same loss, and in the mean the same gradients of the maps, the others exactly."""
    draws = [run(config, arm, key=k) for k in range(40)]
    assert all(draw[0].item() == pytest.approx(value.item(), rel=1e-12) for draw in draws)
    estimated = {n for n in exact if any(not torch.equal(draw[2][n], draws[0][2][n]) for draw in draws)}
    maps = {f"{n}.weight": place.block for n, place in config.places.items() if place.role in MAPS}
    first = {n for n, block in maps.items() if block == 0}  # where the class token pools, only its rows count later
    assert first <= estimated
    if arm != "int8":  # which rounds GELU's slopes too, so that noise travels on
        assert estimated <= {*maps}
    for n in exact:
        samples = torch.stack([draw[2][n] for draw in draws])
        error, expected = (samples.mean(0) - exact[n]).norm(), samples.var(0).sum().div(len(draws)).sqrt()
        assert error <= 4 * expected + 1e-9 * exact[n].norm() + 1e-12, n


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


@pytest.mark.parametrize(("name", "maps", "norms", "attentions"), [("hf:vit", 19, 7, 3), ("hand_written", 9, 4, 2)])
def test_what_is_reached(load, name, maps, norms, attentions):
    assert load(name).reached == {"linear": maps, "norm": norms, "attend": attentions}


@pytest.mark.parametrize("name", ["timm:eva02_tiny_patch14_224", "hf:vit", "hand_written"])
def test_recompute_keeps_less(load, name):
    """What LayerNorm and GELU give is kept by the module and not under recompute."""
    config, kept = load(name), {}
    for arm in ("baseline", "recompute"):
        ops, seen = model.fit(parse(arm).ops, config), {}
        params = {n: p.requires_grad_() for n, p in moved(config, ops).items()}
        outside = {p.untyped_storage().data_ptr() for p in params.values()}

        def pack(tensor, outside=outside, seen=seen):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in outside:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        images, _ = batch_of(config)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.bind(config, ops)(params, images, None)
        kept[arm] = sum(seen.values())
        del output
    assert kept["recompute"] < 0.95 * kept["baseline"]


def test_draws_belong_to_names(load):
    """Another transform beside it moves no draw: the penalty has no part in the last MLP's gradients."""
    config = load("hand_written")
    exact, alone, beside = (run(config, arm)[2] for arm in ("baseline", "crs@0.5", "crs@0.5+decatt"))
    for name in ("layers.1.up.weight", "layers.1.down.weight"):
        assert torch.equal(beside[name], alone[name])
        assert not torch.equal(exact[name], alone[name])
    assert not torch.equal(beside["layers.0.up.weight"], alone["layers.0.up.weight"])


def test_bfloat16(load):
    for name in ("timm:eva02_tiny_patch14_224", "hf:dinov2", "hand_written"):
        config = load(name)
        params = {n: p.float() for n, p in moved(config, EXACT).items()}
        logits = model.bind(config, EXACT, torch.bfloat16)(params, batch_of(config, torch.float32)[0], None).logits
        exact = model.bind(config, EXACT)(params, batch_of(config, torch.float32)[0], None).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - exact).abs().max() < 0.1


def test_the_state_dict_goes_back_into_the_module(load):
    config = load("hand_written")
    params = model.init(config, 3)
    other = config.build(0)
    other.load_state_dict(model.state_dict(config, params))
    images, _ = batch_of(config, torch.float32)
    assert torch.equal(other(images), functional_call(config.build(1), params, (images,)))
    assert "scale" not in params
    assert not torch.equal(params["answer.weight"], trained(config.build(0))["answer.weight"])


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "hf:vit", "hand_written"])
@pytest.mark.parametrize("arm", ["baseline", "crs@0.5+decatt+flash", "recompute", "droppath", "readout"])
def test_one_graph(load, name, arm):
    """Compiled without a break, with the eager numbers."""
    config, graphs = load(name), []
    if arm not in TAKE[name] and arm == "readout":
        return

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    value, _, gradients = run(
        config, arm, wrap=lambda loss: torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)
    )
    expected, _, exact = run(config, arm)
    assert len(graphs) == 1
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert distance(gradients, exact) < 1e-9


@pytest.mark.parametrize("arm", ["baseline", "mrt+readout+droppath"])
def test_compiled_steps_are_the_eager_ones(load, arm):
    """In float32: torch 2.11 miscompiles fused attention in float64 on a CPU."""
    config, losses = load("timm:vit_tiny_patch16_224", 64), {}
    ops, batch = model.fit(parse(arm, MRT).ops, config), batch_of(config, torch.float32)
    for how in ("eager", "compiled"):
        torch._dynamo.reset()
        step = engine.build(config, ops, lambda images, key: images, torch.float32, AdamW(1e-2), how)
        state = start({n: p.float() for n, p in moved(config, ops).items()}, AdamW(1e-2), rng.key(3), ops)
        losses[how] = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses[how].append(metrics.loss.item())
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["eager"][2] < 0.99 * losses["eager"][0]
