"""How alike two pictures are, and how well a picture fits its prompt: CLIP-T, CLIP-I and DINO as cosines of a
backbone's features.

Plain functions of pictures (PIL images) and prompts, plus the loaders of any open_clip, timm or transformers backbone
by name or from a local file. Which pictures to compare and what to do with the scores is the caller's business: no
host, no reports here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A loaded model as two functions: pictures -> features, and (CLIP only) prompts -> features, both [N, dim]
    before normalising.
    """

    name: str
    image_features: Callable[[Sequence], Tensor]
    text_features: Callable[[Sequence[str]], Tensor] | None = None


def load_clip(name: str, pretrained: str, device: str = "cpu") -> Backbone:
    """Any open_clip model: its name ("ViT-B-32") and a pretrained tag ("openai") or the path of a local weight file."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(pretrained), device=device)
    model, tokenize = model.eval(), open_clip.get_tokenizer(name)

    def image_features(images):
        return model.encode_image(_pixels(preprocess, images, device)).float()

    def text_features(prompts):
        return model.encode_text(tokenize(list(prompts)).to(device)).float()

    return Backbone(name=name, image_features=image_features, text_features=text_features)


def load_image_encoder(name: str, checkpoint: str | Path | None = None, device: str = "cpu") -> Backbone:
    """A DINO-like encoder. A timm name (weights from checkpoint, else timm's own), or a transformers name or folder."""
    import timm

    if timm.is_model(name):
        return _load_timm(name, checkpoint, device)
    if checkpoint:
        raise ValueError(
            f"{name} is no timm model; for transformers give the folder itself as the name, without a checkpoint"
        )
    return _load_transformers(name, device)


def _load_timm(name, checkpoint, device) -> Backbone:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    path = str(checkpoint) if checkpoint else ""
    model = timm.create_model(name, pretrained=not checkpoint, checkpoint_path=path, num_classes=0).eval().to(device)
    preprocess = create_transform(**resolve_model_data_config(model), is_training=False)
    return Backbone(name=name, image_features=lambda images: model(_pixels(preprocess, images, device)).float())


def _load_transformers(name, device) -> Backbone:
    from transformers import AutoImageProcessor, AutoModel

    model, processor = AutoModel.from_pretrained(name).eval().to(device), AutoImageProcessor.from_pretrained(name)

    def image_features(images):
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(device)
        return model(**inputs).last_hidden_state[:, 0].float()

    return Backbone(name=str(name), image_features=image_features)


def _pixels(preprocess, images, device) -> Tensor:
    return torch.stack([preprocess(image.convert("RGB")) for image in images]).to(device)


@torch.no_grad()
def features(encode: Callable, items: Sequence, batch_size: int = 32) -> Tensor:
    """Features of pictures or prompts as the backbone gives them, [N, dim] on the CPU; batch_size items are encoded
    at a time.
    """
    return torch.cat([encode(items[start : start + batch_size]).cpu() for start in range(0, len(items), batch_size)])


def unit_features(encode: Callable, items: Sequence) -> Tensor:
    """The same, each of length 1."""
    return F.normalize(features(encode, items), dim=-1)


def image_similarity(backbone: Backbone, images: Sequence, references: Sequence) -> Tensor:
    """cosine(picture, reference) of every pair, [images, references]. CLIP-I or DINO, by the backbone."""
    return unit_features(backbone.image_features, images) @ unit_features(backbone.image_features, references).T


def clip_image(clip: Backbone, images: Sequence, references: Sequence) -> Tensor:
    """CLIP-I of each picture, [images]: its mean cosine to the references (seen or held-out ones), negative cosines
    counted as 0.
    """
    return image_similarity(clip, images, references).clamp(min=0).mean(1)


def dino(encoder: Backbone, images: Sequence, references: Sequence) -> Tensor:
    """The same on a DINO encoder's class-token (or, for convolutional ones, pooled) features, [images]."""
    return image_similarity(encoder, images, references).clamp(min=0).mean(1)


def clip_text(clip: Backbone, images: Sequence, prompts: Sequence[str]) -> Tensor:
    """CLIP-T of each picture with its own prompt, [images].

    A placeholder must already be the class word: see plain_prompt.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts: CLIP-T needs one prompt for each picture")
    return (unit_features(clip.image_features, images) * unit_features(clip.text_features, prompts)).sum(1)


def plain_prompt(prompt: str, placeholder: str, class_word: str) -> str:
    """The prompt that CLIP-T compares with: the placeholder becomes the class word ("V C" must not become "C C"); an
    empty class word removes it, as the DVAR paper does.
    """
    words = prompt.replace(f"{placeholder} {class_word}" if class_word else placeholder, placeholder)
    return " ".join(words.replace(placeholder, class_word).split())
