"""Images that keep their shape: which sizes they get, and do batches, masks and previews follow?

Small models on the CPU. The autoencoder averages 8 x 8 pixels, so that latents tell what a view shows.
"""

import dataclasses
import math
from functools import partial
from itertools import count, cycle

import pytest
import torch
from PIL import Image

from personalize.tests.support import small
from personalize.trainers.data import augmentation
from personalize.trainers.data.concept import Concept, instance
from personalize.trainers.data.latents import encode_views
from personalize.trainers.data.paired_views import PairedViews
from personalize.trainers.digest import choose
from personalize.trainers.images import bucket
from personalize.trainers.recipes.textboost import COLLAGES, OPERATIONS, TextBoost
from personalize.trainers.runs import train
from personalize.trainers.runs.preview import Preview
from personalize.trainers.runs.run import Run

# Three landscapes, two portraits, a square; at 32 pixels they are trained at these sizes.
SHAPES = [(48, 80), (80, 48), (48, 80), (64, 64), (96, 160), (40, 24)]
SIZES = [(24, 40), (40, 24), (24, 40), (32, 32), (24, 40), (40, 24)]
AUGMENT = partial(augmentation.augment, operations=OPERATIONS["all"], collages=COLLAGES["all"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def concept(shapes=SHAPES, crop="bucket", **changes):
    pictures = tuple(torch.rand(3, *shape, generator=generator(i)) for i, shape in enumerate(shapes))
    return Concept(**{"images": pictures, "resolution": 32, "crop": crop} | changes)


def paired(pool, p=0.5):
    augment = partial(AUGMENT, p=p, grayscale_p=0.0)
    return PairedViews(templates=["a {}"], subjects=["dog"] * 20, augment=augment, pool=pool, batch_size=4)


@pytest.mark.parametrize(
    ("resolution", "step"),
    [(32, 8), (72, 8), (128, 8), (200, 16), (512, 32), (704, 48), (768, 48), (1000, 64), (1024, 64)],
)
def test_a_bucket_is_the_closest_of_all(resolution, step):
    """Of every size that the rules allow and that has no room for another step."""
    allowed = [side for side in range(step, 2 * resolution + 1, step) if side >= resolution / 2]
    fits = {(h, w) for h in allowed for w in allowed if h * w <= resolution**2}
    full = {(h, w) for h, w in fits if not fits & {(h + step, w), (h, w + step)}}
    off = lambda size, ratio: abs(math.log(size[0] / size[1] / ratio))  # noqa: E731
    for height in (8, 100, 333, 480, 512, 600, 768, 1000, 3000):
        for width in (8, 99, 256, 500, 512, 641, 768, 1001, 4000):
            found, ratio = bucket(height, width, resolution), height / width
            assert found in full
            assert off(found, ratio) == pytest.approx(min(off(size, ratio) for size in full), abs=1e-9)
            assert height == width or bucket(width, height, resolution) == found[::-1]


def test_buckets_that_everybody_knows():
    """Common photographs, at a resolution of 1024 and of 512; a square stays as it is."""
    assert bucket(3000, 4000, 1024) == (896, 1152)
    assert bucket(3000, 2000, 1024) == (1216, 832)
    assert bucket(1080, 1920, 1024) == (768, 1344)
    assert bucket(3000, 2000, 512) == (608, 416)
    assert bucket(100, 9000, 512) == (256, 1024)
    assert all(bucket(77, 77, resolution) == (resolution, resolution) for resolution in (32, 128, 512, 768, 1024))


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (33, 200), (200, 33), (64, 64), (50, 61)])
def test_a_image_and_its_mask_cover_their_size(shape):
    """Cut at the centre along one axis, whole along the other, and shown in proportion."""
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, side) for side in shape), indexing="ij")
    picture = torch.stack([rows, columns, rows])
    one = Concept(images=(picture,), masks=(columns[None],), resolution=128, crop="bucket")
    (size,) = one.sizes(0)
    state = (g := generator()).get_state()
    shown, mask = instance(one, 0, size, g)
    assert torch.equal(g.get_state(), state)
    assert shown.shape == (3, *size) and torch.allclose(shown[1:2], mask)
    low, high = shown[:2].amin(dim=(1, 2)), shown[:2].amax(dim=(1, 2))
    assert torch.allclose(low, 1 - high, atol=0.03)  # an odd number of pixels is cut off
    parts = high - low
    assert parts.max() > 0.98
    expected = min(size[0] / size[1] / (shape[0] / shape[1]), size[1] / size[0] / (shape[1] / shape[0]))
    assert parts.min().item() == pytest.approx(expected, abs=0.04)


def test_a_pool_for_each_size_in_proportion():
    """Twelve views of three, two and one images, each pool showing its own images in turn; then drawn so, too."""
    pools = paired(12).pools(small.models(), concept(), generator())
    steps = [next(pools) for _ in range(900)]
    shown = {tuple(pool.mean.shape): pool.images for pool in steps}
    assert shown == {
        (6, 4, 3, 5): (0, 2, 4, 0, 2, 4),
        (4, 4, 5, 3): (1, 5, 1, 5),
        (2, 4, 4, 4): (3, 3),
    }
    for shape in shown:
        assert sum(pool.mean.shape == shape for pool in steps) / 900 == pytest.approx(shape[0] / 12, abs=0.04)


def test_fresh_views_are_of_one_size_in_proportion():
    pools = paired(0).pools(small.models(), concept(), generator())
    steps = [next(pools) for _ in range(600)]
    pictures = [picture for pool in steps for picture in pool.images]
    for pool in steps:
        assert {SIZES[picture] for picture in pool.images} == {tuple(8 * side for side in pool.mean.shape[-2:])}
    for size in set(SIZES):
        share = sum(SIZES[pool.images[0]] == size for pool in steps) / 600
        assert share == pytest.approx(SIZES.count(size) / 6, abs=0.05)
    for picture in range(6):
        assert pictures.count(picture) / len(pictures) == pytest.approx(1 / 6, abs=0.04)


@pytest.mark.parametrize("pool", [0, 8])
@pytest.mark.parametrize(
    ("shapes", "crop"), [(SHAPES, "center"), (SHAPES, "random"), ([(64, 64)] * 3, "bucket"), ([(48, 80)], "bucket")]
)
def test_the_only_size_is_not_drawn(shapes, crop, pool):
    """The generator gives the images of fresh views and what is done to them, nothing else: as ever for squares."""
    models, own, ours, theirs = small.models(), concept(shapes, crop), generator(), generator()
    pools = paired(pool).pools(models, own, ours)
    found = [next(pools) for _ in range(4)]
    every = range(len(shapes))
    order = cycle(every) if pool else (choose(every, theirs) for _ in count())
    views = augmentation.views(own, order, own.sizes(0)[0], theirs, partial(AUGMENT, p=0.5, grayscale_p=0.0))
    expected = [encode_views(models, views, pool)] * 4 if pool else [encode_views(models, views, 4) for _ in found]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.mean, other.mean) and one.images == other.images
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("pool", [0, 24])
def test_masks_follow_into_the_batch(pool):
    """Images that are their own masks: whatever is done to them, latents and masks of a batch say the same."""
    masks = tuple((image[:1] > 0.5).float() for image in concept().images)
    own = concept(images=tuple(mask.expand(3, -1, -1) for mask in masks), masks=masks)
    models, g, views, seen = small.models(), generator(), paired(pool, p=0.9), set()
    batches = views.batches(models, own, views.pools(models, own, g), g)
    for _ in range(30):
        batch = next(batches)
        assert batch.latents.shape[-2:] == batch.masks.shape[-2:]
        assert torch.allclose(batch.latents[:, :1], batch.masks * 4 - 2, atol=0.06)  # a deviation of 0.01
        seen.add(tuple(8 * side for side in batch.masks.shape[-2:]))
    assert seen == set(SIZES)


@pytest.mark.parametrize("views", [0, 12])
def test_training_takes_every_size_and_reports(tmp_path, views):
    models, seen = small.models(), []

    def note(module, args, named):
        seen.append(tuple(8 * side for side in named["sample"].shape[-2:]))

    models.unet.register_forward_pre_hook(note, with_kwargs=True)
    recipe = TextBoost(steps=12, batch_size=2, views=views, captions=small.CAPTIONS)
    result = train.train(Run(concept=concept(), recipe=recipe), models, tmp_path)
    assert set(seen) == set(SIZES) and len(seen) == 12
    assert [step["step"] for step in result.history] == list(range(1, 13))
    assert all(math.isfinite(step["loss"]) for step in result.history)


def test_previews_have_the_first_images_shape(tmp_path):
    recipe = TextBoost(steps=1, batch_size=1, views=6, captions=small.CAPTIONS)
    preview = Preview(prompts=("{}", "a {}", "one {}"), every=1, images_per_prompt=2, steps=2)
    for first, (height, width) in enumerate(SIZES[:2]):
        run = Run(concept=concept(SHAPES[first:]), recipe=recipe)
        train.train(run, small.models(), tmp_path / str(first), preview=preview)
        with Image.open(tmp_path / str(first) / "previews" / "step_0001.png") as picture:
            assert picture.size == (2 * width, 3 * height)


def test_a_bucket_is_part_of_what_decides_a_result():
    run = Run(concept=concept(), recipe=TextBoost())
    square = dataclasses.replace(run, concept=concept(crop="center"))
    assert run.digest("model") != square.digest("model")
