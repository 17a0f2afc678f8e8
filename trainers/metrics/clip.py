"""CLIP as a feature extractor: the settings that name one, and the search for its weights in given folders.

Nothing is unpickled, and nothing is downloaded unless the settings allow it. The caller decides which folders are
allowed; scores are computed in metrics.py.
"""

import json
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from ..device import is_out_of_memory
from ..settings import setting
from ..text import quoted, reason
from .feature_extractors import FeatureExtractor, load_clip
from .weight_files import WHERE, below, from_hub

PUBLISHED, PUBLISHED_FILE = "openai", "open_clip_model.safetensors"  # open_clip's tag, and the file's name on the hub
CONFIG = "open_clip_config.json"
WEIGHTS = (PUBLISHED_FILE, "open_clip_pytorch_model.safetensors")  # of a folder, before any other


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Settings that name a CLIP; the default is the DVAR paper's."""

    clip_model: str = setting(
        "ViT-B-32",
        "Architecture of the CLIP metric model by its open_clip name, such as ViT-B-32 or ViT-L-14-336; OpenAI's "
        "weights in a file need a name that ends in -quickgelu.",
        advanced=True,
    )
    clip_weights: str = setting(
        "",
        f"Weights of the CLIP metric model: a .safetensors file or a folder with {CONFIG} below {WHERE}; empty: the "
        "weights that OpenAI published.",
        advanced=True,
    )
    clip_download: bool = setting(
        False,
        "Download the published CLIP weights, once, if no file is given (600 MB for ViT-B-32).",
        advanced=True,
        later=True,
    )

    @property
    def key(self) -> "ClipConfig":
        """Identity of what is loaded, however it was obtained."""
        return replace(self, clip_download=False)

    def check(self, folders: Iterable[str | Path]) -> None:
        """Raise `ValueError` where it cannot be loaded, as far as names and folders show; quick."""
        if self.clip_weights.strip() or not self.clip_download:
            _find(self, folders)
        else:  # only a download shows whether it can be downloaded
            _check_architecture(self.clip_model)
            _repository(self.clip_model)

    def read(self, folders: Iterable[str | Path]) -> FeatureExtractor:
        """Load the model.

        Raises:
            ValueError: there is no such file or architecture, or the two do not belong together.
        """
        return _load(self, _find(self, folders))

    def files(self, folders: Iterable[str | Path]) -> list[Path]:
        """Return the files of its weights, as `read` finds them."""
        return [_find(self, folders).weights]


class ExtractorConfig(Protocol):
    """Settings that name a feature extractor: `ClipConfig`, `DinoConfig` and `LpipsConfig`."""

    @property
    def key(self) -> Hashable: ...
    def check(self, folders: Iterable[str | Path]) -> None: ...
    def read(self, folders: Iterable[str | Path]) -> FeatureExtractor: ...
    def files(self, folders: Iterable[str | Path]) -> list[Path]: ...


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Arguments for `load_clip`."""

    name: str
    weights: Path
    quick_gelu: bool = False


def _find(choice: ClipConfig, folders: Iterable[str | Path]) -> _Found:
    if not choice.clip_weights.strip():
        _check_architecture(choice.clip_model)
        return _published(choice.clip_model, choice.clip_download)
    path = below(choice.clip_weights.strip(), folders, "CLIP")
    if path.is_dir():
        _check_config(_config_of(path), quoted(path.name))
        return _Found(name=f"local-dir:{path}", weights=_weights_in(path))
    _check_architecture(choice.clip_model)
    return _Found(name=choice.clip_model, weights=path)


def _config_of(folder: Path) -> dict:
    """Read the architecture in an open_clip folder."""
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"The folder {quoted(folder.name)} has no {CONFIG} that describes a model: save it there with open_clip, "
            "or name the .safetensors file itself."
        ) from None


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()] or sorted(folder.glob("*.safetensors"))
    if not found:
        raise ValueError(f"The folder {quoted(folder.name)} has no .safetensors file: put the CLIP's weights there.")
    return found[0]


def _check_architecture(name: str) -> None:
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        close = get_close_matches(name, known) or ["ViT-B-32", "ViT-L-14-336"]
        raise ValueError(
            f"The CLIP {quoted(name)} is not a model of open_clip: write a name such as {', '.join(close)}."
        )
    _check_config(open_clip.get_model_config(name), name)


def _check_config(config: dict, name: str) -> None:
    """Refuse towers of transformers, and timm's by address: they are fetched from the hub when they are built."""
    text, vision = (config.get(part) or {} for part in ("text_cfg", "vision_cfg"))
    if "hf_model_name" in text or "hf_tokenizer_name" in text or ":" in str(vision.get("timm_model_name")):
        raise ValueError(
            f"The CLIP {name} reads text with parts that are not in its own file: choose one of OpenAI's kind, such as "
            "ViT-B-32 or ViT-L-14-336."
        )


def _repository(name: str) -> tuple[str, bool]:
    """Return the hub's repository of OpenAI's weights of an architecture, and whether they need the quick GELU."""
    from open_clip.pretrained import get_pretrained_cfg

    known = get_pretrained_cfg(name, PUBLISHED)
    if not known.get("hf_hub"):
        raise ValueError(
            f"The CLIP {name} has no weights published by OpenAI: name its file below {WHERE} as clip_weights."
        )
    return known["hf_hub"].strip("/"), known.get("quick_gelu", False)


def _published(name: str, download: bool) -> _Found:
    """Find OpenAI's weights as safetensors in the hub's cache on this computer or, if allowed, on the hub."""
    repository, quick_gelu = _repository(name)
    (path,) = from_hub("CLIP", name, repository, [PUBLISHED_FILE], download)
    return _Found(name=name, weights=path, quick_gelu=quick_gelu)


def _load(choice: ClipConfig, found: _Found) -> FeatureExtractor:
    name = quoted(choice.clip_weights.strip() or found.weights.name)
    try:
        return load_clip(found.name, found.weights, quick_gelu=found.quick_gelu)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The CLIP weights {name} cannot be read ({reason(error)}): save them there again.") from error
    except (RuntimeError, LookupError, TypeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        model = "the model of its folder" if found.name.startswith("local-dir:") else choice.clip_model
        raise ValueError(
            f"The CLIP weights {name} are not those of {model}: set clip_model to what they were made for (a file of "
            "the transformers library, or of a vision tower alone, does not do)."
        ) from error
