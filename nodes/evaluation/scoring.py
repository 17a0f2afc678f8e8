"""Shared by the nodes that score: inputs, references, metric models on the host's device, and outputs."""

from collections.abc import Callable, Sequence

from comfy_api.latest import io
from torch import Tensor

from ...trainers.data.concept import Concept
from ...trainers.evaluation.prompt_sets import CLASS_WORD, REMOVED
from ...trainers.evaluation.report import Report
from ...trainers.evaluation.scorer import GeneratedImage, References, Scorer, ScorerConfig, foreground
from ...trainers.images import to_pil
from ...trainers.reports import grid
from ..host import internals
from ..host import session as host_session
from ..host.session import extractors, training_device
from ..reference_images import connected
from ..sockets import ReportSocket


def label_input() -> io.Input:
    """Return the widget that names an evaluation."""
    return io.String.Input(
        "label", default="trained", tooltip="Name of this evaluation in reports, such as base model."
    )


def comparison_inputs() -> list[io.Input]:
    """Return the widgets of what images are compared with."""
    return [
        io.Combo.Input(
            "compare_with", options=[CLASS_WORD, REMOVED], advanced=True,
            tooltip="Text in place of the subject when CLIP-T compares: the class word, or nothing (removed).",
        ),
        io.Boolean.Input(
            "mask_references", default=False, advanced=True,
            tooltip="Mask the reference images with the concept's masks for CLIP-I and DINO; the rest becomes gray.",
        ),
    ]  # fmt: skip


def held_out_input() -> io.Input:
    """Return the socket for reference images that no training used."""
    return io.Image.Input(
        "held_out", optional=True, tooltip="Held-out images of the subject, which the training did not use."
    )


def outputs() -> list[io.Output]:
    """Return the outputs that scoring nodes share, see `results`."""
    return [
        ReportSocket.Output(display_name="report", tooltip="For Report, next to others."),
        io.Image.Output(display_name="grid", tooltip="All images, a row per prompt, a column per seed."),
        io.Image.Output(display_name="table", tooltip="Mean and standard deviation of each score."),
        io.String.Output(display_name="summary", tooltip="The scores and their models, and the seconds per image."),
    ]


def results(report: Report) -> tuple:
    """Return the values of the shared outputs."""
    reports = [report]
    return report, grid.grid(reports)[None], grid.table(reports)[None], report.summary()


def references(concept: Concept, held_out: Sequence[Tensor], with_masks: bool) -> References:
    """Return the concept's reference images, and the held-out ones.

    Raises:
        ValueError: masks are asked for, but the concept has none.
    """
    concept = concept.members[0]  # of several subjects the one that {} stands for
    seen = [to_pil(image) for image in concept.images]
    if with_masks:
        if not concept.masks:
            raise ValueError(
                "The reference images have no masks: connect masks to Load References, or switch mask_references off."
            )
        seen = [foreground(image, mask[0]) for image, mask in zip(seen, concept.masks, strict=True)]
    return References(seen=seen, unseen=[to_pil(image) for image in connected({"held_out": [*held_out]})])


def make_room(size: int) -> None:
    """Have the host move its own models off the device for `size` bytes of weights and their activations."""
    internals.free_memory(3 * size // 2, training_device())


def scored(
    scorer_config: ScorerConfig,
    label: str,
    generated: Sequence[GeneratedImage],
    subject: References,
    notify: Callable[[str], None],
    on_images: Callable[[int], None],
) -> Report:
    """Return the report; the metric models are unloaded afterwards.

    Args:
        notify: given sentences for the node.
        on_images: given the number of images scored since the last call; may raise to interrupt.
    """

    def on_extractor(sentence: str) -> None:
        notify(sentence)
        host_session.check_interrupted()

    with host_session.memory_returned():
        scoring = Scorer(
            scorer_config=scorer_config,
            extractors=extractors,
            device=training_device(),
            on_extractor=on_extractor,
            on_images=on_images,
            make_room=make_room,
        )
        return scoring.report(label.strip() or "unnamed", generated, subject)
