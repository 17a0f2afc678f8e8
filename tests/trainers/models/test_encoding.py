"""The autoencoder where memory is short: in halves, then without the U-Net beside it."""

import contextlib

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.latents import View, encode_views


def views(count):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(count, 3, 32, 32, generator=generator)
    return iter([View(pixels=picture, mask=picture[:1]) for picture in pictures])


def limited(models, most, alone=0):
    """Models whose autoencoder has room for `most` images, and for `alone` while the U-Net is away."""
    encode, room, sizes = models.encode_images, [most], []

    def encode_images(pixels):
        sizes.append(len(pixels))
        if len(pixels) > room[-1]:
            raise torch.cuda.OutOfMemoryError("out of memory, on purpose")
        return encode(pixels)

    @contextlib.contextmanager
    def unet_aside():
        room.append(alone)
        yield
        room.pop()

    models.encode_images, models.unet_aside = encode_images, unet_aside
    return models, sizes, room


@pytest.mark.parametrize(
    ("most", "alone", "expected"), [(8, 0, [8]), (3, 0, [8, 4, 2, 2, 4, 2, 2]), (0, 8, [8, 4, 2, 1, 1, 1, 2, 4])]
)
def test_the_latents_are_the_same(most, alone, expected):
    whole = encode_views(small.models(), views(8), 8)
    with pytest.raises(ValueError, match="^The 1000000000 images to encode have .* million pixels together, more than"):
        encode_views(small.models(), views(8), 10**9)
    models, sizes, room = limited(small.models(), most, alone)
    parts = encode_views(models, views(8), 8)
    assert sizes == expected and room == [most]
    assert torch.equal(parts.mean, whole.mean) and torch.equal(parts.masks, whole.masks)


def test_what_never_fits_ends():
    models, sizes, _ = limited(small.models(), 0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        encode_views(models, views(2), 2)
    assert sizes == [2, 1, 1]


def test_another_error_is_not_hidden():
    models = small.models()
    models.encode_images = lambda pixels: torch.zeros(2) + torch.zeros(3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        encode_views(models, views(2), 2)


def test_the_unet_comes_back_as_it_was():
    models = small.models()
    before = {name: value.clone() for name, value in models.unet.state_dict().items()}
    with models.unet_aside():
        assert models.unet.device.type == "cpu"
    assert all(torch.equal(value, before[name]) for name, value in models.unet.state_dict().items())
