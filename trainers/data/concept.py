"""The concept: reference images of a subject and the words around it."""

import re
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..digest import draw
from ..images import bucket, cut
from ..text import quoted

SMALLEST = 32  # pixels on a side: below, a collage has no room for its tiles, and the U-Net none for its levels
LONGEST = 64  # characters of a placeholder


@dataclass(frozen=True, kw_only=True)
class Concept:
    """The subject: its reference pictures and the words around it.

    Attributes:
        images: reference pictures `[3, h, w]` in 0..1, of any size.
        masks: for each picture where the subject is, `[1, h, w]` in 0..1, or `None` for all pictures.
        class_word: what kind of thing it is, such as "dog".
        placeholder_token: the new word that means this subject.
        initializer_token: words whose embeddings the new word starts from; empty means the class word.
        resolution: side of the square training pictures in pixels, a multiple of 8; 0 means the model's own.
        crop: how a picture that is not square is cut: "center" or "random" to a square, "bucket" to a shape near its
            own, of no more pixels than the square.
        captions: for each picture what it shows, with `{}` for the subject; "" where templates say it; empty for none.
        class_images: pictures `[3, h, w]` in 0..1 of other things of that kind, whose look prior preservation keeps.
        class_captions: what each of them shows; "" and empty for "a photo of a" and the class word.
    """

    images: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] | None = None
    class_word: str = "dog"
    placeholder_token: str = "<concept>"
    initializer_token: str = ""
    resolution: int = 0
    crop: str = "center"
    captions: tuple[str, ...] = ()
    class_images: tuple[Tensor, ...] = ()
    class_captions: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.images:
            raise ValueError("There is no picture to learn from: connect an image, or name a folder of pictures.")
        pictures = {"reference picture": self.images, "class picture": self.class_images}
        for name, tensors in {**pictures, "mask": self.masks or ()}.items():
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise ValueError(f"A {name} holds values that are no numbers: look at it, and connect another one.")
        for name, images in pictures.items():
            if any(min(image.shape[-2:]) < 8 for image in images):
                raise ValueError(f"A {name} is smaller than 8 pixels on a side: use a larger one.")
        if not self.class_word:
            raise ValueError("The class word is empty: write what kind of thing your subject is, such as dog.")
        check_word(self.placeholder_token)
        if 0 < self.resolution < SMALLEST:
            raise ValueError(
                f"The resolution {self.resolution} is too small: use {SMALLEST} or more, or 0 for the model's own."
            )
        if self.resolution % 8:
            raise ValueError(
                f"The resolution {self.resolution} is not a multiple of 8: try {self.resolution // 8 * 8}."
            )
        self._check_captions()

    def _check_captions(self) -> None:
        if self.captions and len(self.captions) != len(self.images):
            raise ValueError(
                f"The number of captions ({len(self.captions)}) is not that of the pictures ({len(self.images)}): "
                "write one for each picture, an empty one where templates should do."
            )
        if self.class_captions and len(self.class_captions) != len(self.class_images):
            raise ValueError(
                f"The number of class captions ({len(self.class_captions)}) is not that of the class pictures "
                f"({len(self.class_images)}): write one for each picture, an empty one for a photo of the class word."
            )
        for caption in filter(None, self.captions):
            if "{}" not in caption:
                raise ValueError(
                    f"The caption {quoted(caption)} does not say where your subject is: write {{}} in its place, "
                    "as in 'A house in {}'."
                )

    @property
    def initializer(self) -> str:
        return self.initializer_token.strip() or self.class_word

    def at_resolution(self, model_resolution: int) -> int:
        return self.resolution or model_resolution

    def sizes(self, model_resolution: int) -> list[tuple[int, int]]:
        """Height and width at which each picture is trained."""
        resolution = self.at_resolution(model_resolution)
        if self.crop == "bucket":
            return [bucket(*image.shape[-2:], resolution) for image in self.images]
        return [(resolution, resolution)] * len(self.images)

    def subject(self, with_class_word: bool) -> str:
        """The subject as it stands in a prompt: `<dog>` or `<dog> dog`."""
        return f"{self.placeholder_token} {self.class_word}" if with_class_word else self.placeholder_token

    def class_prompts(self) -> list[str]:
        """What each class picture shows."""
        captions = self.class_captions or [""] * len(self.class_images)
        return [caption or self.class_prompt for caption in captions]

    @property
    def class_prompt(self) -> str:
        """Something of that kind, without the new word."""
        return f"a photo of a {self.class_word}"

    def caption(self, picture: int) -> str:
        """The caption of a picture, with `{}` for the subject; "" for none."""
        return self.captions[picture] if self.captions else ""


def check_word(token: str) -> None:
    """Raise `ValueError` unless `token` can be a placeholder in prompts."""
    if not token:
        raise ValueError("The placeholder is empty: write one word that means your subject, such as <dog>.")
    if len(token) > LONGEST:
        raise ValueError(f"The placeholder is {len(token)} characters long: use at most {LONGEST}, such as <dog>.")
    if not re.fullmatch(r"[\w<>*-]+", token) or not any(letter.isalnum() for letter in token):
        raise ValueError(f"The placeholder {quoted(token)} must be one word, such as <dog>: letters, digits, <>*-_.")


def instance(concept: Concept, index: int, size: tuple[int, int], generator: Generator) -> tuple[Tensor, Tensor | None]:
    """Reference picture `index` and its mask at a height and width, cut at the same place."""
    position = draw(generator) if concept.crop == "random" else 0.5
    mask = None if concept.masks is None else cut(concept.masks[index], *size, position)
    return cut(concept.images[index], *size, position), mask


class Cuts:
    """A concept's pictures and masks as they are trained: cut once, but where every view draws its cut.

    On a CUDA device they stay there, and so does what is made of them; other devices may lack the operations.
    """

    def __init__(self, concept: Concept, device: torch.device):
        self.concept, self.device = concept, device if device.type == "cuda" else torch.device("cpu")
        self.made: dict[tuple, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, index: int, size: tuple[int, int], generator: Generator) -> tuple[Tensor, Tensor | None]:
        """See `instance`."""
        if self.concept.crop == "random":
            return self._cut(index, size, generator)
        if (index, size) not in self.made:
            self.made[index, size] = self._cut(index, size, generator)
        return self.made[index, size]

    def _cut(self, index: int, size: tuple[int, int], generator: Generator) -> tuple[Tensor, Tensor | None]:
        pixels, mask = instance(self.concept, index, size, generator)
        return pixels.to(self.device), None if mask is None else mask.to(self.device)
