"""Evaluate: generates the images of a prompt set with a MODEL and scores them."""

import re
import time
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..trainers.evaluation import prompt_sets
from ..trainers.evaluation.prompt_sets import OWN, Prompt, check_format, published
from ..trainers.evaluation.report import Report
from ..trainers.evaluation.scorer import GeneratedImage, References
from ..trainers.images import check_pixels, to_pil
from ..trainers.text import any_of
from . import scoring
from .host import clip_attachment, internals, sampler, session
from .host.folders import fingerprint, text_in_input
from .host.models import check_fit, resolution_of
from .host.sampler import Sampling
from .schema import checked, valid
from .sockets import EVALUATION_FOLDER, ConceptSocket

SMALLEST = 64


class Evaluate(io.ComfyNode):
    """Turns MODEL, CLIP, VAE and CONCEPT into a REPORT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeEvaluate",
            display_name="Evaluate",
            category=EVALUATION_FOLDER,
            description="Generates images of a prompt set and scores their identity, text alignment and diversity.",
            search_aliases=["score", "benchmark", "clip-t", "clip-i", "dino", "lpips", "dreambench", "metrics"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                ConceptSocket.Input("concept", tooltip="Subject with reference images, placeholder token, class word."),
                io.Combo.Input(
                    "prompt_set", options=[*published(), OWN],
                    tooltip="Published prompt set to evaluate with; own uses the prompts below.",
                ),
                io.String.Input(
                    "prompts", default="a photo of {}", multiline=True,
                    tooltip="Prompts of the prompt set own, one per line; {} is the subject.",
                ),
                io.String.Input(
                    "prompt_file", default="",
                    tooltip="Text file in the input folder with more prompts for the prompt set own; empty: none.",
                ),
                io.Int.Input(
                    "max_prompts", default=0, min=0, max=10000,
                    tooltip="Evaluate only the first N prompts of the set; 0 = all.",
                ),
                io.String.Input(
                    "token_format", default="V",
                    tooltip="How prompts name the subject: V is the placeholder token, C the class word, as in V C or "
                    "sks C; or any text with {} for the placeholder token; for an untrained model write C.",
                ),
                *scoring.shared_inputs(),
                io.Int.Input("seeds", default=4, min=1, max=256, tooltip="Number of images per prompt."),
                io.Int.Input(
                    "first_seed", default=0, min=0, max=2**63 - 257,
                    tooltip="Seed of each prompt's first image; further images use the seeds that follow.",
                ),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Sampler steps per image."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.5, tooltip="Guidance scale (CFG)."),
                io.Combo.Input("sampler_name", options=[*internals.KSampler.SAMPLERS], default="dpmpp_2m"),
                io.Combo.Input("scheduler", options=[*internals.KSampler.SCHEDULERS], default="karras"),
                io.String.Input(
                    "negative_prompt", default="", advanced=True, tooltip="Negative prompt of all images."
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=4096, step=8, advanced=True,
                    tooltip="Width of the images in pixels; 0 = the concept's resolution, else the model's.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=4096, step=8, advanced=True,
                    tooltip="Height of the images in pixels; 0 = the concept's resolution, else the model's.",
                ),
                io.Int.Input(
                    "batch_size", default=4, min=1, max=64, advanced=True,
                    tooltip="Images of a prompt generated in one batch; more need more memory.",
                ),
                *scoring.metric_inputs(),
                scoring.held_out_input(),
            ],
            outputs=[*scoring.outputs(), io.Image.Output(display_name="images")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompt_set=None, prompts=None, prompt_file=None, token_format=None) -> bool | str:
        """Check what is known before the graph runs, which may train for hours before it reaches this node."""
        if (answer := valid(check_format, token_format)) is not True:
            return answer
        widgets = None if None in (prompt_set, prompts, prompt_file) else (prompt_set, prompts, prompt_file)
        return valid(lambda given: _templates(*given), widgets)

    @classmethod
    def fingerprint_inputs(cls, **values) -> str:
        return fingerprint(values)

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, concept, prompt_set, prompts, prompt_file, max_prompts, token_format, label,
        compare_with, mask_references, seeds, first_seed, steps, cfg, sampler_name, scheduler, negative_prompt, width,
        height, batch_size, held_out=None, **named,
    ) -> io.NodeOutput:  # fmt: skip
        scorer_config = scoring.scorer_config(named)
        lines = _templates(prompt_set, prompts, prompt_file, max_prompts)
        texts = prompt_sets.prompts(lines, concept, token_format, compare_with)
        family = check_fit(model, clip, vae)
        _check_token(clip, concept, texts)
        subject = scoring.references(concept, [] if held_out is None else [held_out], mask_references)
        side = concept.at_resolution(resolution_of(model))
        sampling = Sampling(
            seeds=tuple(range(first_seed, first_seed + seeds)), steps=steps, cfg=cfg, sampler=sampler_name,
            scheduler=scheduler, negative=negative_prompt, width=_side(width or side), height=_side(height or side),
            batch_size=batch_size,
        )  # fmt: skip
        count = len(texts) * seeds
        check_pixels(count * sampling.width * sampling.height, f"The {count} images to generate")
        notify = session.notices(cls.hidden.unique_id if cls.hidden else "")
        report, images = evaluate(model, clip, vae, texts, sampling, scorer_config, label, subject, notify)
        settings = {
            "model": family.name, "prompt set": prompt_set, "token format": token_format, "compared with": compare_with,
            "masked references": mask_references, "seeds": f"{first_seed} to {first_seed + seeds - 1}", "steps": steps,
            "cfg": cfg, "sampler": f"{sampler_name}, {scheduler}", "negative prompt": negative_prompt,
            "size": f"{sampling.width} x {sampling.height}",
        }  # fmt: skip
        report = replace(report, settings=settings)
        notify(report.summary().replace("\n", "; "))
        return io.NodeOutput(*scoring.results(report), images)


def _templates(prompt_set: str, own: str, file: str, first: int = 0) -> list[str]:
    if prompt_set == OWN:
        own = f"{own}\n{text_in_input(file, 'prompts', 'prompt')}"
    return prompt_sets.templates(prompt_set, own, first)


def _side(pixels: int) -> int:
    if pixels < SMALLEST or pixels % 8:
        raise ValueError(f"The image size {pixels} is not possible: use a multiple of 8, at least {SMALLEST} pixels.")
    return pixels


def _check_token(clip, concept, texts: list[Prompt]) -> None:
    """Raise `ValueError` if the CLIP never learned the placeholder token: it would encode its letters instead."""
    token = concept.placeholder_token
    if any(re.search(any_of([token]), each.prompt) for each in texts) and token not in clip_attachment.of(clip).tokens:
        raise ValueError(
            f"This CLIP has not learned {token}: connect the CLIP that Train or Apply Personalized returned, or write "
            "C as token_format for the untrained model."
        )


def evaluate(
    model,
    clip,
    vae,
    texts: list[Prompt],
    sampling: Sampling,
    scorer_config,
    label: str,
    subject: References,
    notify,
) -> tuple[Report, torch.Tensor]:
    """Return the report and the images, `[n, h, w, 3]`.

    Metric models are loaded first, so that a wrong file is reported before any image is generated.
    """
    count, references = len(texts) * len(sampling.seeds), len(subject.seen) + len(subject.unseen)
    progress = internals.ProgressBar(count * (sampling.steps + 3) + 2 * references)

    def on_images(images: int) -> None:
        progress.update(images)
        session.check_interrupted()

    with scoring.session():
        for choice in scorer_config.choices(session.extractors):
            session.extractors.load(choice)
        notify(f"generating {count} images")
        start = time.perf_counter()
        images = sampler.generate(model, clip, vae, [each.prompt for each in texts], sampling, on_images)
        seconds = (time.perf_counter() - start) / count
        pairs = [(each, seed) for each in texts for seed in sampling.seeds]
        generated = [
            GeneratedImage(prompt=each.prompt, text=each.text, seed=seed, image=to_pil(image.movedim(-1, 0)))
            for (each, seed), image in zip(pairs, images, strict=True)
        ]
        report = scoring.scored(scorer_config, label, generated, subject, notify, on_images)
    return replace(report, generation_seconds=seconds), torch.stack(images)
