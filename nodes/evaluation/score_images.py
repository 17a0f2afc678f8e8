"""Score Images: scores images that other nodes generated."""

from comfy_api.latest import io

from ...trainers.evaluation.prompt_sets import CLASS_WORD
from ...trainers.evaluation.scorer import GeneratedImage
from ...trainers.images import to_pil
from ...trainers.metrics.metrics import plain_prompt
from ...trainers.text import as_lines, captions_of
from ..host import internals, session
from ..reference_images import connected
from ..schema import checked, valid
from ..sockets import EVALUATION_FOLDER, ConceptSocket
from . import scoring
from .metric_models import DEFAULTS, metric_models_input, used


class ScoreImages(io.ComfyNode):
    """Turns IMAGEs and their prompts into a REPORT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeScoreImages",
            display_name="Score Images",
            category=EVALUATION_FOLDER,
            description="Scores the identity, text alignment and diversity of images that any node generated.",
            search_aliases=["evaluate", "clip score", "clip-t", "clip-i", "dino", "lpips", "metrics"],
            # Prompt List and the stock nodes behind it return lists: together they are one report.
            is_input_list=True,
            inputs=[
                io.Image.Input("images", lazy=True, tooltip="Images to score."),
                ConceptSocket.Input("concept", tooltip="Subject with reference images, placeholder token, class word."),
                io.String.Input(
                    "prompts", default="", multiline=True,
                    tooltip="Prompts that the images were generated from: one per batch of a list, one line per image, "
                    "or one for all.",
                ),
                scoring.label_input(),
                *scoring.comparison_inputs(),
                scoring.held_out_input(),
                io.Mask.Input("mask", optional=True, tooltip="Masks of the subject, one per image, in their order."),
                metric_models_input(),
            ],
            outputs=scoring.outputs(),
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, label=None, metric_models=(DEFAULTS,)) -> bool | str:
        """Look for the metric models before the graph runs: without a link they are the defaults, a link is `None`.

        The host drops an answer about no widget.
        """
        return valid(used, metric_models[0])

    @classmethod
    def check_lazy_status(cls, images=(None,), metric_models=(None,), **others) -> list[str]:
        """Look for the metric models before the nodes behind `images`, a training perhaps, run for them."""
        used((metric_models or [None])[0])
        return ["images"] if images[0] is None else []

    @classmethod
    @checked
    def execute(
        cls, images, concept, prompts, label, compare_with, mask_references, held_out=(), mask=(), metric_models=(None,)
    ) -> io.NodeOutput:
        scorer_config = used((metric_models or [None])[0])
        subject = scoring.references(concept[0], held_out or [], mask_references[0])
        replacement = concept[0].class_word if compare_with[0] == CLASS_WORD else ""
        generated = _generated(images, prompts, mask or [], concept[0].placeholder_token, replacement)
        notify = session.notices(cls.hidden.unique_id if cls.hidden else "")
        progress = internals.ProgressBar(3 * len(generated) + 2 * (len(subject.seen) + len(subject.unseen)))

        def on_images(count: int) -> None:
            progress.update(count)
            session.check_interrupted()

        report = scoring.scored(scorer_config, label[0], generated, subject, notify, on_images)
        notify(report.summary().replace("\n", "; "))
        return io.NodeOutput(*scoring.results(report))


def _generated(
    batches: list, prompts: list[str], masks: list, placeholder: str, replacement: str
) -> list[GeneratedImage]:
    """Return each image with its prompt; images of one prompt count as its seeds 0, 1, ..."""
    images = [to_pil(image) for image in connected({"images": batches})]
    if not images:
        raise ValueError("There is no image to score: connect at least one.")
    texts = prompts_for(prompts, [len(batch) for batch in batches])
    cut = [mask for batch in masks for mask in batch.reshape(-1, *batch.shape[-2:])]
    if cut and len(cut) != len(images):
        raise ValueError(f"There are {len(images)} images but {len(cut)} masks: connect one mask per image.")
    seeds = [texts[:i].count(text) for i, text in enumerate(texts)]
    return [
        GeneratedImage(
            prompt=text, text=plain_prompt(text, placeholder, replacement), seed=seed, image=image, mask=mask
        )
        for image, text, seed, mask in zip(images, texts, seeds, cut or [None] * len(images), strict=True)
    ]


def prompts_for(prompts: list[str], batches: list[int]) -> list[str]:
    """Return a prompt for each image of batches of these sizes.

    Raises:
        ValueError: the number of prompts fits neither images nor batches.
    """
    if len(prompts) == len(batches) > 1:
        return [line for text, size in zip(prompts, batches, strict=True) for line in _of_batch(text, size)]
    lines = [*captions_of(as_lines(prompts))]
    count = sum(batches)
    if len(lines) == count:
        return lines
    if len(lines) == 1:
        return lines * count
    if len(lines) == len(batches):
        return [line for line, size in zip(lines, batches, strict=True) for _ in range(size)]
    raise ValueError(
        f"There are {count} images in {len(batches)} batches but {len(lines)} prompts: write one for each image, one "
        "for each batch, or one for all."
    )


def _of_batch(text: str, size: int) -> tuple[str, ...]:
    """Return the prompt of each image of a batch: the lines of its text where there are as many, else all of it."""
    lines = captions_of(text)
    return lines if len(lines) == size else (" ".join(lines),) * size
