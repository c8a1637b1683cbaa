import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from core import rng
from core.errors import InputError
from core.transforms import scorers
from core.transforms.mrt import mrt, select
from core.transforms.scorers import pixel_blur


@pytest.mark.parametrize("k", [2, 4])
def test_pixel_blur_equals_its_definition(k):
    images = rng.uniform(rng.key(1), (3, 3, 32, 32)).double()
    p, size = 4, 4 * k
    small = F.interpolate(images, scale_factor=1 / k, mode="bilinear", align_corners=False)
    blurred = F.interpolate(small, scale_factor=k, mode="bilinear", align_corners=False)
    mse = F.avg_pool2d((images - blurred).square().mean(1, keepdim=True), size).flatten(1)
    torch.testing.assert_close(pixel_blur(images, p, 16)[size], -(mse * size).sqrt(), rtol=1e-10, atol=1e-12)


def test_slabs_do_not_change_the_scores(monkeypatch):
    images = rng.uniform(rng.key(1), (5, 3, 16, 16))
    whole = pixel_blur(images, 2, 8)
    monkeypatch.setattr(scorers, "_SLAB", 3 * 16 * 16)
    assert all(torch.equal(whole[s], part) for s, part in pixel_blur(images, 2, 8).items())


def authors_entropy(patch, low, high, bins=512):
    """APT's rule for one patch of grey levels: the entropy in bits of their histogram, by numpy."""
    share = np.histogram(patch, bins=bins, range=(low, high))[0] / patch.size
    return -(share[share > 0] * np.log2(share[share > 0])).sum()


@pytest.mark.parametrize("channels", [1, 3])
def test_entropy_is_that_of_a_patchs_histogram(channels):
    images = rng.uniform(rng.key(6), (2, channels, 16, 16)).double() * 4 - 2
    images[:, :, :8, :8] = images[:, :, :8, :8].round()
    scores = scorers.entropy_scores(images, 2, 8)
    weights = (0.2989, 0.5870, 0.1140) if channels == 3 else (1.0,)
    for b in range(2):
        grey = sum(w * channel for w, channel in zip(weights, images[b].numpy(), strict=True))
        for size, mine in scores.items():
            n = 16 // size
            patches = grey.reshape(n, size, n, size).swapaxes(1, 2).reshape(n * n, size, size)
            wanted = [-authors_entropy(p, grey.min(), grey.max()) for p in patches]
            np.testing.assert_allclose(mine[b].numpy(), wanted, rtol=0, atol=0.51 / 4096)


def test_entropy_splits_what_is_busy_first_and_knows_no_scale():
    images = torch.zeros(1, 1, 16, 16)
    images[..., 8:, 8:] = torch.arange(64.0).view(8, 8)
    scores = scorers.entropy_scores(images, 2, 8)
    assert scores[8].tolist() == [[0, 0, 0, -6]]  # 64 levels alike: 6 bits
    assert select(scores, 16, 2, 8, 7)[0, :3, 2].tolist() == [8, 8, 8]
    for moved in (images * 3 - 5, images.expand(1, 2, 16, 16)):
        assert all(torch.equal(scores[s], other) for s, other in scorers.entropy_scores(moved, 2, 8).items())
    assert (scorers.entropy_scores(torch.ones(1, 3, 16, 16), 2, 8)[4] == 0).all()
    compiled = torch.compile(scorers.entropy_scores, fullgraph=True, dynamic=False, backend="aot_eager")
    assert all(torch.equal(compiled(images, 2, 8)[s], scores[s]) for s in scores)


def test_random_scores_depend_on_the_image_alone():
    """Not on its place in the batch, nor on the others, nor on rounding in its last bits."""
    images = rng.uniform(rng.key(3), (6, 3, 16, 16)) * 4 - 2
    scores, order = scorers.random_scores(images, 2, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    assert {s: tuple(v.shape) for s, v in scores.items()} == {8: (6, 4), 4: (6, 16)}
    for size, mixed in scorers.random_scores(images[order], 2, 8).items():
        assert torch.equal(mixed, scores[size][order])
    for other in (images[:1], torch.nextafter(images[:1], images.new_full((), 9.0))):
        assert torch.equal(scorers.random_scores(other, 2, 8)[4], scores[4][:1])
    assert len({tuple(row.tolist()) for row in scores[4]}) == 6
    compiled = torch.compile(scorers.random_scores, fullgraph=True, dynamic=False)(images, 2, 8)
    assert all(torch.equal(compiled[size], scores[size]) for size in scores)


def test_random_scores_are_uniform():
    images = rng.uniform(rng.key(4), (2000, 1, 8, 8))
    draws = scorers.random_scores(images, 2, 8)[4]
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 0.001
    assert (torch.corrcoef(draws.T) - torch.eye(4)).abs().max() < 5 / 2000**0.5


@pytest.fixture
def weights_file(tmp_path):
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(0)
    torch.save(shufflenet_v2_x0_5().state_dict(), tmp_path / "shufflenet.pth")
    return str(tmp_path / "shufflenet.pth")


def test_feature_scores_by_their_definition(weights_file):
    from torchvision.models import shufflenet_v2_x0_5

    net = shufflenet_v2_x0_5()
    net.load_state_dict(torch.load(weights_file))
    net.eval()
    assert sum(p.numel() for n, p in net.named_parameters() if not n.startswith("fc")) == 341_792
    images = rng.uniform(rng.key(2), (2, 3, 256, 256)) * 4 - 2
    with torch.no_grad():
        features = net.conv5(net.stage4(net.stage3(net.stage2(net.maxpool(net.conv1(images))))))
    scores = scorers.feature_scores(weights_file)(images, 16, 64)
    for size, k in ((64, 4), (32, 2)):
        small = F.interpolate(features, scale_factor=1 / k, mode="bilinear")
        changes = (features - F.interpolate(small, scale_factor=k, mode="bilinear")).square().mean(1)
        wanted = -F.avg_pool2d(changes, size // 32).flatten(1) if size > 32 else -changes.flatten(1)
        torch.testing.assert_close(scores[size], wanted)
    assert select(scores, 256, 16, 64, 64).shape == (2, 64, 3)


def test_feature_scores_use_stride_16_for_finer_patches(weights_file):
    scores = scorers.feature_scores(weights_file)(torch.randn(1, 3, 128, 128), 8, 32)
    assert {s: v.shape[1] for s, v in scores.items()} == {32: 16, 16: 64}
    with pytest.raises(InputError, match="scorer 'features' sees nothing finer than 16 pixels.*mrt.scorer=blur"):
        scorers.feature_scores(weights_file)(torch.randn(1, 3, 32, 32), 2, 8)


def test_feature_scores_compile_on_another_device_at_first_call(weights_file, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
        scores = scorers.feature_scores(weights_file)
    scores = torch.compile(scores, fullgraph=True, backend="eager")
    assert scores(torch.randn(2, 3, 128, 128, device="meta"), 8, 16)[16].device.type == "meta"


def test_features_without_weights_name_the_alternatives(monkeypatch, tmp_path):
    def no_network(*a, **k):
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match="cannot load torchvision's shufflenet.*no route.*mrt.weights=FILE.*mrt.scorer=blur"
    ):
        mrt(64, 16, 64, "features")
    with pytest.raises(InputError, match="cannot load 'nowhere.pth'"):
        mrt(64, 16, 64, "features", weights="nowhere.pth")
    with pytest.raises(
        InputError, match="unknown mrt scorer 'blurr'; legal: blur, entropy, features, random; did you mean 'blur'"
    ):
        mrt(64, 16, 64, "blurr")
