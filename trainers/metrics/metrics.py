"""Scores as plain functions of features: CLIP-T, CLIP-I, DINO, diversity, LPIPS."""

import re
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..text import any_of
from .feature_extractors import FeatureExtractor


@torch.no_grad()
def features(encode: Callable, items: Sequence, batch_size: int = 32) -> Tensor:
    """Return features of images or prompts, `[N, dim]` on the CPU, encoding `batch_size` items at a time."""
    return torch.cat([encode(items[start : start + batch_size]).cpu() for start in range(0, len(items), batch_size)])


def unit_features(encode: Callable, items: Sequence) -> Tensor:
    """Return features of images or prompts, `[N, dim]` on the CPU, each of Euclidean length 1."""
    return F.normalize(features(encode, items), dim=-1)


def image_similarity(extractor: FeatureExtractor, images: Sequence, references: Sequence) -> Tensor:
    """Return `cosine(image, reference)` of every pair, `[images, references]`."""
    return unit_features(extractor.image_features, images) @ unit_features(extractor.image_features, references).T


def clip_image(
    clip: FeatureExtractor, images: Sequence, references: Sequence, *, floor: bool = True, best: bool = False
) -> Tensor:
    """Return CLIP-I of each image, `[images]`: its mean cosine to the references.

    Args:
        floor: negative cosines count as 0.
        best: the highest cosine instead of the mean.
    """
    cosines = image_similarity(clip, images, references)
    cosines = cosines.clamp(min=0) if floor else cosines
    return cosines.amax(1) if best else cosines.mean(1)


def dino(
    encoder: FeatureExtractor, images: Sequence, references: Sequence, *, floor: bool = True, best: bool = False
) -> Tensor:
    """Return DINO of each image, `[images]`, as `clip_image` does.

    Features are those of the class token, or pooled ones of a convolutional encoder.
    """
    return clip_image(encoder, images, references, floor=floor, best=best)


def clip_text(clip: FeatureExtractor, images: Sequence, prompts: Sequence[str]) -> Tensor:
    """Return CLIP-T of each image with its own prompt, `[images]`: the cosine of both features.

    Prompts have no placeholder token: see `plain_prompt`.

    Raises:
        ValueError: there are more or fewer prompts than images.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts: give one prompt for each image.")
    return (unit_features(clip.image_features, images) * unit_features(clip.text_features, prompts)).sum(1)


@torch.no_grad()
def diversity(lpips: FeatureExtractor, images: Sequence) -> float | None:
    """Return the mean distance over all pairs of one prompt's images, all of one size; `None` for fewer than two."""
    pairs = list(combinations(images, 2))
    if not pairs:
        return None
    return float(lpips.distances([one for one, _ in pairs], [other for _, other in pairs]).cpu().double().mean())


def feature_distances(encoder: FeatureExtractor) -> FeatureExtractor:
    """Return an extractor whose distance is `1 - cosine` of two images' features: diversity without LPIPS."""

    def distances(ones, others):
        one, other = (unit_features(encoder.image_features, images) for images in (ones, others))
        return 1 - (one * other).sum(1)

    return FeatureExtractor(name=f"1 - cosine, {encoder.name}", distances=distances, module=encoder.module)


def plain_prompt(prompt: str, placeholder: str, class_word: str) -> str:
    """Return the prompt that CLIP-T compares with: the class word in the placeholder's place, "V C" as "C".

    An empty class word removes the placeholder, as in the DVAR paper.
    """
    subject = any_of([placeholder, *([f"{placeholder} {class_word}"] if class_word else [])])
    return " ".join(re.sub(subject, lambda found: class_word, prompt).split())
