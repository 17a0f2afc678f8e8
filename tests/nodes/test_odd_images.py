"""Every kind of image file, and of IMAGE, is read as a viewer shows it: in process, through Load References."""

import numpy as np
import pytest
import torch

from personalize.tests.support import odd_images

pytestmark = pytest.mark.comfy


@pytest.fixture
def load_references(tmp_path, monkeypatch):
    """`load_references(image=None, **inputs)`: the images of the CONCEPT, `[3, h, w]` each."""
    import folder_paths

    from personalize.nodes.load_references import LoadReferences

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    shown = {i.id: i.default for i in LoadReferences.define_schema().inputs if getattr(i, "default", None) is not None}

    def load(image=None, **values):
        inputs = {name: [value] for name, value in (shown | {"crop": "center"} | values).items()}
        images = None if image is None else {"image0": [image]}
        return LoadReferences.execute(**inputs, images=images).result[0].images

    return load


@pytest.mark.parametrize("name", odd_images.GOOD)
def test_a_file_shows_what_a_viewer_shows(load_references, tmp_path, name):
    write, color = odd_images.GOOD[name]
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / name)
    (picture,) = load_references(folder="one")
    assert picture.shape[0] == 3 and picture.dtype == torch.float32
    seen = (picture * 255).flatten(1)
    tolerance = 2.0 if name.lower().endswith("jpg") else 0.51
    assert np.allclose(seen.T.numpy(), color, atol=tolerance), seen[:, :3]


def test_a_turned_photo_is_upright(load_references, tmp_path):
    (tmp_path / "one").mkdir()
    odd_images.turned(tmp_path / "one" / "a.jpg")
    assert load_references(folder="one")[0].shape == (3, 2 * odd_images.SIDE, odd_images.SIDE)


@pytest.mark.parametrize(
    ("values", "seen"),
    [([0.2, 0.4, 0.6], [0.2, 0.4, 0.6]), ([0.3], [0.3] * 3), ([1, 0, 0, 0.5], [1, 0.5, 0.5]), ([0, 0, 0, 0], [1] * 3)],
)
def test_an_image_of_any_channels_is_seen_over_white(load_references, values, seen):
    (picture,) = load_references(torch.tensor(values, dtype=torch.float32).expand(1, 16, 16, -1))
    assert torch.allclose(picture, torch.tensor(seen, dtype=torch.float32)[:, None, None].expand(3, 16, 16))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.rand(1, 16, 16, 2), "has 2 channels: connect an RGB, RGBA or grayscale image"),
        (torch.rand(16, 16, 3), "The input images received no IMAGE: connect one"),
        (torch.rand(0, 16, 16, 3), "There is no reference image"),
        (torch.full((1, 16, 16, 3), torch.inf), "contains NaN or infinite values"),
    ],
)
def test_an_odd_image_gets_one_sentence(load_references, image, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_references(image)
