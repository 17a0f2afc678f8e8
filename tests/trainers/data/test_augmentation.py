"""Paired augmentation: do pixels, mask and prompt change together, exactly as described?"""

import dataclasses
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data import augmentation
from personalize.trainers.data import concept as concept_module
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.recipes.attndreambooth import AttnDreamBooth
from personalize.trainers.recipes.textboost import COLLAGES, NAMES, OPERATIONS, PHRASES, TOKENS, TextBoost, paired_views
from personalize.trainers.recipes.textboost_2026 import TextBoost2026
from personalize.trainers.recipes.textual_inversion import TextualInversion

SCALE, CROP, SHIFT, _ = OPERATIONS["all"]
AUGMENT = partial(augmentation.augment, operations=OPERATIONS["all"], collages=COLLAGES["all"])
HALF = partial(AUGMENT, p=0.5, grayscale_p=0.2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def picture():
    return torch.rand(3, 32, 32, generator=generator(9))


def ramps(height, width):
    """An image that says where each of its pixels comes from: `[row, column]`, in pixels."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()


def test_flip_mirrors(picture):
    flipped, name = augmentation.flip(picture, generator())
    assert name == "hflip" and torch.equal(flipped[:, :, 0], picture[:, :, -1])


@pytest.mark.parametrize("height", [16, 32, 64])
@pytest.mark.parametrize("seed", range(6))
def test_shift_moves_and_repeats_the_edge(height, seed):
    """By a share of the width, whatever the height."""
    picture = torch.rand(3, height, 32, generator=generator(9))
    shifted, name = SHIFT(picture, generator(seed))
    # the distance is the one at which the images agree
    if name == "left":
        pixels = next(d for d in range(1, 32) if torch.equal(shifted[..., : 32 - d], picture[..., d:]))
        assert torch.equal(shifted[..., -1], picture[..., -1])
    else:
        pixels = next(d for d in range(1, 32) if torch.equal(shifted[..., d:], picture[..., : 32 - d]))
        assert torch.equal(shifted[..., 0], picture[..., 0])
    assert 0.15 * 32 - 0.5 <= pixels <= 0.30 * 32 + 0.5
    assert shifted.shape == picture.shape


def test_zoom_out_centres_and_repeats_the_edge():
    picture = torch.zeros(1, 32, 32)
    picture[:, 8:24, 8:24] = 1.0
    out = augmentation.zoom(picture, 0.5)
    assert out[:, 13:19, 13:19].min() > 0.95 and out[:, :10].max() < 0.05
    edge = augmentation.zoom(torch.ones(1, 32, 32), 0.34)
    assert torch.allclose(edge, torch.ones(1, 32, 32))  # no black borders


def test_zoom_in_keeps_the_middle():
    picture = torch.zeros(1, 32, 32)
    picture[:, 12:20, 12:20] = 1.0
    assert augmentation.zoom(picture, 1.4).sum() == pytest.approx(1.4**2 * 64, rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (96, 48)])
@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_zoom_is_the_same_along_both_axes(height, width, factor):
    """What a pixel shows lies `1 / factor` times as far from the centre; outside of the image, it shows the edge."""
    size = torch.tensor([height, width])[:, None, None]
    zoomed = augmentation.zoom(ramps(height, width) / size, factor) * size  # images lie in 0..1
    centre = (size - 1) / 2
    expected = ((ramps(height, width) - centre) / factor + centre).clamp(torch.zeros(1), size - 1)
    assert zoomed.shape == (2, height, width)
    assert (zoomed - expected).abs().max() < 1.0


def test_scale_is_named_only_where_it_shows(picture):
    names, factors = [], []
    for seed in range(200):
        factors.append(augmentation.draw(generator(seed), 0.34, 1.4))
        names.append(SCALE(picture, generator(seed))[1])
    for factor, name in zip(factors, names, strict=True):
        assert name == ("zoom-out" if factor < 0.6 else "zoom-in" if factor > 1.2 else None)
    assert {None, "zoom-in", "zoom-out"} == set(names)


def test_crop_enlarges_a_square():
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64).clone()
    widths = []
    for seed in range(100):
        cropped, name = CROP(ramp, generator(seed))
        assert name == "crop" and cropped.shape == ramp.shape
        widths.append((cropped[0, 0, -1] - cropped[0, 0, 0]).item())
    assert min(widths) > 0.08**0.5 - 0.06 and max(widths) > 0.9  # 8 to 100 % of the area


@pytest.mark.parametrize(("height", "width"), [(60, 120), (120, 60)])
def test_crop_has_the_images_shape(height, width):
    """Its share of the height is that of the width, but for a pixel, and it lies anywhere along both axes."""
    size = torch.tensor([height, width])
    centres = []
    for seed in range(100):
        cropped, _ = CROP(ramps(height, width) / size[:, None, None], generator(seed))
        assert cropped.shape == (2, height, width)
        low, high = cropped.amin(dim=(1, 2)) * size, cropped.amax(dim=(1, 2)) * size
        parts = (high - low + 1) / size
        assert abs(parts[0] - parts[1]) < 2 / 60
        assert 0.08**0.5 - 0.04 < parts.mean() < 1.01
        centres.append((low + high) / 2 / size)
    assert torch.stack(centres).amin(dim=0).max() < 0.3 and torch.stack(centres).amax(dim=0).min() > 0.7
    assert torch.corrcoef(torch.stack(centres, dim=1))[0, 1].abs() < 0.3


@pytest.mark.parametrize("tiles", [2, 3])
def test_collage_has_edges_along_both_axes(tiles):
    white = augmentation.collage(torch.ones(1, 48, 96), tiles)[0]
    black = {axis: (white.amax(dim=1 - axis) == 0).nonzero().flatten().tolist() for axis in (0, 1)}
    for axis, side in ((0, 48 // tiles), (1, 96 // tiles)):
        assert black[axis] == [edge for i in range(tiles) for edge in (i * side, (i + 1) * side - 1)]
    assert white.sum().item() == pytest.approx((48 - 2 * tiles) * (96 - 2 * tiles))


@pytest.mark.parametrize("tiles", [2, 3])
def test_collage_has_black_edges_of_one_pixel(tiles):
    white = augmentation.collage(torch.ones(1, 96, 96), tiles)
    side = 96 // tiles
    for start in range(0, 96, side):
        assert white[:, start].max() == 0 and white[:, start + side - 1].max() == 0
        assert white[0, start + 1, start + 1 : start + side - 1].min() > 0.99
    assert white.sum().item() == pytest.approx(tiles**2 * (side - 2) ** 2)


def test_grayscale_is_luma(picture):
    gray = augmentation.grayscale(picture)
    expected = 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]
    assert all(torch.allclose(channel, expected) for channel in gray)


def test_draws_are_independent_and_stack(picture):
    g = generator()
    views = [AUGMENT((picture, None), g, p=0.5, grayscale_p=0.2) for _ in range(2000)]
    share = lambda name: sum(name in view.operations for view in views) / len(views)  # noqa: E731
    assert share("collage") == pytest.approx(0.5, abs=0.04)
    assert share("grayscale") == pytest.approx(0.2, abs=0.03)
    assert share("hflip") == pytest.approx(0.5 / 4, abs=0.03)
    assert share("left") + share("right") == pytest.approx(0.5 / 4, abs=0.03)
    both = sum({"collage", "hflip"} <= set(view.operations) for view in views) / len(views)
    assert both == pytest.approx(0.5 * 0.5 / 4, abs=0.02)


def test_only_the_flip_leaves_a_style_alone(picture):
    """Nothing but a mirror and the loss of colour: the views are exactly four images, the flip in its whole share."""
    g, seen = generator(), []
    gray = augmentation.grayscale(picture)
    expected = {
        (): picture,
        ("hflip",): picture.flip(-1),
        ("grayscale",): gray,
        ("hflip", "grayscale"): gray.flip(-1),
    }
    for _ in range(1000):
        view = augmentation.augment(
            (picture, None), g, operations=OPERATIONS["flip"], collages=(), p=0.5, grayscale_p=0.2
        )
        assert torch.equal(view.pixels, expected[view.operations])
        seen.append("hflip" in view.operations)
    assert sum(seen) / len(seen) == pytest.approx(0.5, abs=0.05)
    assert {name for operations in expected for name in operations} == set(NAMES["flip"])


@pytest.mark.parametrize(("prompt", "share"), [("tokens", 1 / 4), ("words", 0.0), ("none", 0.0)])
def test_only_learned_tokens_bring_the_flip_among_the_operations(picture, prompt, share):
    """As in the authors' code: one of four operations with learned tokens, else one of three and never the flip."""
    recipe = TextBoost(augmentation_prompt=prompt, augmentation_p=1.0, grayscale_p=0.0)
    views = paired_views(recipe, Concept(images=(picture,)))
    g = generator()
    names = [view.operations for view in (views.augment((picture, None), g) for _ in range(1000))]
    assert sum("hflip" in each for each in names) / 1000 == pytest.approx(share, abs=0.05)
    assert sum("crop" in each for each in names) / 1000 == pytest.approx(1 / 4 if share else 1 / 3, abs=0.05)
    alone = paired_views(replace(recipe, augmentations="flip"), Concept(images=(picture,)))
    assert alone.augment((picture, None), g).operations == ("hflip",)  # asked for by name


def test_the_weak_form_is_a_flip_and_a_mild_crop_that_no_prompt_names():
    """The revised paper's 5.1 and code: a flip with p 0.5, an image of 1.2 times the size cropped with p 0.5."""
    recipe = TextBoost2026(views=4)
    weak = paired_views(recipe, Concept(images=(torch.rand(3, 64, 64),)))
    row, column = ramps(64, 64)
    g, flipped, cropped, corners = generator(), 0, 0, set()
    for _ in range(1000):
        view = weak.augment((torch.stack([row, column, row]) / 64, None), g)
        assert view.operations == () and view.pixels.shape == (3, 64, 64)
        right = 64 * (view.pixels[1, 32, 33] - view.pixels[1, 32, 32]).item()
        flipped += right < 0
        cropped += abs(right) < 0.99
        assert abs(right) == pytest.approx(1.0, abs=1e-4) or abs(right) == pytest.approx(64 / 77, abs=0.01)
        corners.add(round(64 * view.pixels[0, 32, 32].item()))
    assert flipped / 1000 == pytest.approx(0.5, abs=0.05) and cropped / 1000 == pytest.approx(0.5, abs=0.05)
    assert len(corners) > 5  # cropped anywhere


@pytest.mark.parametrize(
    ("recipe", "random"),
    [(TextBoost(), True), (TextBoost2026(), True), (AttnDreamBooth(), True), (TextualInversion(), False)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("crop", ["auto", "center", "random"])
def test_images_that_are_not_square_are_cropped_as_the_authors_do(recipe, random, crop):
    """At random in TextBoost's and AttnDreamBooth's code, where not told otherwise: read from a ramp."""
    image = torch.linspace(0, 1, 96).expand(3, 32, 96)
    off = {"augmentation_p": 0.0, "grayscale_p": 0.0, "knowledge_weight": 0.0, "rotation_p": 0.0, "flip_p": 0.0}
    fields = {f.name for f in dataclasses.fields(recipe)}
    plain = replace(recipe, views=40, **{name: value for name, value in off.items() if name in fields})
    concept = Concept(images=(image,), resolution=32, crop=crop)
    stage = next(plain.stages(small.models(), concept, generator(), Context()))
    centres = stage.first(40).posterior[:, 0].mean(dim=(1, 2)) / 4 + 0.5
    assert (centres.std() > 0.1) == (crop == "random" or (crop == "auto" and random))
    if crop == "center":
        assert torch.allclose(centres, torch.tensor(0.5), atol=0.02)


def test_off_means_unchanged(picture):
    view = AUGMENT((picture, None), generator(), p=0.0, grayscale_p=0.0)
    assert view.operations == () and torch.equal(view.pixels, picture)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (64, 16)])
def test_mask_follows_the_image(height, width):
    """An image that is its own mask stays so through every operation except the loss of colour, and keeps its size."""
    mask = (torch.rand(1, height, width, generator=generator(9)) > 0.5).float()
    pixels, seen = mask.expand(3, -1, -1), set()
    for seed in range(100):
        view = AUGMENT((pixels, mask), generator(seed), p=0.9, grayscale_p=0.0)
        assert view.pixels.shape == pixels.shape and view.mask.shape == mask.shape
        assert torch.allclose(view.pixels[:1], view.mask)
        seen |= set(view.operations)
    assert seen == set(TOKENS) - {"grayscale"}


SHAPES = pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (40, 20)])


@SHAPES
@pytest.mark.parametrize("degrees", [-45.0, -10.0, 0.0, 30.0, 45.0, 180.0])
def test_a_turned_image_is_scipys_reflected_at_its_edges(height, width, degrees):
    """About its centre, counter-clockwise, bilinear, shrunk to fit; nothing is stretched where it is not square."""
    ndimage = pytest.importorskip("scipy.ndimage")
    picture = torch.rand(3, height, width, generator=generator(2))
    turned = augmentation.rotate(picture, degrees)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across = abs(width * cos) + abs(height * sin), abs(height * cos) + abs(width * sin)  # of what encloses it
    shrunk = max(across[0] / width, across[1] / height)
    matrix = shrunk * torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    centre = torch.tensor([(height - 1) / 2, (width - 1) / 2], dtype=torch.float64)
    expected = [
        ndimage.affine_transform(c, matrix.numpy(), (centre - matrix @ centre).numpy(), order=1, mode="reflect")
        for c in picture.double().numpy()
    ]
    assert turned.shape == picture.shape
    assert (turned - torch.stack([torch.from_numpy(c) for c in expected])).abs().max() < 1e-4


def test_counter_clockwise_is_a_quarter_turn_to_the_left(picture):
    assert torch.allclose(augmentation.rotate(picture, 90.0), picture.rot90(1, (-2, -1)), atol=1e-5)


@SHAPES
@pytest.mark.parametrize("degrees", [-45.0, -20.0, 10.0, 45.0])
def test_a_turned_image_keeps_its_corners(height, width, degrees):
    """In place a rotation by 45 degrees would cut 17 % of a square off."""
    picture, ends = torch.zeros(4, height, width), (slice(2), slice(-2, None))
    for channel in range(4):
        picture[channel, ends[channel // 2], ends[channel % 2]] = 1.0
    assert (augmentation.rotate(picture, degrees).amax(dim=(1, 2)) > 0.4).all()


def test_a_turned_subject_is_as_small_as_the_authors():
    """On a canvas that grows with the rotation: 1 / (cos a + sin a) of its size, 0.794 in the mean over 45 degrees."""
    row, column = ramps(64, 64)
    scales = []
    for seed in range(1000):
        view = augmentation.random_rotation((torch.stack([row, column, row]), None), generator(seed), p=1.0)
        scales.append(1 / math.hypot(*(view.pixels[:2, 32, 33] - view.pixels[:2, 32, 32]).tolist()))
    assert sum(scales) / 1000 == pytest.approx(0.794, abs=0.01)
    assert min(scales) == pytest.approx(0.707, abs=0.002) and max(scales) == pytest.approx(1.0, abs=0.01)


@SHAPES
def test_no_turned_image_has_black_corners(height, width):
    white = torch.ones(3, height, width)
    for seed in range(50):
        view = augmentation.random_rotation((white, None), generator(seed), p=1.0)
        assert torch.allclose(view.pixels, white, atol=1e-5)


def test_turns_are_drawn_as_the_paper_says():
    """Three in four turned by up to 45 degrees either way, one in four mirrored: read from where pixels come from."""
    row, column = ramps(64, 64)
    angles, random_flip = [], 0
    for seed in range(400):
        view = augmentation.random_rotation((torch.stack([row, column, row]), None), generator(seed))
        down, right = (view.pixels[:2, 32, 33] - view.pixels[:2, 32, 32]).tolist()  # one pixel to the right comes from
        random_flip += right < 0
        angles.append(math.degrees(math.atan(down / right)))
    turned = [angle for angle in angles if abs(angle) > 0.01]
    assert 0.68 < len(turned) / 400 < 0.82 and 0.19 < random_flip / 400 < 0.31
    assert max(turned) < 45.1 and min(turned) > -45.1 and max(turned) > 40 and min(turned) < -40


def test_a_mask_turns_with_its_image():
    mask = (torch.rand(1, 24, 40, generator=generator(9)) > 0.5).float()
    for seed in range(20):
        view = augmentation.random_rotation((mask.expand(3, -1, -1), mask), generator(seed))
        assert view.operations == () and torch.equal(view.pixels[:1], view.mask)
    assert augmentation.random_rotation((mask.expand(3, -1, -1), None), generator()).mask is None


FURTHER = {
    "vertical_flip": {"vflip": "vertically flipped"},
    "quarter_turn": {"rot90": "90 degrees counter clockwise rotated", "rot270": "90 degrees clockwise rotated"},
    "brightness": {"dimmed": "dimmed", "bright": "bright"},
    "jpeg": {"jpeg": "JPEG"},
}


@pytest.mark.parametrize("prompt", ["tokens", "words"])
@pytest.mark.parametrize("option", FURTHER)
def test_further_augmentations_act_and_are_named_in_words(picture, option, prompt):
    """Off by default; geometric ones join those of `augmentation_p`, the others share `grayscale_p` equally."""
    recipe = TextBoost(augmentation_prompt=prompt, augmentation_p=1.0, grayscale_p=1.0)
    concept, g, counted = Concept(images=(picture,)), generator(), dict.fromkeys(FURTHER[option], 0)
    views = paired_views(replace(recipe, **{option: True}), concept)
    for _ in range(1000):
        for name in set(views.augment((picture, picture[:1]), g).operations) & set(counted):
            counted[name] += 1
    among = {"tokens": 5, "words": 4}[prompt] if option in ("vertical_flip", "quarter_turn") else 2
    assert sum(counted.values()) / 1000 == pytest.approx(1 / among, abs=0.05) and min(counted.values()) > 50
    for name, phrase in FURTHER[option].items():
        prompts = {augmentation.describe("a <dog>", (name,), views.phrases, generator(s)) for s in range(20)}
        both = {f"{phrase} a <dog>", f"a <dog>, {phrase}"}
        assert prompts == ({f"{phrase} a <dog>"} if option == "quarter_turn" else both)
    plain = paired_views(recipe, concept)
    assert not any({*plain.augment((picture, None), g).operations} & {*counted} for _ in range(200))


def test_further_augmentations_are_what_they_say(picture):
    assert torch.equal(augmentation.vertical_flip(picture, generator())[0][:, 0], picture[:, -1])
    for seed in range(8):
        turned, name = augmentation.quarter_turn(picture, generator(seed))
        expected = picture.rot90(1 if name == "rot90" else -1, (-2, -1))
        assert torch.allclose(turned, expected, atol=1e-5)
        lit, name = augmentation.brightness(picture / 2 + 0.1, generator(seed))
        factor = (lit / (picture / 2 + 0.1)).median().item()
        assert (0.4 <= factor <= 0.6) if name == "dimmed" else (1.3 <= factor <= 1.5)
        assert lit.min() >= 0 and lit.max() <= 1
        small, name = augmentation.jpeg(picture, generator(seed))
        assert name == "jpeg" and small.shape == picture.shape and 0.01 < (small - picture).abs().mean() < 0.3


def test_words_stand_where_they_belong():
    def describe(*operations, named="words"):
        prompts = {augmentation.describe("a <dog>", operations, PHRASES[named], generator(s)) for s in range(20)}
        return prompts

    assert describe("collage") == {"photo collage of a <dog>"}
    assert describe("zoom-in") == {"zoomed in a <dog>", "close up a <dog>"}
    assert describe("left") == {"a <dog> on the left"}
    assert describe("grayscale") == {"a <dog>, grayscale"}
    assert describe("hflip") == {"horizontally flipped a <dog>", "a <dog>, horizontally flipped"}
    assert describe("right", "grayscale", named="tokens") == {"a <dog> <right>, <grayscale>"}
    assert describe("right", "grayscale", named="none") == {"a <dog>"}


def test_a_view_knows_its_image():
    """Images come in the order asked for, each view with the number of the image it was made from."""
    concept = Concept(images=tuple(torch.full((3, 32, 32), value) for value in (0.0, 0.5, 1.0)))
    seen = [*augmentation.views(concept, [2, 0, 1, 1], (32, 32), generator(), partial(AUGMENT, p=0.0, grayscale_p=0.0))]
    assert [view.image for view in seen] == [2, 0, 1, 1]
    assert [view.pixels.mean().item() for view in seen] == [1.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(("crop", "times"), [("center", 2), ("bucket", 2), ("random", 8)])
def test_a_image_is_cut_once_unless_the_cut_is_drawn(monkeypatch, crop, times):
    """And what is made of it stays what it was: cut again for every view."""
    concept = Concept(images=(torch.rand(3, 40, 32), torch.rand(3, 48, 64)), resolution=32, crop=crop)
    cuts, cutting = [], concept_module.cut
    monkeypatch.setattr(concept_module, "cut", lambda *arguments: cuts.append(1) or cutting(*arguments))
    order, drawn = [0, 1] * 4, generator(3)
    found = [*augmentation.views(concept, order, (32, 32), drawn, HALF)]
    assert len(cuts) == times
    drawn = generator(3)
    for view, picture in zip(found, order, strict=True):
        anew = HALF(concept_module.instance(concept, picture, (32, 32), drawn), drawn)
        assert torch.equal(view.pixels, anew.pixels) and view.operations == anew.operations


def test_same_seed_same_views():
    concept = Concept(images=(torch.rand(3, 40, 32), torch.rand(3, 32, 32)), crop="random")
    first, second = (augmentation.views(concept, [0, 1] * 5, (32, 32), generator(3), HALF) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.pixels, b.pixels) and (a.operations, a.image) == (b.operations, b.image)
