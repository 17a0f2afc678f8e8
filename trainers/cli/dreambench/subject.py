"""One subject of the DreamBooth protocol: train, generate, score and report, unless it is done already."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ...data.concept import Concept
from ...device import SingleDevice
from ...evaluation import protocol
from ...evaluation.protocol import Evaluation, Protocol
from ...evaluation.report import CLIP_T
from ...evaluation.scorer import References, ScorerConfig
from ...images import image_files, read_folder, to_pil
from ...metrics.extractor_cache import ExtractorCache
from ...models.diffusion import Models
from ...models.fingerprint import fingerprint
from ...models.tokenizer import Tokenizer, bundled_words
from ...recipes.base import Recipe
from ...reports import report_folder
from ...runs import pick, restore
from ...runs.folder import RunFolder
from ...runs.result import RunResult
from ...runs.run import Run, extractor_configs, start_of
from ...stopping.monitor import Monitor
from ...text import quoted, sentence_of, text_of
from ...training import trainables
from ..options import Say, train_command
from .dataset import Subject
from .table import Row

FAILURES = (
    ValueError,
    OSError,
    RuntimeError,
    MemoryError,
    ArithmeticError,
)  # of a subject; others are errors in this program


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Settings of all subjects, sent to the workers."""

    load: Callable[[], Models]  # reads the checkpoint
    out: Path
    device: str
    dtype: torch.dtype
    recipe: Recipe
    stopper: tuple[Monitor, ...]
    seed: int
    words: dict  # of each concept
    references: int  # images to train on; 0: all
    protocol: Protocol
    prompts: str | Path  # the user's own lines, "" for none; or a folder with <subject>.txt for each subject
    scorer_config: ScorerConfig
    clip_folders: tuple[Path, ...]
    vqa_download: bool
    micro_batch_size: int
    checkpoint_every: int

    def concept(
        self, subject: Subject, images: tuple[torch.Tensor, ...], captions: tuple[str, ...] = (),
        masks: tuple[torch.Tensor, ...] | None = None,
    ) -> Concept:  # fmt: skip
        """Return the concept of a subject with these images `[3, h, w]` in 0..1 and their masks `[1, h, w]`."""
        own: dict = {"initializer_token": subject.initializer} if subject.initializer else {}
        return Concept(images=images, captions=captions, masks=masks, class_word=subject.class_word, **self.words | own)

    def own_prompts(self, subject: Subject) -> str:
        """Return the user's own lines for a subject; "" for none.

        Raises:
            ValueError: its file in the folder of prompts cannot be read.
        """
        if isinstance(self.prompts, str):
            return self.prompts
        file = self.prompts / f"{subject.name}.txt"
        return text_of(file, f"The prompt file {quoted(file.name)}", f"write it into {quoted(self.prompts.name)}")

    def check(self, subject: Subject) -> None:
        """Raise `ValueError` where the subject's words cannot be used; its images are checked later."""
        concept = self.concept(subject, (torch.zeros(3, 8, 8),))
        words = concept.placeholder_token, concept.initializer, concept.class_word
        trainables.check_words(Tokenizer(bundled_words()), *words)
        self.recipe.check(concept)
        self.protocol.prompts(self.own_prompts(subject), subject.kind, concept, self.recipe.subject(concept))


class Worker:
    """Trains and evaluates one subject after the other with models and metric models that are read once.

    Args:
        cache: name of its cache folder; two workers would write the same files at the same time.
    """

    def __init__(self, bench: Bench, cache: str = "cache"):
        self.bench = bench
        self.cache = bench.out / "runs" / cache
        self.extractors = ExtractorCache(folders=lambda: bench.clip_folders)
        self.extractor_weights = protocol.load_extractors(bench.scorer_config, self.extractors)
        for choice in extractor_configs(bench.recipe, bench.stopper):
            self.extractors.load(choice)
        self.models = bench.load().to("cpu", bench.dtype)
        self.model = start_of(bench.recipe, bench.stopper, fingerprint(self.models), self.extractors)

    def __call__(self, subject: Subject, say: Say) -> Row:
        """Return the subject's row of the table; where it fails, with the error's sentence."""
        say = partial(_named, say, subject.name)
        try:
            return self._done(subject, say)
        except FAILURES as error:
            sentence = sentence_of(error)
            say(f"failed: {sentence}")
            return Row.failed(subject, sentence)

    def _done(self, subject: Subject, say: Say) -> Row:
        bench, folder = self.bench, self.bench.out / subject.name
        images, captions, masks = read_folder(subject.folder, say)
        names = [file.name for file in image_files(subject.folder)]
        order = sorted(range(len(images)), key=lambda i: names[i] != subject.reference)  # the chosen one first
        images, captions = tuple(images[i] for i in order), tuple(captions[i] for i in order if captions)
        masks = tuple(masks[i] for i in order) if masks else None
        count = bench.references or len(images)
        concept = bench.concept(subject, images[:count], captions[:count], masks and masks[:count])
        bench.recipe.check(concept)
        run = Run(concept=concept, recipe=bench.recipe, stopper=bench.stopper, seed=bench.seed, dtype=bench.dtype)
        evaluation = self._evaluation(subject, run, images[count:])
        digest = evaluation.digest(f"{run.digest(self.model)} {pick.weight_of(run.stopper)}")
        if earlier := report_folder.read(folder, digest):
            say("complete with these settings, not repeated")
            return Row.of(subject, earlier)
        result = pick.chosen(self._trained(run, say), run.stopper)
        generated = evaluation.generated(self._with(result), say)
        report = evaluation.report(subject.name, generated, self.extractors, bench.device, say)
        if not evaluation.references.unseen:
            why = {column: "all images were trained on" for column in report.missing if column.endswith("unseen")}
            report = replace(report, missing=report.missing | why)
        facts = {
            "class word": subject.class_word, "method": result.settings["method"], "run": result.folder.name,
            "references": [names[i] for i in order[:count]], "initializer": concept.initializer,
            "training": result.stop_reason, "training seconds": round(result.seconds, 1), "digest": digest,
        }  # fmt: skip
        report_folder.write(folder, [replace(report, settings=report.settings | facts)])
        say(f"scored, {CLIP_T} {report.cell(CLIP_T)}")
        written = report_folder.read(folder, digest)
        assert written is not None  # a moment ago
        return Row.of(subject, written)

    def _evaluation(self, subject: Subject, run: Run, unseen: tuple[torch.Tensor, ...]) -> Evaluation:
        bench, concept = self.bench, run.concept
        subject_words = bench.recipe.subject(concept)
        return Evaluation(
            protocol=bench.protocol,
            scorer_config=bench.scorer_config,
            extractor_weights=self.extractor_weights,
            prompts=tuple(bench.protocol.prompts(bench.own_prompts(subject), subject.kind, concept, subject_words)),
            references=References(seen=[*map(to_pil, concept.images)], unseen=[*map(to_pil, unseen)]),
            side=concept.at_resolution(self.models.resolution),
            dtype=bench.dtype,
            vqa_download=bench.vqa_download,
        )

    def _trained(self, run: Run, say: Say) -> RunResult:
        """Return the run's result; resume its training if it was interrupted."""
        bench = self.bench
        folder = RunFolder(bench.out / "runs" / run.digest(self.model))
        if finished := folder.result():
            say("already trained")
            return finished
        device = SingleDevice(device=torch.device(bench.device), dtype=run.dtype)
        return train_command(
            run, self._fresh(), folder, device, say,
            model=self.model,
            micro_batch_size=bench.micro_batch_size,
            checkpoint_every=bench.checkpoint_every,
            cache=self.cache,
            extractors=self.extractors,
        )  # fmt: skip

    def _fresh(self) -> Models:
        """Return a copy of the models as they were read, for one subject."""
        unet, text_encoders = copy.deepcopy(self.models.unet), copy.deepcopy(self.models.text_encoders)
        return replace(self.models, unet=unet, text_encoders=text_encoders, known_adapters={}, base_weights={})

    def _with(self, result: RunResult) -> Models:
        """Return models with a run's result, restored even if just trained: resumed subjects get the same images."""
        models = self._fresh().to(self.bench.device, self.bench.dtype)
        restore.put(result, models)
        return models


def _named(say: Say, name: str, sentence: str) -> None:
    say(f"{name}: {sentence}")
