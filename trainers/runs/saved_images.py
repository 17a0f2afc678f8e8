"""A run's images in its folder, from which the run can be repeated.

    images/00.png  masks/00.png  class_images/00.png  exact.safetensors

PNGs of 8 bits are exact for images from files of 8 bits. Others - of 16 bits, resized in the graph, a mask made of
transparency - are also saved as tensors, in exact.safetensors.
"""

from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..data.concept import Concept
from ..images import pixels, to_pil

KINDS = {"images": "RGB", "masks": "L", "class_images": "RGB"}  # of a concept, and Pillow's mode
EXACT = "exact.safetensors"


def write(concept: Concept, folder: Path) -> None:
    """Write everything that `read` needs."""
    exact = {}
    for kind, mode in KINDS.items():
        images = getattr(concept, kind) or ()
        if images:
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for i, tensor in enumerate(images):
            image = to_pil(tensor.expand(3, -1, -1)).convert(mode)
            files.save_png(image, folder / kind / f"{i:02d}.png")
            if not torch.equal(pixels(image), tensor):
                # A copy: safetensors refuses an image that was selected twice.
                exact[f"{kind}/{i:02d}"] = tensor.clone(memory_format=torch.contiguous_format)
    if exact:
        with files.replaced(folder / EXACT) as temporary:
            save_file(exact, temporary)


def read(folder: Path) -> dict[str, tuple[Tensor, ...] | None]:
    """Read the images of a concept: its `images`, `masks` (`None` for none) and `class_images`.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        exact = files.tensors(folder / EXACT)[0] if (folder / EXACT).exists() else {}
        found = {kind: _images(folder, kind, exact) for kind in KINDS}
    except (OSError, SyntaxError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"The images of the run {folder.name} cannot be read: copy its whole folder once more."
        ) from error
    return found | {"masks": found["masks"] or None}


def _images(folder: Path, kind: str, exact: dict[str, Tensor]) -> tuple[Tensor, ...]:
    paths = sorted((folder / kind).glob("*.png"), key=lambda path: int(path.stem))
    return tuple(
        pixels(Image.open(path).convert(KINDS[kind])) if (name := f"{kind}/{path.stem}") not in exact else exact[name]
        for path in paths
    )
