"""The concept: reference images of a subject and the words around it."""

import re
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from ..digest import draw
from ..images import bucket, cut
from ..text import quoted

SMALLEST = 32  # pixels on a side: below, a collage has no room for its tiles, and the U-Net none for its levels
LONGEST = 64  # characters of a placeholder
RARE = 3  # tokens of a class word that the model hardly knows
ENLARGED = 1.5  # times that an image may be magnified without a word


@dataclass(frozen=True, kw_only=True)
class Concept:
    """The subject: its reference images and the words around it.

    Attributes:
        images: reference images `[3, h, w]` in 0..1, of any size.
        masks: for each image where the subject is, `[1, h, w]` in 0..1, or `None` for all images.
        class_word: names the subject's class, such as "dog".
        placeholder_token: stands for this subject in prompts.
        initializer_token: words whose embeddings the placeholder token starts from; empty means the class word.
        resolution: side of the square training images in pixels, a multiple of 8; 0 means the model's own.
        crop: how an image that is not square is cut: "center" or "random" to a square, "bucket" to a shape near its
            own, of no more pixels than the square; "auto" is "random" or "center", as the method's authors do.
        captions: what each image shows, with `{}` for the subject; "" for a template instead; empty for none.
        class_images: images `[3, h, w]` in 0..1 of other members of the class, for prior preservation.
        class_captions: what each of them shows; "" and empty for "a photo of a" and the class word.
        placeholder_tokens: for each image that of its subject, where several are learned together; empty for one.
        class_words: their class words, for each image.
        initializer_tokens: what their placeholder tokens start from, for each image.
    """

    images: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] | None = None
    class_word: str = "dog"
    placeholder_token: str = "<concept>"
    initializer_token: str = ""
    resolution: int = 0
    crop: str = "auto"
    captions: tuple[str, ...] = ()
    class_images: tuple[Tensor, ...] = ()
    class_captions: tuple[str, ...] = ()
    placeholder_tokens: tuple[str, ...] = ()
    class_words: tuple[str, ...] = ()
    initializer_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.images:
            raise ValueError("There is no image to learn from: connect an image, or name a folder of images.")
        named = {"reference image": self.images, "class image": self.class_images}
        for name, tensors in {**named, "mask": self.masks or ()}.items():
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise ValueError(f"A {name} contains NaN or infinite values: connect another one.")
        for name, images in named.items():
            if any(min(image.shape[-2:]) < 8 for image in images):
                raise ValueError(f"A {name} is smaller than 8 pixels on a side: use a larger one.")
        check_class_word(self.class_word)
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
        words = self.placeholder_tokens, self.class_words, self.initializer_tokens
        if any(words) and {len(each) for each in words} != {len(self.images)}:
            raise ValueError("The words of several subjects are not one for each image: join the concepts again.")
        for token in self.placeholder_tokens:
            check_word(token)

    def _check_captions(self) -> None:
        if self.captions and len(self.captions) != len(self.images):
            raise ValueError(
                f"The number of captions ({len(self.captions)}) is not that of the images ({len(self.images)}): "
                "write one for each image, an empty one where a template should stand."
            )
        if self.class_captions and len(self.class_captions) != len(self.class_images):
            raise ValueError(
                f"The number of class captions ({len(self.class_captions)}) is not that of the class images "
                f"({len(self.class_images)}): write one for each image, an empty one for a photo of the class word."
            )
        for caption in filter(None, self.captions):
            if "{}" not in caption:
                raise ValueError(
                    f"The caption {quoted(caption)} has no place for your subject: write {{}} there, "
                    "as in 'A house in {}'."
                )

    @property
    def initializer(self) -> str:
        """Words whose embeddings the placeholder token starts from."""
        return self.initializer_token.strip() or self.class_word

    @property
    def members(self) -> tuple["Concept", ...]:
        """A concept for each subject that is learned, without class images; itself where there is only one."""
        tokens = self.placeholder_tokens
        if not tokens:
            return (self,)
        return tuple(
            self._member([i for i, own in enumerate(tokens) if own == token]) for token in dict.fromkeys(tokens)
        )

    def _member(self, images: list[int]) -> "Concept":
        def own(values: tuple) -> tuple:
            return tuple(values[i] for i in images) if values else ()

        return replace(
            self,
            images=own(self.images),
            masks=own(self.masks or ()) or None,
            captions=own(self.captions),
            class_word=self.class_words[images[0]],
            placeholder_token=self.placeholder_tokens[images[0]],
            initializer_token=self.initializer_tokens[images[0]],
            class_images=(),
            class_captions=(),
            placeholder_tokens=(),
            class_words=(),
            initializer_tokens=(),
        )

    @property
    def words(self) -> list[tuple[str, str]]:
        """Each subject's placeholder token, with the words that it starts from."""
        return [(member.placeholder_token, member.initializer) for member in self.members]

    def subjects(self, with_class_word: bool) -> list[str]:
        """Return the subject of each image as it stands in a prompt."""
        known = {member.placeholder_token: member.subject(with_class_word) for member in self.members}
        return [known[token] for token in self.placeholder_tokens or [self.placeholder_token] * len(self.images)]

    def check_single(self, method: str) -> None:
        """Raise `ValueError` where several subjects are joined, of which the method can learn one."""
        if (count := len(self.members)) > 1:
            raise ValueError(
                f"{method} learns one subject, and {count} are joined: train them one after the other, or use another "
                "method."
            )

    def at_resolution(self, model_resolution: int) -> int:
        """Return the side of square training images in pixels."""
        return self.resolution or model_resolution

    def sizes(self, model_resolution: int) -> list[tuple[int, int]]:
        """Return height and width at which each image is trained."""
        resolution = self.at_resolution(model_resolution)
        if self.crop == "bucket":
            return [bucket(image.shape[-2], image.shape[-1], resolution) for image in self.images]
        return [(resolution, resolution)] * len(self.images)

    def advice(self, model_resolution: int, class_tokens: int) -> list[str]:
        """Return sentences about what will make a result worse, though it can be trained.

        Args:
            class_tokens: number of tokens that the class word is split into.
        """
        found, resolution = [], self.at_resolution(model_resolution)
        if model_resolution >= 1024 and resolution < 0.75 * model_resolution:
            found.append(
                f"Training at {resolution} pixels, while the model was made for {model_resolution}: set the resolution "
                "of Load References to 0."
            )
        sizes = [
            (image.shape[-2:], size) for image, size in zip(self.images, self.sizes(model_resolution), strict=True)
        ]
        factors = [max(size[0] / own[0], size[1] / own[1]) for own, size in sizes]
        if max(factors) > ENLARGED:
            worst = factors.index(max(factors))
            height, width = sizes[worst][0]
            found.append(
                f"Image {worst + 1} is only {width} x {height} pixels and is enlarged {factors[worst]:.1f} times: use "
                "a larger one."
            )
        if class_tokens >= RARE:
            found.append(
                f"The class word {quoted(self.class_word)} is no common word, the model reads it in {class_tokens} "
                "pieces: use a common one, such as dog, mug or backpack."
            )
        return found

    def subject(self, with_class_word: bool) -> str:
        """Return the subject as it stands in a prompt: `<dog>` or `<dog> dog`."""
        return f"{self.placeholder_token} {self.class_word}" if with_class_word else self.placeholder_token

    def class_prompts(self) -> list[str]:
        """Return the prompt of each class image."""
        captions = self.class_captions or [""] * len(self.class_images)
        return [caption or self.class_prompt for caption in captions]

    @property
    def class_prompt(self) -> str:
        """Prompt for a class image without a caption; it has no placeholder token."""
        return f"a photo of a {self.class_word}"

    def caption(self, image: int) -> str:
        """Return the caption of an image, with `{}` for the subject; "" for none."""
        return self.captions[image] if self.captions else ""


def check_class_word(word: str) -> None:
    """Raise `ValueError` unless there is a class word."""
    if not word.strip():
        raise ValueError("The class word is empty: write the class of your subject, such as dog.")


def check_word(token: str) -> None:
    """Raise `ValueError` unless `token` can be a placeholder in prompts."""
    if not token:
        raise ValueError("The placeholder is empty: write one word that stands for your subject, such as <dog>.")
    if len(token) > LONGEST:
        raise ValueError(f"The placeholder is {len(token)} characters long: use at most {LONGEST}, such as <dog>.")
    if not re.fullmatch(r"[\w<>*-]+", token) or not any(letter.isalnum() for letter in token):
        raise ValueError(
            f"The placeholder {quoted(token)} is not one word: use letters, digits and <>*-_, such as <dog>."
        )


def instance(concept: Concept, index: int, size: tuple[int, int], generator: Generator) -> tuple[Tensor, Tensor | None]:
    """Return reference image `index` and its mask at a height and width, cropped at the same place."""
    position = draw(generator) if _is_drawn(concept, index, size) else 0.5
    mask = None if concept.masks is None else cut(concept.masks[index], *size, position)
    return cut(concept.images[index], *size, position), mask


def _is_drawn(concept: Concept, index: int, size: tuple[int, int]) -> bool:
    """Return whether every view crops the image at another place: at random, where there is something to cut off."""
    height, width = concept.images[index].shape[-2:]
    return concept.crop == "random" and height * size[1] != width * size[0]


class Cuts:
    """A concept's images and masks as they are trained: cropped once, unless every view draws its crop.

    On a CUDA device they stay there, and so do their views; other devices may lack the operations.
    """

    def __init__(self, concept: Concept, device: torch.device):
        self.concept, self.device = concept, device if device.type == "cuda" else torch.device("cpu")
        self.made: dict[tuple, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, index: int, size: tuple[int, int], generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Return the same as `instance`, on the device."""
        if _is_drawn(self.concept, index, size):
            return self._cut(index, size, generator)
        if (index, size) not in self.made:
            self.made[index, size] = self._cut(index, size, generator)
        return self.made[index, size]

    def _cut(self, index: int, size: tuple[int, int], generator: Generator) -> tuple[Tensor, Tensor | None]:
        pixels, mask = instance(self.concept, index, size, generator)
        return pixels.to(self.device), None if mask is None else mask.to(self.device)
