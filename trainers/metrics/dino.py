"""DINO and other image encoders as feature extractors: the settings that name one, and the search for its weights.

Nothing is unpickled, and nothing is downloaded unless the settings allow it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..settings import setting
from ..text import quoted, reason
from .feature_extractors import FeatureExtractor, load_image_encoder
from .weight_files import WHERE, below, from_hub

TIMM_FILE = "model.safetensors"  # of a timm model on the hub
PARTS = ("config.json", "preprocessor_config.json", "model.safetensors")  # of one of the transformers library
# Types of the transformers library whose first output row is an image's feature.
KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn")
# What transformers may fetch from the hub, whatever else is off: other models, kernels, formats of weights.
ELSEWHERE = {
    "auto_map", "attn_implementation", "backbone", "backbone_config", "quantization_config", "use_pretrained_backbone",
    "use_timm_backbone",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Settings that name an image encoder; the default is the DreamBooth and DVAR papers' DINO ViT-S/16."""

    dino_model: str = setting(
        "vit_small_patch16_224.dino",
        "Image encoder that measures identity, by its timm name or its name on the hub, such as facebook/dinov2-large.",
        advanced=True,
    )
    dino_weights: str = setting(
        "",
        "Weights of that image encoder: a .safetensors file for a timm name, or a folder of the transformers library, "
        f"below {WHERE}; empty: the published weights.",
        advanced=True,
    )
    dino_download: bool = setting(
        False,
        "Download the published DINO weights, once, if no file is given (90 MB for ViT-S/16).",
        advanced=True,
        later=True,
    )

    @property
    def key(self) -> "DinoConfig":
        """Identity of what is loaded, however it was obtained."""
        return replace(self, dino_download=False)

    def check(self, folders: Iterable[str | Path]) -> None:
        """Raise `ValueError` where it cannot be loaded, as far as names and folders show; quick."""
        if self.dino_weights.strip() or not self.dino_download:
            self._find(folders)
        else:  # only a download shows whether it can be downloaded
            _check_name(self.dino_model)

    def read(self, folders: Iterable[str | Path]) -> FeatureExtractor:
        """Load the model.

        Raises:
            ValueError: there is no such file or model, or the two do not belong together.
        """
        model, file = self._find(folders)
        name = quoted(self.dino_weights.strip() or self.dino_model)
        try:
            with torch.random.fork_rng(devices=[]):  # it initializes weights at random before it reads them
                found = load_image_encoder(model, file)
        except SafetensorError as error:
            raise ValueError(f"The DINO weights {name} cannot be read ({reason(error)}): save them again.") from error
        except (OSError, RuntimeError, LookupError, TypeError, ValueError, AssertionError) as error:
            if "allocate memory" in str(error):
                raise
            raise ValueError(
                f"The DINO weights {name} are not those of {quoted(self.dino_model) if file else 'their folder'}: set "
                "dino_model to what they were made for, or save them there again."
            ) from error
        return replace(found, name=self.dino_weights.strip() or self.dino_model)

    def files(self, folders: Iterable[str | Path]) -> list[Path]:
        """Return the files of its weights, as `read` finds them."""
        model, file = self._find(folders)
        return [file] if file else sorted(Path(model).glob("*.safetensors"))

    def _find(self, folders: Iterable[str | Path]) -> tuple[str, Path | None]:
        """Return name and checkpoint for `load_image_encoder`."""
        if not self.dino_weights.strip():
            return _published(self.dino_model, self.dino_download)
        path = below(self.dino_weights.strip(), folders, "DINO")
        if path.is_dir():
            _check_folder(path)
            return str(path), None
        import timm

        if not timm.is_model(self.dino_model):
            close = get_close_matches(self.dino_model, timm.list_models()) or ["vit_small_patch16_224.dino"]
            raise ValueError(
                f"The DINO {quoted(self.dino_model)} is not a model of timm, which a single file needs: write a "
                f"name such as {', '.join(close)}, or name a folder of the transformers library."
            )
        return self.dino_model, path


def _check_folder(folder: Path) -> None:
    missing = [name for name in PARTS if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"The folder {quoted(folder.name)} lacks {' and '.join(missing)}: save model and image processor there "
            "with transformers, as safetensors."
        )
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        kind = str(config["model_type"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"The config.json of {quoted(folder.name)} does not describe a model: save it there again."
        ) from None
    if kind not in KINDS:
        raise ValueError(
            f"The model in {quoted(folder.name)} is {quoted(kind)}, which is not known as an image encoder: use one of "
            f"{', '.join(KINDS)}."
        )
    if elsewhere := [name for name in config if name.removeprefix("_") in ELSEWHERE and config[name]]:
        raise ValueError(
            f"The config.json of {quoted(folder.name)} asks for more than the folder holds, by {quoted(elsewhere[0])}: "
            "take that line out, or use another folder."
        )


def _check_name(name: str) -> None:
    """Accept a timm model with published weights, or `owner/model` as on the hub."""
    import timm

    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    if not on_hub and not (timm.is_model(name) and _timm_repository(name)):
        close = get_close_matches(name, timm.list_pretrained()) or ["vit_small_patch16_224.dino"]
        raise ValueError(
            f"The DINO {quoted(name)} has no weights published by timm: use {', '.join(close)}, or one of "
            f"the hub such as facebook/dinov2-large, or name a file below {WHERE} as dino_weights."
        )


def _timm_repository(name: str) -> str:
    import timm

    known = timm.models.get_pretrained_cfg(name)
    return (known.hf_hub_id or "") if known else ""


def _published(name: str, download: bool) -> tuple[str, Path | None]:
    """Find weights in the hub's cache on this computer or, if allowed, on the hub."""
    import timm

    _check_name(name)
    if timm.is_model(name):
        (file,) = from_hub("DINO", name, _timm_repository(name), [TIMM_FILE], download)
        return name, file
    folder = from_hub("DINO", name, name, PARTS, download)[0].parent
    _check_folder(folder)
    return str(folder), None
