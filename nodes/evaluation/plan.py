"""Shared by Evaluate and Compare Methods: an evaluation with everything but the model, and its inputs."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ...trainers.data.concept import Concept
from ...trainers.evaluation import prompt_sets
from ...trainers.evaluation.prompt_sets import OWN, Prompt, published
from ...trainers.evaluation.report import Report
from ...trainers.evaluation.scorer import GeneratedImage, References, ScorerConfig
from ...trainers.images import check_pixels, to_pil
from ...trainers.text import any_of
from ..host import clip_attachment, internals, sampler, session
from ..host.folders import text_in_input
from ..host.models import check_fit, resolution_of
from ..host.sampler import Sampling
from . import scoring
from .metric_models import used

SMALLEST = 64


def prompt_inputs() -> list[io.Input]:
    """Return the widgets that choose the prompts."""
    return [
        io.Combo.Input(
            "prompt_set", options=[*published(), OWN],
            tooltip="Published prompt set to evaluate with; own uses the prompts below.",
        ),
        io.String.Input(
            "prompts", default="a photo of {}", multiline=True,
            tooltip="Prompts of the prompt set own, one per line; {} is the subject.",
        ),
        io.String.Input(
            "prompt_file", default="", advanced=True,
            tooltip="Text file in the input folder with more prompts for the prompt set own; empty: none.",
        ),
        io.Int.Input(
            "max_prompts", default=0, min=0, max=10000, advanced=True,
            tooltip="Evaluate only the first N prompts of the set; 0 = all.",
        ),
    ]  # fmt: skip


def sampling_inputs() -> list[io.Input]:
    """Return the widgets of the images."""
    return [
        io.Int.Input("seeds", default=4, min=1, max=256, tooltip="Number of images per prompt."),
        io.Int.Input(
            "first_seed", default=0, min=0, max=2**63 - 257, advanced=True,
            tooltip="Seed of each prompt's first image; further images use the seeds that follow.",
        ),
        io.Int.Input(
            "steps", default=25, min=1, max=1000, advanced=True, tooltip="Sampler steps per image."
        ),
        io.Float.Input(
            "cfg", default=7.5, min=0.0, max=100.0, step=0.5, advanced=True, tooltip="Guidance scale (CFG)."
        ),
        io.Combo.Input(
            "sampler_name", options=[*internals.KSampler.SAMPLERS], default="dpmpp_2m", advanced=True
        ),
        io.Combo.Input("scheduler", options=[*internals.KSampler.SCHEDULERS], default="karras", advanced=True),
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
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """An evaluation with everything but the model, checked.

    Attributes:
        templates: prompts with `{}` for the subject.
        compare_with: what stands for the subject in CLIP-T's text.
        settings: for the report.
    """

    concept: Concept
    templates: list[str]
    compare_with: str
    references: References
    scorer_config: ScorerConfig
    sampling: Sampling
    settings: dict

    @classmethod
    def of(
        cls, model, concept: Concept, metric_models: ScorerConfig | None, held_out: Tensor | None, *, prompt_set,
        prompts, prompt_file, max_prompts, compare_with, mask_references, seeds, first_seed, steps, cfg, sampler_name,
        scheduler, negative_prompt, width, height, batch_size,
    ) -> "EvaluationPlan":  # fmt: skip
        """Return the evaluation that a node's inputs describe.

        Raises:
            ValueError: one of them is not possible, or a metric model cannot be found.
        """
        side = concept.at_resolution(resolution_of(model))
        chosen = templates(prompt_set, prompts, prompt_file, max_prompts)
        sampling = Sampling(
            seeds=tuple(range(first_seed, first_seed + seeds)), steps=steps, cfg=cfg, sampler=sampler_name,
            scheduler=scheduler, negative=negative_prompt, width=_side(width or side), height=_side(height or side),
            batch_size=batch_size,
        )  # fmt: skip
        count = len(chosen) * seeds
        check_pixels(count * sampling.width * sampling.height, f"The {count} images to generate")
        settings = {
            "prompt set": prompt_set, "compared with": compare_with, "masked references": mask_references,
            "seeds": f"{first_seed} to {first_seed + seeds - 1}", "steps": steps, "cfg": cfg,
            "sampler": f"{sampler_name}, {scheduler}", "negative prompt": negative_prompt,
            "size": f"{sampling.width} x {sampling.height}",
        }  # fmt: skip
        return cls(
            concept=concept,
            templates=chosen,
            compare_with=compare_with,
            references=scoring.references(concept, [] if held_out is None else [held_out], mask_references),
            scorer_config=used(metric_models),
            sampling=sampling,
            settings=settings,
        )

    def report(
        self, model, clip, vae, token_format: str, label: str, notify: Callable[[str], None]
    ) -> tuple[Report, Tensor]:
        """Generate and score a model's images; return the report and the images, `[n, h, w, 3]`.

        Args:
            token_format: how prompts name the subject, see `prompt_sets.prompts`.
            notify: given sentences for the node.

        Raises:
            ValueError: the models do not belong together, or the CLIP does not know the placeholder token.
        """
        texts = prompt_sets.prompts(self.templates, self.concept, token_format, self.compare_with)
        family = check_fit(model, clip, vae)
        _check_token(clip, self.concept, texts)
        report, images = self._scored(model, clip, vae, texts, label, notify)
        settings = {"model": family.name, "token format": token_format, **self.settings}
        return replace(report, settings=settings), images

    def _scored(self, model, clip, vae, texts: list[Prompt], label: str, notify) -> tuple[Report, Tensor]:
        """Load the metric models first, so that a wrong file is reported before any image is generated."""
        seeds, config = self.sampling.seeds, self.scorer_config
        count, references = len(texts) * len(seeds), len(self.references.seen) + len(self.references.unseen)
        progress = internals.ProgressBar(count * (self.sampling.steps + 3) + 2 * references)

        def on_images(images: int) -> None:
            progress.update(images)
            session.check_interrupted()

        with session.memory_returned():
            for choice in config.choices(session.extractors):
                session.extractors.load(choice)
            notify(f"generating {count} images")
            start = time.perf_counter()
            prompts = [each.prompt for each in texts]
            images = sampler.generate(model, clip, vae, prompts, self.sampling, on_images)
            seconds = (time.perf_counter() - start) / count
            pairs = [(each, seed) for each in texts for seed in seeds]
            generated = [
                GeneratedImage(prompt=each.prompt, text=each.text, seed=seed, image=to_pil(image.movedim(-1, 0)))
                for (each, seed), image in zip(pairs, images, strict=True)
            ]
            report = scoring.scored(config, label, generated, self.references, notify, on_images)
        return replace(report, generation_seconds=seconds), torch.stack(images)


def templates(prompt_set: str, own: str, file: str, first: int = 0) -> list[str]:
    """Return the prompts that the widgets choose.

    Raises:
        ValueError: there is none, or the file cannot be read.
    """
    if prompt_set == OWN:
        own = f"{own}\n{text_in_input(file, 'prompts', 'prompt')}"
    return prompt_sets.templates(prompt_set, own, first)


def check_prompts(prompt_set: str | None, prompts: str | None, prompt_file: str | None) -> None:
    """Raise `ValueError` where there is no prompt; pass where one of the three is a link, which is `None`."""
    if None not in (prompt_set, prompts, prompt_file):
        templates(prompt_set, prompts, prompt_file)


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
