import pytest
import torch

from core import rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.optimizers import AdamW
from core.transforms.muon import Muon, muon, orthogonal

OPTIMIZER = muon()(EXACT).optimizer(AdamW(1e-3, 0.1))


def random(shape, name="x"):
    return (rng.uniform(rng.named(rng.key(4), name), shape) * 2 - 1).double()


def test_the_iteration_is_jordans():
    """His ten lines, in float64; singular values near 1 whatever they were, singular vectors kept."""
    for shape in ((6, 6), (4, 9), (9, 4)):
        G = random(shape, str(shape))
        X = G / G.norm()
        X = X.T if shape[0] > shape[1] else X
        for _ in range(5):
            A = X @ X.T
            B = -4.7750 * A + 2.0315 * A @ A
            X = 3.4445 * X + B @ X
        X = X.T if shape[0] > shape[1] else X
        ours = orthogonal(G)
        torch.testing.assert_close(ours, X, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(orthogonal(torch.stack((G, -G)))[1], -X, rtol=1e-12, atol=1e-12)
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        inner = U.T @ ours @ V.T
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-10
        assert (inner.diagonal() > 0.3).all()
        assert (inner.diagonal() < 1.3).all()


def test_updates_are_torchs(monkeypatch):
    """torch.optim.Muon, which goes through bfloat16: here in float64; q, k and v each for itself, the rest AdamW."""
    from torch.optim import _muon

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda g, *_: orthogonal(g))
    config = vit.VitConfig(16, 8, 16, 1, 2, 32, 5)
    params = {n: p.double() for n, p in vit.init(config, 0).items()}
    rest = {n: torch.nn.Parameter(p.clone()) for n, p in params.items() if not (n.startswith("b") and p.ndim == 2)}
    qkv = "blocks.0.attn.qkv.weight"
    mine = {n: [torch.nn.Parameter(part.clone()) for part in p.chunk(3 if n == qkv else 1)]
            for n, p in params.items() if n not in rest}  # fmt: skip
    theirs = torch.optim.Muon([p for parts in mine.values() for p in parts], lr=0.02, weight_decay=0.01)
    adamw = torch.optim.AdamW(rest.values(), lr=1e-3, weight_decay=0.1)
    state, count = OPTIMIZER.init(params), torch.tensor(0)
    for step in range(4):
        gradients = {n: random(p.shape, f"{n}{step}") for n, p in params.items()}
        for n, g in gradients.items():
            for p, part in zip(mine[n], g.chunk(len(mine[n])), strict=True) if n in mine else [(rest[n], g)]:
                p.grad = part.clone()
        theirs.step()
        adamw.step()
        params, state = OPTIMIZER.update(params, gradients, state, count)
        count = count + 1
    for n, p in params.items():
        expected = torch.cat(mine[n]) if n in mine else rest[n]
        assert (p - expected).abs().max() < 1e-10, n


def test_the_rate_follows_the_schedule():
    optimizer = Muon(AdamW(1e-3, schedule="cosine", warmup=2, steps=10), 0.02, 0.95, 0.0)
    p = {"head.weight": torch.zeros(4, 4), "blocks.0.attn.proj.weight": torch.zeros(4, 4)}
    g = {n: torch.eye(4) for n in p}
    moved = [optimizer.update(p, g, optimizer.init(p), torch.tensor(s))[0].popitem()[1].norm() for s in (0, 1, 9)]
    assert moved[0] / moved[1] == pytest.approx(0.5)
    assert moved[2] < 0.1 * moved[1]


def test_state_and_work(config):
    """One momentum a matrix where AdamW has two moments; 15 products a matrix of m x n, m <= n, more."""
    plain, ours = account(config, EXACT, 4), account(config, muon()(EXACT), 4)
    D, M, L = config.width, config.mlp, config.depth
    matrices = L * (4 * D * D + 2 * D * M)
    assert plain.state_bytes - ours.state_bytes == 4 * matrices
    products = [(D, D)] * 4 + [(D, M)] * 2
    assert ours.flops - plain.flops == L * 5 * sum(2 * (2 * m * m * n + m**3) for m, n in products)
    assert ours.kept_bytes == plain.kept_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "muon learning_rate -1.0 must be finite"),
        ({"weight_decay": float("inf")}, "muon weight_decay inf must be finite"),
        ({"momentum": 1.0}, r"muon momentum 1.0 is outside \[0, 1\)"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        muon(**options)
