"""Evaluation outside the editor: prompts, sampling, scoring, and the report."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from ..data.concept import Concept
from ..device import SingleDevice
from ..digest import digest_of
from ..images import to_pil
from ..metrics.extractor_cache import ExtractorCache
from ..models import sampler
from ..models.diffusion import Models
from ..settings import decisive, setting
from . import prompt_sets, vqa
from .prompt_sets import CLASS_WORD, OWN, REMOVED, Prompt
from .report import Report
from .scorer import GeneratedImage, References, Scorer, ScorerConfig

PROMPT_SETS = {"live": "DreamBooth live subjects", "object": "DreamBooth objects"}  # by the kind of a subject
BY_KIND = "by kind"
GENERATION_FORMAT = 1  # raised only when the same settings give other images or scores; part of every report's digest


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings of generation; the defaults are the DreamBooth paper's prompts and TextBoost's sampler."""

    prompt_set: str = setting(
        BY_KIND,
        "Prompt set; by kind: DreamBooth's for live subjects (cats and dogs) or for objects; own: those of --prompts, "
        "chosen if they are given.",
        options=(BY_KIND, *prompt_sets.published(), OWN),
    )
    first: int = setting(0, "Use only the first N prompts; 0: all.", min=0, max=10_000)
    token_format: str = setting(
        "",
        'How prompts name the subject: V is the placeholder token, C the class word, as in "V C" or "sks C"; or any '
        "text with {} for the placeholder token. Default: as the method trains it; C for the untrained model.",
    )
    compare_with: str = setting(
        CLASS_WORD,
        "What replaces the subject in the text that CLIP-T compares with: the class word, or nothing (removed).",
        options=(CLASS_WORD, REMOVED),
    )
    seeds: int = setting(
        4, "Number of images per prompt; a seed starts every prompt from the same latents.", min=1, max=256
    )
    first_seed: int = setting(
        0, "Seed of each prompt's first image; further images use the seeds that follow.", min=0, max=2**63 - 257
    )
    steps: int = setting(25, "Sampler steps (DPM-Solver++ 2M).", min=1, max=1000)
    cfg: float = setting(7.5, "Guidance scale (CFG).", min=0.0, max=100.0)
    batch_size: int = setting(4, "Images generated in one batch; more need more memory.", min=1, max=64)

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def templates(self, own: str, kind: str) -> list[str]:
        """Return the prompts' templates.

        Args:
            own: the user's own lines; "" for none.
            kind: kind of the subject, live or object.
        """
        chosen = self.prompt_set
        if chosen == BY_KIND:
            chosen = OWN if own else PROMPT_SETS[kind]
        return prompt_sets.templates(chosen, own, self.first)

    def prompts(self, own: str, kind: str, concept: Concept, subject: str) -> list[Prompt]:
        """Return the prompts; `subject` is the method's own form of the subject, such as `<dog> dog`."""
        return prompt_sets.prompts(self.templates(own, kind), concept, self.token_format or subject, self.compare_with)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation as data, for any model."""

    protocol: Protocol
    scorer_config: ScorerConfig
    extractor_weights: str  # a digest of the metric models' weights, which a name does not identify
    prompts: tuple[Prompt, ...]
    references: References
    side: int  # of the images in pixels
    dtype: torch.dtype = torch.float32
    vqa_download: bool = False

    def digest(self, what: str) -> str:
        """Return a digest of all that decides the scores; `what` is a digest of the model."""
        decides = {
            "format": GENERATION_FORMAT,
            "what": what,
            "protocol": dataclasses.asdict(self.protocol),
            "metric_models": [decisive(self.scorer_config), self.extractor_weights],
            "prompts": [dataclasses.asdict(each) for each in self.prompts],
            "numbers": [self.side, str(self.dtype), vqa.missing(self.vqa_download)],
        }
        references = [[*images] for images in self.references.named().values()]
        words = [json.dumps(decides, sort_keys=True), *(str(len(images)) for images in references)]
        return digest_of([_bytes(image) for images in references for image in images], words)

    def settings(self) -> dict[str, str | int | float]:
        """Return the settings that a report shows."""
        protocol = self.protocol
        return {
            "compared with": protocol.compare_with,
            "seeds": f"{protocol.all_seeds[0]} to {protocol.all_seeds[-1]}",
            "steps": protocol.steps,
            "cfg": protocol.cfg,
            "sampler": "DPM-Solver++ 2M, evenly spaced",
            "size": f"{self.side} x {self.side}",
            vqa.VQA: vqa.missing(self.vqa_download) or vqa.MODEL,
        }

    def generated(self, models: Models, say: Callable[[str], None]) -> tuple[list[GeneratedImage], float]:
        """Generate every prompt's seeds, prompt after prompt; return the images and the seconds per image."""
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.protocol.all_seeds]
        found, size, start = [], self.protocol.batch_size, time.perf_counter()
        for first in range(0, len(pairs), size):
            found += self._chunk(models, pairs[first : first + size])
            say(f"generated {len(found)} of {len(pairs)} images")
        return found, (time.perf_counter() - start) / len(found)

    def _chunk(self, models: Models, pairs: Sequence[tuple[Prompt, int]]) -> list[GeneratedImage]:
        texts, seeds = [prompt.prompt for prompt, _ in pairs], [seed for _, seed in pairs]
        with SingleDevice(device=models.device, dtype=self.dtype).autocast():
            pixels = sampler.sample(
                models, texts, seeds, size=(self.side, self.side), steps=self.protocol.steps,
                guidance=self.protocol.cfg, batch_size=len(pairs),
            )  # fmt: skip
        return [
            GeneratedImage(prompt=prompt.prompt, text=prompt.text, seed=seed, image=to_pil(image))
            for (prompt, seed), image in zip(pairs, pixels, strict=True)
        ]

    def report(
        self,
        label: str,
        generated: tuple[list[GeneratedImage], float],
        extractors: ExtractorCache,
        device: str,
        say: Callable,
    ) -> Report:
        """Score what `generated` returned. The diffusion model may have left the device."""
        scoring = Scorer(scorer_config=self.scorer_config, extractors=extractors, device=device, on_extractor=say)
        report = scoring.report(label, generated[0], self.references)
        report = vqa.added(replace(report, generation_seconds=generated[1]), self.vqa_download, device)
        return replace(report, settings=self.settings())


def load_extractors(scorer_config: ScorerConfig, extractors: ExtractorCache) -> str:
    """Load all feature extractors, so that a wrong file is found before training, and return a digest of their weights.

    Raises:
        ValueError: one cannot be loaded.
    """
    scorer_config.check(extractors)
    configs = scorer_config.choices(extractors)
    for config in configs:
        extractors.load(config)
    return extractors.digest(configs)


def _bytes(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(image.height, -1)
