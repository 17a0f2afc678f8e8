"""Whom a training reports to."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..training.stage import StepReport


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Whom a training tells how it goes. An exception from any of them ends it and keeps what was learned."""

    on_step: Callable[[StepReport], None] = lambda report: None
    on_preview: Callable[[int, Image.Image], None] = lambda step, picture: None
    on_notice: Callable[[str], None] = lambda sentence: None
    on_warning: Callable[[str], None] = lambda sentence: None  # what the user should set differently
    finish: Callable[[], bool] = lambda: False  # asked after every step: whether to end the stage with what it learned
