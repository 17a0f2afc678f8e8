"""Custom Diffusion's sizes: do image, mask and prompt change together, as often and as far as described?"""

import pytest
import torch

from personalize.trainers.data import augmentation
from personalize.trainers.recipes.custom_diffusion import PHRASES

SIZE = (96, 64)


def drawn(n, seed=0, mask=None, p=0.5):
    """Views of an image that says of each pixel where it comes from: row, column, 1."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, SIZE[0]), torch.linspace(0, 1, SIZE[1]), indexing="ij")
    picture = torch.stack([rows, columns, torch.ones(SIZE)])
    generator = torch.Generator().manual_seed(seed)
    return [augmentation.resized((picture, mask), generator, p) for _ in range(n)]


def test_how_often_and_how_far():
    """2/3 in 1/3..1, of which (0.6 - 1/3) / (2/3) = 0.4 is shrunk; 1/3 enlarged; half of all mirrored."""
    views = drawn(3000)
    kinds = [view.operations for view in views]
    assert {*kinds} == {(), ("zoom-out",), ("zoom-in",)}
    assert kinds.count(("zoom-in",)) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert kinds.count(("zoom-out",)) / 3000 == pytest.approx(2 / 3 * 0.4, abs=0.03)
    random_flip = sum(
        bool(view.pixels[1, :, 0].mean() > view.pixels[1, :, -1].mean()) for view in views if not view.operations
    )
    assert random_flip / kinds.count(()) == pytest.approx(0.5, abs=0.04)
    # Of the third channel, 1 in the image and 0.5 on the canvas, what is shown.
    shares = [
        (view.pixels[2] > 0.75).float().mean().item() ** 0.5 for view in views if view.operations == ("zoom-out",)
    ]
    assert 1 / 3 - 0.01 < min(shares) < 0.35 and 0.58 < max(shares) < 0.61
    assert sum(shares) / len(shares) == pytest.approx((1 / 3 + 0.6) / 2, abs=0.01)
    spans = [
        (view.pixels[0, -1] - view.pixels[0, 0]).mean().item() for view in views if view.operations == ("zoom-in",)
    ]
    assert min(spans) > 1 / 1.4 - 0.02 and max(spans) < 1 / 1.2 + 0.02
    assert sum(spans) / len(spans) == pytest.approx(1 / 1.3, abs=0.01)


def test_the_mask_is_where_the_image_is():
    """A latent less at each seam; everywhere where nothing is blank."""
    places = set()
    for view in drawn(400):
        if view.operations != ("zoom-out",):
            assert view.mask.shape == (1, *SIZE) and (view.mask > 1 - 1e-5).all()
            continue
        shown = (view.pixels[2] > 0.75).nonzero()
        (top, left), (bottom, right) = shown.min(dim=0).values.tolist(), shown.max(dim=0).values.tolist()
        seam = min(8, (bottom - top + 1) // 4, (right - left + 1) // 4)
        expected = torch.zeros(SIZE)
        expected[top + seam : bottom + 1 - seam, left + seam : right + 1 - seam] = 1
        assert torch.allclose(view.mask[0], expected, atol=1e-5) and expected.any()
        blank = view.pixels[2] <= 0.75
        assert (view.pixels[:, blank] == 0.5).all()
        places.add((top, left))
    assert min(top for top, _ in places) < 5 and min(left for _, left in places) < 5 and len(places) > 60


def test_a_users_mask_goes_along():
    """Left half: mirrored, shrunk or enlarged with the image."""
    mask = torch.zeros(1, *SIZE)
    mask[..., : SIZE[1] // 2] = 1.0
    for view in drawn(60, mask=mask, p=0.0):
        inside = view.mask[0] > 0.99
        assert not inside.any() or view.pixels[1][inside].max() < 0.52
    for view in drawn(60, mask=mask, p=1.0):
        inside = view.mask[0] > 0.99
        assert not inside.any() or view.pixels[1][inside].max() < 0.52


def test_the_prompt_says_so():
    generator = torch.Generator().manual_seed(0)
    for operation, words in (("zoom-out", {"a far away", "very small"}), ("zoom-in", {"zoomed in", "close up"})):
        prompts = {augmentation.describe("a photo of a V C", (operation,), PHRASES, generator) for _ in range(40)}
        assert prompts == {f"{word} a photo of a V C" for word in words}


def test_the_smallest_image_keeps_some_mask():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 32, 32)
    views = [augmentation.resized((picture, None), generator) for _ in range(200)]
    assert all(view.mask.any() for view in views)
