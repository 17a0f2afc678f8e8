"""LPIPS as a feature extractor: the settings that name its weights, the search for them, and their loading."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..settings import setting
from ..text import quoted, reason
from .feature_extractors import FeatureExtractor
from .weight_files import WHERE, below

LPIPS_NAME = "LPIPS (AlexNet)"


@dataclass(frozen=True, kw_only=True)
class LpipsConfig:
    """Settings of LPIPS with AlexNet, by the package `lpips` (Zhang et al., arXiv 1801.03924)."""

    lpips_weights: str = setting(
        "lpips_alex.safetensors",
        f"Weights of LPIPS as a .safetensors file below {WHERE}; the help page says how to make it.",
        advanced=True,
    )

    @property
    def key(self) -> "LpipsConfig":
        return self

    def missing(self, folders: Iterable[str | Path]) -> str:
        """Say why LPIPS cannot be measured, for a report; "" if it can."""
        if not importlib.util.find_spec("lpips"):
            return "the package lpips is not installed"
        try:
            below(self.lpips_weights.strip(), folders, "LPIPS")
        except ValueError as error:
            return str(error).partition(":")[0]
        return ""

    def check(self, folders: Iterable[str | Path]) -> None:
        """Raise `ValueError` where it cannot be loaded; quick."""
        if why := self.missing(folders):
            raise ValueError(f"LPIPS cannot be measured: {why}.")

    def files(self, folders: Iterable[str | Path]) -> list[Path]:
        """Return the file of its weights, as `read` finds it."""
        self.check(folders)
        return [below(self.lpips_weights.strip(), folders, "LPIPS")]

    def read(self, folders: Iterable[str | Path]) -> FeatureExtractor:
        """Load the model.

        Raises:
            ValueError: the weights are not there, or are another model's.
        """
        self.check(folders)
        import lpips

        with torch.random.fork_rng(devices=[]):
            model = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
        _fill(model, below(self.lpips_weights.strip(), folders, "LPIPS"))
        return lpips_extractor(model.requires_grad_(False).eval())


def _fill(model: torch.nn.Module, file: Path) -> None:
    """Load a file's weights; the package has its linear layers twice, as `lin0` and `lins.0`, a file once."""
    try:
        keys = model.load_state_dict(load_file(file), strict=False)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The LPIPS weights {quoted(file.name)} cannot be read ({reason(error)}): save them again."
        ) from error
    except RuntimeError as error:
        keys = str(error)
    known = ("lins.", "scaling_layer.")
    if isinstance(keys, str) or keys.unexpected_keys or any(not key.startswith(known) for key in keys.missing_keys):
        raise ValueError(f"The LPIPS weights {quoted(file.name)} are not those of LPIPS with AlexNet: make them again.")


def lpips_extractor(model: torch.nn.Module) -> FeatureExtractor:
    """Wrap a loaded `lpips.LPIPS`."""
    from torchvision.transforms.functional import to_tensor

    def distances(ones, others):
        device = next(model.parameters()).device
        pairs = ((to_tensor(image.convert("RGB"))[None].to(device) for image in pair) for pair in zip(ones, others))
        return torch.cat([model(*pair, normalize=True).flatten().float().cpu() for pair in pairs])

    return FeatureExtractor(name=LPIPS_NAME, distances=distances, module=model)
