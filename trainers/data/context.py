"""Services that a training uses besides its models, its data and its random numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..metrics.extractor_cache import ExtractorCache


@dataclass(frozen=True, kw_only=True)
class Context:
    """Services for a recipe while it prepares its stages, and for monitors while they evaluate.

    Attributes:
        cache: a folder for what is costly to compute; `None` caches nothing.
        notice: receives a sentence about progress; may end the training by raising.
        extractors: the feature extractors that a recipe or a monitor names in its settings.
    """

    cache: Path | None = None
    notice: Callable[[str], None] = lambda sentence: None
    extractors: ExtractorCache = field(default_factory=ExtractorCache)
