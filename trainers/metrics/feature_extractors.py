"""Feature extractors: loaded open_clip, timm and transformers models as functions of Pillow images and prompts.

Which model a user names and where its file lies is decided in clip.py, dino.py and lpips.py; scores are computed in
metrics.py.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip import CLIP


def lacking(*items: Sequence) -> NoReturn:
    """Stand for what a model does not compute."""
    raise TypeError("This feature extractor does not compute that: use one of another kind.")


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """A loaded model as functions, computed on the device of its weights.

    Attributes:
        image_features: images to features `[N, dim]`, not normalized.
        text_features: prompts to features `[N, dim]`, not normalized; CLIP only.
        distances: two equally long sequences of images to distances `[N]`; LPIPS only.
        module: its weights.
    """

    name: str
    image_features: Callable[[Sequence], Tensor] = lacking
    text_features: Callable[[Sequence[str]], Tensor] = lacking
    distances: Callable[[Sequence, Sequence], Tensor] = lacking
    module: nn.Module = field(default_factory=nn.Module)


def load_clip(name: str, weights: str | Path, device: str = "cpu", *, quick_gelu: bool = False) -> FeatureExtractor:
    """Load an open_clip model with the weights of a .safetensors file; nothing is unpickled, nothing downloaded.

    Args:
        name: an architecture of open_clip ("ViT-B-32"), or "local-dir:" and a folder that holds open_clip_config.json.
        quick_gelu: use it whatever the architecture's name says, as OpenAI's weights need it.

    Raises:
        OSError, SafetensorError: the file cannot be read.
        RuntimeError: its weights are not exactly those of the architecture. open_clip's own loader would stretch
            position embeddings of another image size or context length without a word.
    """
    import open_clip
    from safetensors.torch import load_file

    # From a folder open_clip would read the weights itself, pickled ones among them.
    options = {"load_weights": False} if name.startswith("local-dir:") else {}
    # It initializes weights at random first, and warns of that and of files it would have read: irrelevant here.
    with torch.random.fork_rng(devices=[]), _unheard("initialized randomly", "Multiple checkpoints"):
        model, _, preprocess = open_clip.create_model_and_transforms(name, force_quick_gelu=quick_gelu, **options)
    model.load_state_dict(load_file(weights))
    return clip_extractor(
        name, model.requires_grad_(False).to(device).eval(), preprocess, open_clip.get_tokenizer(name)
    )


@contextlib.contextmanager
def _unheard(*words: str) -> Iterator[None]:
    """Hide records of the root logger that contain one of these words."""
    log = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return not any(each in record.getMessage() for each in words)

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def clip_extractor(name: str, model: "CLIP", preprocess: Callable, tokenize: Callable) -> FeatureExtractor:
    """Wrap an open_clip model with its transform and its tokenizer."""

    def device():
        return model.logit_scale.device

    def image_features(images):
        return model.encode_image(_pixels(preprocess, images, device())).float()

    def text_features(prompts):
        return encode_text(model, tokenize(list(prompts)).to(device())).float()

    return FeatureExtractor(name=name, image_features=image_features, text_features=text_features, module=model)


class _TextTower(nn.Module):
    """`encode_text` as a module's own call, which is what `functional_call` replaces weights in."""

    def __init__(self, model: "CLIP"):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


def encode_text(model: "CLIP", ids: Tensor) -> Tensor:
    """Return `model.encode_text(ids)` for ids `[N, context]`, without the padding behind the longest prompt.

    CLIP's text mask is causal and the feature is read at the end token, which has the largest id, so that nothing
    behind it can matter: 77 positions for a prompt of 7 are eleven times the work. Other text towers get
    the padding as well.
    """
    if getattr(model, "text_pool_type", "") != "argmax" or getattr(model, "attn_mask", None) is None:
        return model.encode_text(ids)
    length = int(ids.argmax(dim=1).max()) + 1
    short = {
        "model.positional_embedding": model.positional_embedding[:length],
        "model.attn_mask": model.attn_mask[:length, :length],
    }
    return torch.func.functional_call(_TextTower(model), short, (ids[:, :length],))


def load_image_encoder(name: str, checkpoint: str | Path | None = None, device: str = "cpu") -> FeatureExtractor:
    """Load an image encoder: a timm name (weights of `checkpoint`, else timm's own), or a transformers name or folder.

    Raises:
        OSError, SafetensorError: the file cannot be read.
        ValueError, RuntimeError: there is no such model, or the weights are another model's.
    """
    import timm

    if timm.is_model(name):
        return _load_timm(name, checkpoint, device)
    if checkpoint:
        raise ValueError(
            f"{name} is not a model of timm: for transformers give its folder as the name, without a checkpoint."
        )
    return _load_transformers(name, device)


def _load_timm(name, checkpoint, device) -> FeatureExtractor:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    path = str(checkpoint) if checkpoint else ""
    model = timm.create_model(name, pretrained=not checkpoint, checkpoint_path=path, num_classes=0)
    model = model.requires_grad_(False).eval().to(device)
    preprocess = create_transform(**resolve_model_data_config(model), is_training=False)

    def image_features(images):
        return model(_pixels(preprocess, images, _device(model))).float()

    return FeatureExtractor(name=name, image_features=image_features, module=model)


def _load_transformers(name, device) -> FeatureExtractor:
    from transformers import AutoImageProcessor, AutoModel

    safe = {"trust_remote_code": False, "local_files_only": Path(name).is_dir()}
    model, info = AutoModel.from_pretrained(name, use_safetensors=True, output_loading_info=True, **safe)
    if any(not key.startswith("pooler.") for key in info["missing_keys"]):  # else they would be random, with a warning
        raise ValueError(f"the weights of {Path(name).name} lack parts of the model")
    model = model.requires_grad_(False).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(name, **safe)

    def image_features(images):
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(_device(model))
        return model(**inputs).last_hidden_state[:, 0].float()

    return FeatureExtractor(name=str(name), image_features=image_features, module=model)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _pixels(preprocess, images, device) -> Tensor:
    return torch.stack([preprocess(image.convert("RGB")) for image in images]).to(device)
