"""Folders of images as people and programs leave them: what belongs to an image, and what is left out."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from personalize.trainers import images
from personalize.trainers.images import find_images, read_images


def write(folder, *names, size=(16, 24)):
    for name in names:
        kind = "JPEG" if Path(name).suffix in (".jfif", ".jpe") else None
        Image.new("RGB", size, (255, 0, 0)).save(folder / name, format=kind)


def test_images_come_in_natural_order_and_of_every_ending(tmp_path):
    write(tmp_path, "img10.png", "img2.png", "Img1.jpg", "a.avif", "b.jfif", "c.jpe", "img02.png")
    found, left_out = find_images(tmp_path)
    names = ["a.avif", "b.jfif", "c.jpe", "Img1.jpg", "img02.png", "img2.png", "img10.png"]
    assert [each.path.name for each in found] == names and left_out == []
    assert len(read_images(found)[0]) == 7


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.png.txt"])
def test_a_caption_may_have_three_names(tmp_path, name):
    write(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text("{} on\ngrass\n")
    found, left_out = find_images(tmp_path)
    assert read_images(found)[1] == ("{} on grass", "") and left_out == []


def test_what_belongs_to_no_image_is_named(tmp_path):
    write(tmp_path, "a.png", "b-masklabel.png")
    others = ("._IMG 1.png", ".DS_Store", "clip.gif", "notes.txt", "a.json", "a.caption")
    for name in ("a.txt", *others):
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.png").mkdir()
    found, left_out = find_images(tmp_path)
    assert [each.path.name for each in found] == ["a.png"]
    assert sorted(left_out) == sorted([*others, "b-masklabel.png"])


@pytest.mark.parametrize(
    ("image", "text", "mask"),
    [
        ("IMG_1.JPG", "IMG_1.TXT", "img_1-MaskLabel.PNG"),  # of a camera, of another system
        ("Cafe\u0301.png", "Caf\u00e9.txt", "Caf\u00e9-masklabel.png"),  # of a Mac, and of others
    ],
)
def test_a_caption_and_a_mask_may_be_spelled_otherwise(tmp_path, image, text, mask):
    for name in (image, mask):
        Image.new("RGB", (16, 16), "white").save(tmp_path / name, format="PNG")
    (tmp_path / text).write_text("a {} on grass")
    files, left = find_images(tmp_path)
    assert len(files) == 1 and left == [] and files[0].caption() == "a {} on grass" and files[0].mask().all()


def test_folders_of_images_are_named(tmp_path):
    """As kohya's scripts want them: `dataset/10_sks dog/1.png`."""
    (tmp_path / "10_sks dog").mkdir()
    write(tmp_path / "10_sks dog", "1.png")
    (tmp_path / "empty").mkdir()
    name = re.escape(f"The folder {tmp_path.name!r} holds no images, but its folder '10_sks dog' does: name")
    with pytest.raises(ValueError, match=f"^{name} that one.$"):
        find_images(tmp_path)
    write(tmp_path, "2.png")
    assert find_images(tmp_path)[1] == ["10_sks dog/"]


def test_a_mask_beside_an_image_is_its_mask(tmp_path):
    """White where the subject is, as OneTrainer writes it; an image without one among others is learned whole."""
    write(tmp_path, "a.jpg", "b.png")
    mask = Image.new("L", (16, 24))
    mask.paste(255, (0, 0, 8, 24))
    mask.save(tmp_path / "a-masklabel.png")
    found, left_out = find_images(tmp_path)
    (first, second), _, masks = read_images(found)
    assert left_out == [] and first.shape == second.shape == (3, 24, 16)
    assert masks[0][:, :, :8].eq(1).all() and masks[0][:, :, 8:].eq(0).all() and masks[1].eq(1).all()
    assert masks[0].shape == masks[1].shape == (1, 24, 16)
    (tmp_path / "a-masklabel.png").unlink()
    assert read_images(find_images(tmp_path)[0])[2] is None


@pytest.mark.parametrize(
    ("size", "sentence"),
    [((8, 8), "is 8 x 8 pixels but its image 16 x 24: use a mask"), ((16, 24), "is empty: paint the subject white")],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, size, sentence):
    write(tmp_path, "a.png")
    Image.new("L", size).save(tmp_path / "a-masklabel.png")
    with pytest.raises(ValueError, match=f"^The mask 'a-masklabel.png' {sentence}"):
        read_images(find_images(tmp_path)[0])


def test_the_size_of_all_images_is_known_before_one_is_unpacked(tmp_path, monkeypatch):
    write(tmp_path, "a.png", "b.png", size=(100, 60))
    monkeypatch.setattr(images, "MOST_PIXELS", 11_999)
    monkeypatch.setattr(images, "read_image", lambda file: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="^The images have 0 million pixels together, more than 0: make them smaller"):
        read_images(find_images(tmp_path)[0])
    monkeypatch.setattr(images, "read_image", lambda file: torch.zeros(3, 60, 100))
    assert len(read_images(find_images(tmp_path)[0][:1])[0]) == 1


def test_four_images_of_nearly_a_hundred_million_pixels_are_refused_by_their_headers(tmp_path, monkeypatch):
    for name in "abcd":
        Image.new("1", (8800, 8800)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(images, "read_image", lambda file: pytest.fail("it was unpacked"))
    with pytest.raises(
        ValueError, match="^The images have 309 million pixels together, more than 300: make them smaller"
    ):
        read_images(find_images(tmp_path)[0])


def test_masks_count_too(tmp_path, monkeypatch):
    write(tmp_path, "a.png", "a-masklabel.png", size=(100, 60))
    monkeypatch.setattr(images, "MOST_PIXELS", 11_999)
    monkeypatch.setattr(images, "read_image", lambda file: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="^The images have 0 million pixels together, more than 0: make them smaller"):
        read_images(find_images(tmp_path)[0])
