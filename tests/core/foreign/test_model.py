"""Modules of timm, Hugging Face and one's own against the modules themselves, in float64."""

import pytest
import torch
from foreign import NAMES, batch_of, cosine, distance, moved, run
from torch.func import functional_call

from ablations.study.arms import parse
from core import model
from core.errors import InputError
from core.foreign.model import trained
from core.layers import EXACT, MAPS


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
