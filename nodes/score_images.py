"""Score Images: pictures that something else drew, and their prompts -> a REPORT."""

from comfy_api.latest import io

from ..trainers.evaluation.prompt_sets import CLASS_WORD
from ..trainers.evaluation.scorer import GeneratedImage
from ..trainers.images import to_pil
from ..trainers.metrics.metrics import plain_prompt
from ..trainers.text import captions_of
from . import scoring
from .host import internals, session
from .reference_images import connected
from .schema import checked
from .sockets import CATEGORY, ConceptSocket


class ScoreImages(io.ComfyNode):
    """IMAGEs and prompts -> REPORT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Scores pictures that any node drew: are they the subject, and do they follow their prompts.",
            search_aliases=["evaluate", "clip score", "clip-t", "clip-i", "dino", "lpips", "metrics"],
            # Prompt List and the stock nodes behind it hand out lists: together they are one report.
            is_input_list=True,
            inputs=[
                io.Image.Input("images"),
                ConceptSocket.Input("concept", tooltip="The subject: its pictures, its word, its class word."),
                io.String.Input(
                    "prompts", default="", multiline=True,
                    tooltip="What they were drawn from: one prompt for each batch of a list, a line for each picture, "
                    "or one for all.",
                ),
                *scoring.shared_inputs(),
                *scoring.metric_inputs(),
                scoring.unseen_input(),
                io.Mask.Input("mask", optional=True, tooltip="Where the subject is, one mask per picture, in order."),
            ],
            outputs=scoring.outputs(),
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, images, concept, prompts, label, compare_with, mask_references, unseen=(), mask=(), **named
    ) -> io.NodeOutput:
        scorer_config = scoring.scorer_config({name: value for name, (value, *_) in named.items()})
        subject = scoring.references(concept[0], unseen or [], mask_references[0])
        word = concept[0].class_word if compare_with[0] == CLASS_WORD else ""
        drawn = _drawn(images, prompts, mask or [], concept[0].placeholder_token, word)
        say = session.notices(cls.hidden.unique_id if cls.hidden else "")
        progress = internals.ProgressBar(3 * len(drawn) + 2 * (len(subject.seen) + len(subject.unseen)))

        def on_pictures(count: int) -> None:
            progress.update(count)
            session.check_interrupted()

        report = scoring.scored(scorer_config, label[0], drawn, subject, say, on_pictures)
        say(report.summary().replace("\n", "; "))
        return io.NodeOutput(*scoring.results(report))


def _drawn(images: list, prompts: list[str], masks: list, placeholder: str, word: str) -> list[GeneratedImage]:
    """Each picture with its prompt; pictures of one prompt count as its seeds 0, 1, ..."""
    pictures = [to_pil(picture) for picture in connected({"images": images})]
    if not pictures:
        raise ValueError("There is no picture to score: connect an image that holds one.")
    texts = prompts_for(prompts, [len(batch) for batch in images])
    cut = [mask for batch in masks for mask in batch.reshape(-1, *batch.shape[-2:])]
    if cut and len(cut) != len(pictures):
        raise ValueError(f"There are {len(pictures)} pictures but {len(cut)} masks: connect one mask per picture.")
    seeds = [texts[:i].count(text) for i, text in enumerate(texts)]
    return [
        GeneratedImage(prompt=text, text=plain_prompt(text, placeholder, word), seed=seed, image=picture, mask=mask)
        for picture, text, seed, mask in zip(pictures, texts, seeds, cut or [None] * len(pictures), strict=True)
    ]


def prompts_for(prompts: list[str], batches: list[int]) -> list[str]:
    """A prompt for each picture of batches of these sizes.

    Raises:
        ValueError: another number of prompts.
    """
    lines = [line for text in prompts for line in captions_of(text)]
    count = sum(batches)
    if len(lines) == count:
        return lines
    if len(lines) == 1:
        return lines * count
    if len(lines) == len(batches):
        return [line for line, size in zip(lines, batches, strict=True) for _ in range(size)]
    raise ValueError(
        f"There are {count} pictures in {len(batches)} batches but {len(lines)} prompts: write one for each picture, "
        "one for each batch, or one for all."
    )
