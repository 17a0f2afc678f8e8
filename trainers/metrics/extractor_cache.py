"""The feature extractors of a process, each loaded once."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..text import joined
from .clip import ExtractorConfig
from .feature_extractors import FeatureExtractor
from .weight_files import digest


@dataclass
class ExtractorCache:
    """Feature extractors of a process, each loaded once, on the CPU between uses.

    Args:
        folders: folders of weights, called again each time.
    """

    folders: Callable[[], Iterable[str | Path]] = tuple
    loaded: dict[Hashable, tuple[list, FeatureExtractor]] = field(default_factory=dict)  # with their files' times

    def check(self, *configs: ExtractorConfig) -> None:
        """Raise one `ValueError` for all that cannot be loaded, as far as names and folders show; quick."""
        problems = []
        for config in configs:
            try:
                config.check(self.folders())
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError(joined(dict.fromkeys(problems)))

    def load(self, config: ExtractorConfig) -> FeatureExtractor:
        """Return the feature extractor of these settings, loaded if it is not.

        Raises:
            ValueError: there is no such file or architecture, or the two do not belong together.
        """
        written = [(path, path.stat().st_mtime_ns) for path in config.files(self.folders())]
        known, extractor = self.loaded.get(config.key, (None, None))
        if extractor is None or known != written:
            self.loaded.pop(config.key, None)  # its memory is free before the other is read
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be moved outside of it
                extractor = config.read(self.folders())
            self.loaded[config.key] = written, extractor
        return extractor

    def digest(self, configs: Iterable[ExtractorConfig]) -> str:
        """Return a digest of the weights of these settings, from their files; "" for none.

        Raises:
            ValueError: there is no such file or architecture.
        """
        files = [path for config in configs for path in config.files(self.folders())]
        return digest(files) if files else ""

    @contextlib.contextmanager
    def on(self, device: torch.device | str, config: ExtractorConfig) -> Iterator[FeatureExtractor]:
        """Yield a feature extractor on `device`, or on the CPU where the device has no room; on the CPU afterwards."""
        extractor = self.load(config)
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
