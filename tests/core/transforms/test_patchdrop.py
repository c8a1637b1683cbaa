from dataclasses import replace

import pytest
import torch
from timm.layers import PatchDropout

from core import rng, vit
from core.account.step import account
from core.errors import InputError
from core.layers import EXACT
from core.ops import Site
from core.transforms.patchdrop import patchdrop
from core.transforms.registers import registers


def tokens(config, images, ops, key):
    params = vit.init(config, 0, ops)
    return ops.tokenize(Site("", params, config, ops, key, torch.float32, {}), images)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_what_is_kept_are_tokens_with_their_positions_as_many_as_timm_keeps(config, batch, share):
    whole, kept = (tokens(config, batch[0], ops, rng.key(1)) for ops in (EXACT, patchdrop(share)(EXACT)))
    assert kept.shape == PatchDropout(share).train()(whole).shape
    assert torch.equal(kept[:, 0], whole[:, 0])
    for ours, all_ in zip(kept[:, 1:], whole[:, 1:], strict=True):
        matches = (ours[:, None] == all_[None]).all(-1)
        assert (matches.sum(1) == 1).all()
        assert (matches.sum(0) <= 1).all(), "a patch twice"


def test_draws_are_by_image_and_even(config):
    """Every patch is as likely as another, and steps draw anew."""
    images = torch.arange(400.0)[:, None, None, None] + torch.rand(400, 3, 16, 16)
    whole = tokens(config, images, EXACT, None)[:, 1:]
    kept = tokens(config, images, patchdrop(0.5)(EXACT), rng.key(1))
    here = (kept[:, 1:, None] == whole[:, None]).all(-1).any(1).double()
    assert (here.mean(0) - 0.5).abs().max() < 4 * (0.25 / 400) ** 0.5
    assert not torch.equal(here[0], here[1])
    assert not torch.equal(kept, tokens(config, images, patchdrop(0.5)(EXACT), rng.key(2)))


def test_evaluation_sees_all_patches_and_added_tokens_stay(config, batch):
    assert torch.equal(tokens(config, batch[0], patchdrop()(EXACT), None), tokens(config, batch[0], EXACT, None))
    both = registers(3)(patchdrop(0.9)(EXACT))
    assert tokens(config, batch[0], both, rng.key(1)).shape[1] == 1 + 1 + 3


def test_work_is_that_of_fewer_tokens(config):
    """FLOPs: the embedding's of all 16 patches, all else as with 9 tokens."""
    B, D, M, N = 4, config.width, config.mlp, 9
    embedding, head = 2 * 16 * 48 * D, 2 * config.classes * D
    block = 2 * N * (4 * D * D + 2 * D * M) + 4 * N * N * D
    assert account(config, patchdrop(0.5)(EXACT), B).flops == B * (
        2 * embedding + 3 * head + 3 * config.depth * block
    )  # the images need no gradient
    more = replace(config, depth=config.depth + 1)
    kept = [account(c, patchdrop(0.5)(EXACT), B).kept_bytes for c in (config, more)]
    whole = [account(c, EXACT, B).kept_bytes for c in (config, more)]
    assert 0.4 * 9 / 17 < (kept[1] - kept[0]) / (whole[1] - whole[0]) < 9 / 17


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_bad_shares_are_refused(share):
    with pytest.raises(InputError, match=r"patchdrop share .* is outside \[0, 1\)"):
        patchdrop(share)
