"""What the nodes that score have in common: widgets, references, judges on the host's device, and outputs."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainers.data.concept import Concept
from ..trainers.evaluation.prompt_sets import CLASS_WORD, REMOVED
from ..trainers.evaluation.report import Report
from ..trainers.evaluation.scorer import GeneratedImage, References, Scorer, ScorerConfig, foreground
from ..trainers.images import to_pil
from ..trainers.reports import grid
from .host import internals
from .host.session import check_interrupted, extractors, training_device
from .reference_images import connected
from .schema import filled, widgets
from .sockets import ReportSocket


def shared_inputs() -> list[io.Input]:
    """Widgets and sockets that stand before a scoring node's own."""
    return [
        io.String.Input("label", default="trained", tooltip="What this is called in reports, such as base or trained."),
        io.Combo.Input(
            "compare_with", options=[CLASS_WORD, REMOVED],
            tooltip="What stands for the subject in the text that CLIP-T compares with: its class word, or nothing.",
        ),
        io.Boolean.Input(
            "mask_references", default=False,
            tooltip="Show CLIP-I and DINO only what the masks of the references leave; the rest is gray.",
        ),
    ]  # fmt: skip


def metric_inputs() -> list[io.Input]:
    return widgets(ScorerConfig())


def unseen_input() -> io.Input:
    return io.Image.Input(
        "unseen", optional=True, tooltip="More pictures of the subject, which the training did not see."
    )


def outputs() -> list[io.Output]:
    return [
        ReportSocket.Output(display_name="report"),
        io.Image.Output(display_name="grid"),
        io.Image.Output(display_name="table"),
        io.String.Output(display_name="summary"),
    ]


def results(report: Report) -> tuple:
    """What the outputs give."""
    reports = [report]
    return report, grid.grid(reports)[None], grid.table(reports)[None], report.summary()


def scorer_config(values: dict) -> ScorerConfig:
    """The judges that the widgets describe, checked as far as names and folders tell.

    Raises:
        ValueError: one cannot be found.
    """
    chosen = filled(ScorerConfig(), values)
    chosen.check(extractors)
    return chosen


def references(concept: Concept, unseen: Sequence[Tensor], with_masks: bool) -> References:
    """The concept's pictures, and the connected ones."""
    seen = [to_pil(image) for image in concept.images]
    if with_masks:
        if not concept.masks:
            raise ValueError("The references have no masks: connect them to Load References, or leave mask_references.")
        seen = [foreground(image, mask[0]) for image, mask in zip(seen, concept.masks, strict=True)]
    return References(seen=seen, unseen=[to_pil(image) for image in connected({"unseen": [*unseen]})])


@contextlib.contextmanager
def session() -> Iterator[torch.device]:
    """The device on which judges score; afterwards they are forgotten, so that their memory is the graph's again."""
    try:
        yield training_device()
    finally:
        extractors.clear()
        gc.collect()
        internals.soft_empty_cache()


def make_room(size: int) -> None:
    """Have the host move models of its own off the device, as far as `size` bytes and what they compute with need."""
    internals.free_memory(3 * size // 2, training_device())


def scored(
    scorer_config: ScorerConfig,
    label: str,
    drawn: Sequence[GeneratedImage],
    subject: References,
    say: Callable[[str], None],
    on_pictures,
) -> Report:
    """The report, by judges that leave the memory afterwards."""

    def on_extractor(sentence: str) -> None:
        say(sentence)
        check_interrupted()

    with session() as device:
        scoring = Scorer(
            scorer_config=scorer_config,
            extractors=extractors,
            device=device,
            on_extractor=on_extractor,
            on_images=on_pictures,
            make_room=make_room,
        )
        return scoring.report(label.strip() or "unnamed", drawn, subject)
