"""Evaluate: draws a prompt set with a MODEL and scores the pictures."""

import time
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..trainers.evaluation import prompt_sets
from ..trainers.evaluation.prompt_sets import OWN, Prompt, check_format, published
from ..trainers.evaluation.report import Report
from ..trainers.evaluation.scorer import GeneratedImage, References
from ..trainers.images import to_pil
from . import scoring
from .host import clip_attachment, internals, sampler
from .host.folders import digest_of_text, text_in_input
from .host.models import check_fit, resolution_of
from .host.sampler import Sampling
from .host.session import check_interrupted, extractors, notices
from .schema import checked, valid
from .sockets import CATEGORY, ConceptSocket

SMALLEST = 64


class Evaluate(io.ComfyNode):
    """MODEL, CLIP, VAE and CONCEPT -> REPORT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeEvaluate",
            display_name="Evaluate",
            category=CATEGORY,
            description="Draws a set of prompts and scores the pictures: is it the subject, and does it follow words.",
            search_aliases=["score", "benchmark", "clip-t", "clip-i", "dino", "lpips", "dreambench", "metrics"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                ConceptSocket.Input("concept", tooltip="The subject: its pictures, its word, its class word."),
                io.Combo.Input("prompt_set", options=[*published(), OWN], tooltip="own: those below."),
                io.String.Input(
                    "prompts", default="a photo of {}", multiline=True,
                    tooltip="Of prompt set own: one per line, {} is the subject.",
                ),
                io.String.Input(
                    "file", default="",
                    tooltip="Of prompt set own: more prompts, a text file in the input folder; empty: none.",
                ),
                io.Int.Input("first", default=0, min=0, max=10000, tooltip="Use only the first N prompts; 0 = all."),
                io.String.Input(
                    "token_format", default="V",
                    tooltip="The subject in prompts: V is the new word, C the class word, as in V C or sks C; or any "
                    "text with {} for the new word. For an untrained model write C.",
                ),
                *scoring.shared_inputs(),
                io.Int.Input("seeds", default=4, min=1, max=256, tooltip="Pictures of each prompt."),
                io.Int.Input("first_seed", default=0, min=0, max=2**63 - 257, tooltip="The others follow it."),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Sampler steps."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.5, tooltip="Guidance."),
                io.Combo.Input("sampler_name", options=[*internals.KSampler.SAMPLERS], default="dpmpp_2m"),
                io.Combo.Input("scheduler", options=[*internals.KSampler.SCHEDULERS], default="karras"),
                io.String.Input("negative", default="", advanced=True, tooltip="The negative prompt."),
                io.Int.Input(
                    "width", default=0, min=0, max=4096, step=8, advanced=True,
                    tooltip="In pixels; 0 = the concept's, or the model's own.",
                ),
                io.Int.Input("height", default=0, min=0, max=4096, step=8, advanced=True, tooltip="The same."),
                io.Int.Input(
                    "pictures_at_once", default=4, min=1, max=64, advanced=True,
                    tooltip="Seeds of a prompt that are drawn together; more need more memory.",
                ),
                *scoring.metric_inputs(),
                scoring.unseen_input(),
            ],
            outputs=[*scoring.outputs(), io.Image.Output(display_name="images")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompt_set=None, prompts=None, file=None, token_format=None) -> bool | str:
        """What can be known before the graph runs: a training may stand before this node."""
        if (answer := valid(check_format, token_format)) is not True:
            return answer
        known = None if None in (prompt_set, prompts, file) else (prompt_set, prompts, file)
        return valid(lambda given: _templates(*given), known)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others) -> str:
        """The file's lines may change while its name stays."""
        return digest_of_text(file or "")

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, concept, prompt_set, prompts, file, first, token_format, label, compare_with,
        mask_references, seeds, first_seed, steps, cfg, sampler_name, scheduler, negative, width, height,
        pictures_at_once, unseen=None, **named,
    ) -> io.NodeOutput:  # fmt: skip
        scorer_config = scoring.scorer_config(named)
        lines = _templates(prompt_set, prompts, file, first)
        texts = prompt_sets.prompts(lines, concept, token_format, compare_with)
        family = check_fit(model, clip, vae)
        _check_words(clip, concept, texts)
        subject = scoring.references(concept, [] if unseen is None else [unseen], mask_references)
        side = concept.at_resolution(resolution_of(model))
        sampling = Sampling(
            seeds=tuple(range(first_seed, first_seed + seeds)), steps=steps, cfg=cfg, sampler=sampler_name,
            scheduler=scheduler, negative=negative, width=_side(width or side), height=_side(height or side),
            at_once=pictures_at_once,
        )  # fmt: skip
        say = notices(cls.hidden.unique_id if cls.hidden else "")
        report, pictures = evaluate(model, clip, vae, texts, sampling, scorer_config, label, subject, say)
        settings = {
            "model": family.name, "prompt set": prompt_set, "token format": token_format, "compared with": compare_with,
            "masked references": mask_references, "seeds": f"{first_seed} to {first_seed + seeds - 1}", "steps": steps,
            "cfg": cfg, "sampler": f"{sampler_name}, {scheduler}", "negative prompt": negative,
            "size": f"{sampling.width} x {sampling.height}",
        }  # fmt: skip
        report = replace(report, settings=settings)
        say(report.summary().replace("\n", "; "))
        return io.NodeOutput(*scoring.results(report), pictures)


def _templates(prompt_set: str, own: str, file: str, first: int = 0) -> list[str]:
    if prompt_set == OWN:
        own = f"{own}\n{text_in_input(file, 'prompts', 'prompt')}"
    return prompt_sets.templates(prompt_set, own, first)


def _side(pixels: int) -> int:
    if pixels < SMALLEST or pixels % 8:
        raise ValueError(f"Pictures cannot be {pixels} pixels on a side: use a multiple of 8 from {SMALLEST} on.")
    return pixels


def _check_words(clip, concept, texts: list[Prompt]) -> None:
    """A CLIP that never learned the word would read its letters, and score as if it had learned badly."""
    word = concept.placeholder_token
    if any(word in each.prompt for each in texts) and word not in clip_attachment.of(clip).tokens:
        raise ValueError(
            f"This CLIP does not know {word}: connect the CLIP that Train or Apply Personalized returned, or write C "
            "as token_format for the untrained model."
        )


def evaluate(
    model, clip, vae, texts: list[Prompt], sampling: Sampling, scorer_config, label: str, subject: References, say
) -> tuple[Report, torch.Tensor]:
    """The pictures' report, and the pictures `[n, h, w, 3]`. Judges are read first: a wrong file costs little."""
    count, looks = len(texts) * len(sampling.seeds), len(subject.seen) + len(subject.unseen)
    progress = internals.ProgressBar(count * (sampling.steps + 3) + 2 * looks)

    def on_pictures(pictures: int) -> None:
        progress.update(pictures)
        check_interrupted()

    with scoring.session():
        for choice in scorer_config.choices(extractors):
            extractors.load(choice)
        say(f"drawing {count} pictures")
        start = time.perf_counter()
        pictures = sampler.draw(model, clip, vae, [each.prompt for each in texts], sampling, on_pictures)
        seconds = (time.perf_counter() - start) / count
        pairs = [(each, seed) for each in texts for seed in sampling.seeds]
        drawn = [
            GeneratedImage(prompt=each.prompt, text=each.text, seed=seed, image=to_pil(picture.movedim(-1, 0)))
            for (each, seed), picture in zip(pairs, pictures, strict=True)
        ]
        report = scoring.scored(scorer_config, label, drawn, subject, say, on_pictures)
    return replace(report, generation_seconds=seconds), torch.stack(pictures)
