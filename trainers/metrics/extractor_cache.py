"""The feature extractors of a process, each loaded once."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .clip import ExtractorConfig
from .feature_extractors import FeatureExtractor


@dataclass
class ExtractorCache:
    """The judges of a process, each loaded once, on the CPU between uses; `clear` forgets them.

    Args:
        folders: where weights may lie, asked anew each time.
    """

    folders: Callable[[], Iterable[str | Path]] = tuple
    loaded: dict[Hashable, FeatureExtractor] = field(default_factory=dict)

    def check(self, choice: ExtractorConfig) -> None:
        """Raise `ValueError` where the choice cannot be loaded, as far as names and folders tell; quick."""
        choice.check(self.folders())

    def load(self, choice: ExtractorConfig) -> FeatureExtractor:
        """The judge of a choice.

        Raises:
            ValueError: there is no such file or architecture, or the two do not belong together.
        """
        if choice.key not in self.loaded:
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be moved outside of it
                self.loaded[choice.key] = choice.read(self.folders())
        return self.loaded[choice.key]

    @contextlib.contextmanager
    def on(self, device: torch.device | str, choice: ExtractorConfig) -> Iterator[FeatureExtractor]:
        """The judge of a choice on `device`, back on the CPU afterwards; on the CPU where the device has no room."""
        extractor = self.load(choice)
        try:
            _move(extractor, device)
            yield extractor
        finally:
            _move(extractor, "cpu")

    def clear(self) -> None:
        """Forget what is loaded, so that its memory is free."""
        self.loaded.clear()


@torch.inference_mode(False)  # the mode in which it was made
def _move(extractor: FeatureExtractor, device: torch.device | str) -> None:
    try:
        extractor.module.to(device)
    except RuntimeError:  # no room
        extractor.module.to("cpu")
