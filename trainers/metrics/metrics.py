"""Scores as plain functions of features: CLIP-T, CLIP-I, DINO, diversity, LPIPS."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from .feature_extractors import FeatureExtractor


@torch.no_grad()
def features(encode: Callable, items: Sequence, batch_size: int = 32) -> Tensor:
    """Features of pictures or prompts as the backbone gives them, [N, dim] on the CPU; batch_size items are encoded
    at a time.
    """
    return torch.cat([encode(items[start : start + batch_size]).cpu() for start in range(0, len(items), batch_size)])


def unit_features(encode: Callable, items: Sequence) -> Tensor:
    """The same, each of length 1."""
    return F.normalize(features(encode, items), dim=-1)


def image_similarity(extractor: FeatureExtractor, images: Sequence, references: Sequence) -> Tensor:
    """cosine(picture, reference) of every pair, [images, references]. CLIP-I or DINO, by the backbone."""
    return unit_features(extractor.image_features, images) @ unit_features(extractor.image_features, references).T


def clip_image(clip: FeatureExtractor, images: Sequence, references: Sequence) -> Tensor:
    """CLIP-I of each picture, [images]: its mean cosine to the references (seen or held-out ones), negative cosines
    counted as 0.
    """
    return image_similarity(clip, images, references).clamp(min=0).mean(1)


def dino(encoder: FeatureExtractor, images: Sequence, references: Sequence) -> Tensor:
    """The same on a DINO encoder's class-token (or, for convolutional ones, pooled) features, [images]."""
    return image_similarity(encoder, images, references).clamp(min=0).mean(1)


def clip_text(clip: FeatureExtractor, images: Sequence, prompts: Sequence[str]) -> Tensor:
    """CLIP-T of each picture with its own prompt, [images].

    A placeholder must already be the class word: see plain_prompt.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts: CLIP-T needs one prompt for each picture")
    return (unit_features(clip.image_features, images) * unit_features(clip.text_features, prompts)).sum(1)


@torch.no_grad()
def diversity(lpips: FeatureExtractor, images: Sequence) -> float | None:
    """DIV of one prompt's pictures, all of one size: the mean distance over all pairs; `None` of fewer than two."""
    pairs = list(combinations(images, 2))
    if not pairs:
        return None
    return float(lpips.distances([one for one, _ in pairs], [other for _, other in pairs]).cpu().double().mean())


def feature_distances(encoder: FeatureExtractor) -> FeatureExtractor:
    """An image encoder in LPIPS's place: 1 - cosine of two pictures' features; a report has to name it so."""

    def distances(ones, others):
        one, other = (unit_features(encoder.image_features, images) for images in (ones, others))
        return 1 - (one * other).sum(1)

    return FeatureExtractor(name=f"1 - cosine, {encoder.name}", distances=distances, module=encoder.module)


def plain_prompt(prompt: str, placeholder: str, class_word: str) -> str:
    """The prompt that CLIP-T compares with: the placeholder becomes the class word ("V C" must not become "C C"); an
    empty class word removes it, as the DVAR paper does.
    """
    words = prompt.replace(f"{placeholder} {class_word}" if class_word else placeholder, placeholder)
    return " ".join(words.replace(placeholder, class_word).split())
