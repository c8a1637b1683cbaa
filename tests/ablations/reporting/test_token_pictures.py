import torch

from ablations.reporting.token_pictures import BORDER, tokenized


def test_a_panel_a_scale_with_borders():
    image = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    patches = [[x, y, 4] for x, y in ((4, 0), (0, 4), (4, 4))] + [[x, y, 2] for y in (0, 2) for x in (0, 2)]
    picture = tokenized(image, torch.tensor([patches]), side=64)
    assert picture.shape == (3, 68, 4 * 68)  # the image, all patches, sizes 4 and 2
    whole, every, large, small = (p[:, 2:-2, 2:-2] for p in picture.split(68, dim=2))
    assert (whole == 100).all()
    for panel, x, y in ((every, 32, 0), (large, 32, 0), (every, 16, 16), (small, 16, 16)):
        assert torch.equal(panel[:, y, x], BORDER[:, 0])
    assert large[0, 8, 8] == 25  # size 2 lies there: dimmed
    assert small[0, 40, 40] == 25
    assert large[0, 40, 40] == every[0, 40, 40] == 100


def test_grey_images_have_one_channel():
    image = (torch.arange(64).view(1, 1, 8, 8) * 3).to(torch.uint8)
    patches = torch.tensor([[[0, 0, 8]]])
    assert torch.equal(tokenized(image, patches), tokenized(image.expand(-1, 3, -1, -1), patches))
