import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from core import rng, vit
from core.layers import EXACT
from core.ops import rewrite
from core.optimizers import AdamW
from core.step import make_step, objective, start, value_and_grad


def keep(images, key):
    return images


def double(params):
    return {n: p.double() for n, p in params.items()}


def test_five_steps_equal_a_plain_training_loop(config, batch):
    """timm's model, autograd and torch.optim.AdamW in float64, against the pure step."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2
    ).double()
    params, (images, labels) = double(vit.init(config, 3)), (batch[0].double(), batch[1])
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1)
    ours = AdamW(1e-2, 0.1)
    step, state = make_step(objective(config, EXACT, keep, torch.float64), ours), start(params, ours, rng.key(0))
    for _ in range(5):
        state, metrics = step(state, (images, labels))
        loss = F.cross_entropy(functional_call(model, theirs, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert metrics.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for name, p in theirs.items():
        # The gradient of the keys' bias is zero: Adam turns its rounding errors into moves of up to rate / eps times.
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-9, atol=1e-9)


def test_step_is_pure(config, batch):
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5, dropout=0.3)
    step = make_step(objective(config, EXACT, keep), AdamW())
    state = start(vit.init(config, 0), AdamW(), rng.key(0))
    before = [t.clone() for t in tree_leaves(state)]
    first, metrics = step(state, batch)
    again, metrics_again = step(state, batch)
    assert metrics == metrics_again
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(first), tree_leaves(again), strict=True))
    assert all(torch.equal(t, kept) for t, kept in zip(tree_leaves(state), before, strict=True))
    assert not any(t.requires_grad for t in tree_leaves(first))
    assert step(first, batch)[0].step == 2
    _, later = step(state._replace(step=state.step + 1), batch)  # another step draws another dropout
    assert later.loss != metrics.loss


def test_unused_parameters_get_zero_gradients():
    params = {"used": torch.ones(2), "unused": torch.ones(3)}

    def fn(p):
        loss = p["used"].sum()
        return loss, torch.stack([loss.detach()] * 3)

    _, _, gradients = value_and_grad(fn)(params)
    assert gradients["unused"].tolist() == [0, 0, 0]


def test_frozen_parameters_have_no_gradient_no_moments_and_stay(config, batch):
    ops = rewrite("embedding stays", frozen=lambda name: name.startswith("patch_embed"))(EXACT)
    loss = objective(config, ops, keep)
    state = start(vit.init(config, 0), AdamW(), rng.key(0), ops)
    after, _ = make_step(loss, AdamW(), ops)(state, batch)
    frozen = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    trained = state.params.keys() - frozen
    _, _, gradients = value_and_grad(loss, ops.frozen)(state.params, batch, state.key)
    _, _, exact = value_and_grad(objective(config, EXACT, keep))(state.params, batch, state.key)
    assert gradients.keys() == after.optimizer.mean.keys() == after.optimizer.square.keys() == trained
    assert all(torch.equal(gradients[n], exact[n]) for n in trained)
    assert list(after.params) == list(state.params)
    assert {n for n, p in after.params.items() if torch.equal(p, state.params[n])} == frozen


def test_a_transform_changes_the_optimizer(config, batch):
    """State and update, as if the changed optimizer had been given."""
    faster = rewrite("faster", optimizer=lambda inner: AdamW(2 * inner.learning_rate, eps=0.5))(EXACT)
    ends = []
    for ops, optimizer in ((faster, AdamW(1e-2)), (EXACT, AdamW(2e-2, eps=0.5))):
        state = start(vit.init(config, 0), optimizer, rng.key(0), ops)
        ends.append(make_step(objective(config, ops, keep), optimizer, ops)(state, batch))
    for mine, other in zip(*map(tree_leaves, ends), strict=True):
        assert torch.equal(mine, other)


def test_low_precision_leaves_norms_alone(config, batch):
    """Maps, class token and positions compute in bfloat16, LayerNorms with float32 weights."""
    linear, norms, tokens = set(), set(), set()

    def look(inner, site, before, *inputs):
        y = inner(site, before, *inputs)
        linear.add((before(*inputs).dtype, y.dtype))
        return y

    def norm(inner, site, x, weight, bias):
        y = inner(site, x, weight, bias)
        norms.add((x.dtype, weight.dtype, bias.dtype, y.dtype))
        return y

    def tokenize(inner, site, images):
        tokens.add((y := inner(site, images)).dtype)
        return y

    ops = rewrite("look", wrap={"linear": look, "norm": norm, "tokenize": tokenize})(EXACT)
    low = torch.bfloat16
    output = vit.forward(vit.init(config, 0), batch[0], config, ops, dtype=low)
    assert linear == {(low, low)}
    assert norms == {(low, torch.float32, torch.float32, low)}
    assert tokens == {low}
    assert output.logits.dtype == low


def test_bf16_step_keeps_float32_masters(config, batch):
    loss = objective(config, EXACT, keep, torch.bfloat16)
    state = start(vit.init(config, 0), AdamW(), rng.key(0))
    exact = make_step(objective(config, EXACT, keep), AdamW())(state, batch)[1]
    after, metrics = make_step(loss, AdamW())(state, batch)
    assert {t.dtype for t in tree_leaves((after.params, after.optimizer))} == {torch.float32}
    assert metrics.loss.dtype == torch.float32
    assert metrics.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)
