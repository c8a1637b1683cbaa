from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from core import rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site
from core.transforms.flash import flash
from core.transforms.tome import attend, merged, tome


def random(*shape, seed=0):
    return (rng.uniform(rng.key(seed), shape) * 2 - 1).double()


def published(x, metric, size, r):
    """The authors' rule (github.com/facebookresearch/ToMe, merge.py: bipartite_soft_matching and merge_wavg)."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = metric[..., ::2, :], metric[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    scores[..., 0, :] = -torch.inf
    node_max, node_idx = scores.max(dim=-1)
    edge_idx = node_max.argsort(dim=-1, descending=True)[..., None]
    unm_idx, src_idx = edge_idx[..., r:, :].sort(dim=1)[0], edge_idx[..., :r, :]
    dst_idx = node_idx[..., None].gather(dim=-2, index=src_idx)

    def merge(x):
        src, dst = x[..., ::2, :], x[..., 1::2, :]
        n, t1, c = src.shape
        unm = src.gather(dim=-2, index=unm_idx.expand(n, t1 - r, c))
        src = src.gather(dim=-2, index=src_idx.expand(n, r, c))
        return torch.cat([unm, dst.scatter_add(-2, dst_idx.expand(n, r, c), src)], dim=1)

    total = merge(size)
    return merge(x * size) / total, total


@pytest.mark.parametrize(("N", "r"), [(17, 1), (17, 8), (10, 3)])
def test_merging_is_the_authors(N, r):
    x, keys, sizes = random(3, N, 6), random(3, N, 4, seed=1), 1 + (random(3, N, 1, seed=2) + 1).floor()
    ours, theirs = merged(x, keys, sizes, r), published(x, keys, sizes, r)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted)
    assert (ours[1].sum(1) == sizes.sum(1)).all()
    torch.testing.assert_close(ours[0][:, 0], x[:, 0])  # the class token
    torch.testing.assert_close((ours[0] * ours[1]).sum(1), (x * sizes).sum(1))


@pytest.mark.parametrize("ops", [EXACT, flash()(EXACT), flash("tiled")(EXACT)], ids=["plain", "sdpa", "tiled"])
def test_attention_counts_members(config, ops):
    """softmax(q k^T / sqrt d + log size) v, whatever the kernel: as if each token were there so many times."""
    q, k, v = (random(2, 3, 5, 8, seed=i) for i in range(3))
    sizes = torch.tensor([1, 2, 1, 3, 1])
    carry = {"tome.sizes": sizes.double()[None, :, None].expand(2, 5, 1)}
    site = Site("attn", {}, config, ops, None, torch.float64, carry)
    ours = attend(ops.attend, site, q, k, v)
    repeated = (t.repeat_interleave(sizes, dim=2) for t in (k, v))
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, *repeated))


def test_every_block_has_r_tokens_less(config, batch):
    seen, ops = [], tome(3)(EXACT)
    params = vit.init(config, 0)

    def mlp(site, x):
        seen.append(x.shape[1])
        return EXACT.mlp(site, x)

    vit.forward(params, batch[0], config, replace(ops, mlp=mlp))
    assert seen == [14, 11]


def test_work_is_that_of_fewer_tokens(config):
    """Per block: attention of N tokens, 8 columns wider from the second on, the scores of N/2 x N/2 pairs, an MLP of
    N - r."""
    r, B, D, M, h = 3, 4, config.width, config.mlp, config.heads
    plain, less = account(config, EXACT, B), account(config, tome(r)(EXACT), B)
    d, N = D // h, config.tokens
    change = 0
    for i in range(config.depth):
        n = N - i * r
        change += 3 * 2 * (n * 4 * D * D + (n - r) * 2 * D * M - N * (4 * D * D + 2 * D * M))
        change += 3 * 2 * h * (n * n * (2 * d + (16 if i else 0)) - N * N * 2 * d)
        change += 2 * ((n + 1) // 2) * (n // 2) * d
    assert less.flops - plain.flops == B * change
    assert less.kept_bytes < plain.kept_bytes


@pytest.mark.parametrize(("r", "message"), [(-1, "tome r -1 is too small"), (6, "merge 6 of 17 .* legal: 0 to 5")])
def test_more_merges_than_tokens_are_refused(config, batch, r, message):
    """17 tokens, two blocks: 5 and 5 leave 7, of which 3 could be merged; 6 in the first leave 11, of which 5 can."""
    vit.forward(vit.init(config, 0), batch[0], config, tome(5)(EXACT))
    with pytest.raises(InputError, match=message):
        vit.forward(vit.init(config, 0), batch[0], config, tome(r)(EXACT))
