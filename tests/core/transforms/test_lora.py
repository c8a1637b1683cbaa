from dataclasses import replace

import pytest
import torch

from core import rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.step import objective, value_and_grad
from core.transforms.lora import lora

RANK = 3


def gradients(config, ops, params, batch):
    loss = objective(config, ops, lambda images, key: images, torch.float64)
    return value_and_grad(loss, ops.frozen)(params, (batch[0].double(), batch[1]), rng.key(1))


def test_it_is_the_model_of_the_merged_weights(config, batch):
    """Loss of W + B A; by the chain rule dB = dW A^T and dA = B^T dW."""
    ops = lora(RANK)(EXACT)
    params = {n: (p + 0.1 * rng.uniform(rng.named(rng.key(3), n), p.shape)).double() for n, p in
              vit.init(config, 0, ops).items()}  # fmt: skip
    updated = sorted({n.rpartition(".lora.")[0] for n in params if ".lora." in n})
    assert updated == [f"blocks.{i}.attn.{m}" for i in range(2) for m in ("proj", "qkv")]
    merged = {n: p for n, p in params.items() if ".lora." not in n}
    for n in updated:
        merged[f"{n}.weight"] = params[f"{n}.weight"] + params[f"{n}.lora.B"] @ params[f"{n}.lora.A"]
    value, _, ours = gradients(config, ops, params, batch)
    expected, _, whole = gradients(config, EXACT, merged, batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    trained = {"head.weight", "head.bias"} | {f"{n}.lora.{x}" for n in updated for x in "AB"}
    assert ours.keys() == trained
    for n in updated:
        dW = whole[f"{n}.weight"]
        assert torch.allclose(ours[f"{n}.lora.B"], dW @ params[f"{n}.lora.A"].mT, rtol=1e-9, atol=1e-12)
        assert torch.allclose(ours[f"{n}.lora.A"], params[f"{n}.lora.B"].mT @ dW, rtol=1e-9, atol=1e-12)


def test_the_first_loss_is_the_models_own(config, batch):
    params = vit.init(config, 0, lora()(EXACT))
    plain = vit.forward(vit.init(config, 0), batch[0], config).logits
    assert torch.equal(vit.forward(params, batch[0], config, lora()(EXACT)).logits, plain)


def test_state_work_and_bytes(config):
    """Two moments of what is trained alone; no weight gradient of the frozen maps, four small products a block, forward
    and twice backward; nothing is kept for the MLP's maps but GELU's input."""
    D, M, N, B, L = config.width, config.mlp, config.tokens, 4, config.depth
    few, all_ = account(config, lora(RANK)(EXACT), B), account(config, EXACT, B)
    added = L * RANK * (D + 3 * D + D + D)
    assert few.parameters - all_.parameters == added
    assert few.state_bytes - 4 * few.parameters == pytest.approx(2 * 4 * (added + config.classes * (D + 1)), abs=64)
    rows, first = 2 * B * N, 2 * B * N * (4 * D * D + 2 * D * M) * L
    attention, head = 4 * B * N * N * D * L, 2 * B * D * config.classes
    embedding = 2 * B * (N - 1) * 48 * D
    small = rows * added
    first_gradient = 2 * B * N * (3 * D * D + RANK * D)  # nothing before the first block is trained
    forward = first + attention + head + embedding + small
    backward = first + 2 * attention + 2 * head + 2 * small - first_gradient
    assert few.flops == forward + backward
    assert few.kept_bytes < all_.kept_bytes


@pytest.mark.parametrize(("rank", "message"), [(0, "lora rank 0 is too small"), (17, "above the model's width 16")])
def test_bad_ranks_are_refused(config, rank, message):
    with pytest.raises(InputError, match=message):
        vit.init(replace(config), 0, lora(rank)(EXACT))
