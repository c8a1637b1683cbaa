import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from timm.data import Mixup

from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.step import objective
from core.targets import Targets, beta


@pytest.fixture
def given():
    """Images, labels and logits, float64."""
    draws = rng.uniform(rng.key(2), (6, 3 * 4 * 4 + 5)).double()
    return draws[:, 5:].reshape(6, 3, 4, 4), torch.arange(6) % 5, 3 * draws[:, :5]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_equals_timms(given, smoothing, monkeypatch):
    """The same pairs lie at opposite ends of the batch there."""
    images, labels, logits = given
    share = beta(rng.uniform(rng.named(rng.key(5), "mixup"), (4,)), 0.8).item()
    monkeypatch.setattr(np.random, "beta", lambda *alphas: share if alphas == (0.8, 0.8) else None)
    order = torch.tensor([0, 2, 4, 5, 3, 1])
    theirs = Mixup(mixup_alpha=0.8, label_smoothing=smoothing, num_classes=5)
    expected, targets = theirs(images[order], labels[order])
    mixed, loss = Targets(0.8, smoothing)(images, labels, rng.key(5))
    torch.testing.assert_close(mixed[order], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(mixed, images, atol=1e-3)
    # timm's targets are float32
    torch.testing.assert_close(loss(logits), F.cross_entropy(logits[order], targets.double()), rtol=1e-6, atol=0)


def test_smoothing_equals_torchs(given):
    images, labels, logits = given
    same, loss = Targets(smoothing=0.3)(images, labels, rng.key(0))
    assert same is images
    soft = 0.7 * F.one_hot(labels, 5).double() + 0.3 / 5
    torch.testing.assert_close(loss(logits), -(soft * logits.log_softmax(-1)).sum(-1).mean(), rtol=1e-12, atol=0)
    assert loss(logits).item() == F.cross_entropy(logits, labels, label_smoothing=0.3).item()


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 20.0])
def test_shares_are_of_the_beta_distribution(alpha):
    """Both halves: those near 1 are told apart by their distance from it."""
    shares = beta(rng.uniform(rng.key(1), (4, 50_000)), alpha)
    low = shares[shares < 0.5]
    assert stats.kstest(low, lambda x: 2 * stats.beta.cdf(x, alpha, alpha)).pvalue > 1e-3
    assert abs(len(low) / 50_000 - 0.5) < 4 * 0.5 / 50_000**0.5


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_shares_at_the_ends(alpha):
    """One of both images, or half of each."""
    shares = beta(rng.uniform(rng.key(1), (4, 1000)), alpha)
    assert ((shares == 0.5) if alpha > 1 else (shares == 0) | (shares == 1)).all()


def test_a_step_learns_from_mixed_images(config, batch):
    """Its loss is the soft cross entropy of their logits; the next step draws another share."""
    params = {name: p.double() for name, p in vit.init(config, 0).items()}
    images, labels = batch[0].double(), batch[1]
    loss = objective(config, EXACT, lambda images, key: images, torch.float64, targets=Targets(0.8, 0.1))
    losses = []
    for count in (0, 1):
        key = rng.fold_in(rng.key(4), count)
        share = beta(rng.uniform(rng.named(rng.named(key, "data"), "mixup"), (4,)), 0.8)
        other = [1, 0, 3, 2, 5, 4]
        soft = share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(labels[other], 5)
        logits = vit.forward(params, share * images + (1 - share) * images[other], config).logits
        value, aux = loss(params, (images, labels), key)
        losses.append(value.item())
        assert value.item() == pytest.approx(F.cross_entropy(logits, soft, label_smoothing=0.1).item(), rel=1e-12)
        assert aux[2] == (logits.argmax(-1) == labels).sum()
    assert losses[0] != losses[1]


@pytest.mark.parametrize("options", [{"mixup": -1.0}, {"mixup": float("nan")}, {"smoothing": 1.0}, {"smoothing": -0.1}])
def test_bad_values_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"{name} {value}"):
        Targets(**options)
