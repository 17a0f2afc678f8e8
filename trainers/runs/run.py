"""Runs as data: all that decides a result, and the digests that name a run's folder."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..data.augmentation import BEFORE
from ..data.concept import Concept
from ..data.prompts import SUBJECT, cut_off
from ..digest import digest_of
from ..metrics.clip import ExtractorConfig
from ..metrics.extractor_cache import ExtractorCache
from ..models.diffusion import Models
from ..models.families import Family
from ..models.tokenizer import Tokenizer
from ..recipes import METHODS
from ..recipes.base import Recipe
from ..settings import decisive, part
from ..stopping.monitor import Monitor
from ..text import captions_of
from ..training.optimizers import Optimization
from ..training.trainables import initializer_ids

RUN_FORMAT = 1  # raised only when the same inputs give other results; part of every digest
NAMED = 3  # prompts that are too long, in messages; the others are counted
NOT_WORDS = ("images", "masks", "class_images")  # fields of a concept that are not text


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a result, except the models themselves."""

    concept: Concept
    recipe: Recipe
    stopper: tuple[Monitor, ...] = ()
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def settings(self) -> dict:
        """Return all but the images that decides what is learned, as JSON."""
        words = {f.name: getattr(self.concept, f.name) for f in dataclasses.fields(Concept)}
        settings = {
            "run_format": RUN_FORMAT,
            "method": type(self.recipe).__name__,
            "recipe": decisive(self.recipe),
            "concept": {name: value for name, value in words.items() if name not in NOT_WORDS},
            "seed": self.seed,
            "precision": str(self.dtype).removeprefix("torch."),
            "stopper": [{"monitor": monitor.name, **decisive(monitor)} for monitor in self.stopper],
        }
        return json.loads(json.dumps(settings))

    def dataset(self) -> str:
        """Return a digest of the reference images and their masks, and of class images if there are any."""
        classes = self.concept.class_images
        own = [*self.concept.images, *(self.concept.masks or ())]
        return digest_of([*own, *classes], [f"{len(classes)} class images"] if classes else [])

    def digest(self, model: str) -> str:
        """Return 16 hexadecimal digits that name the run's folder: same digest, same result.

        Args:
            model: a fingerprint of the weights it starts from, such as `fingerprint` gives.
        """
        return digest_of([], [json.dumps(self.settings(), sort_keys=True), self.dataset(), model])

    def lineage(self, model: str) -> str:
        """Return what runs share that differ in their number of steps alone.

        Empty where a method has no such number, a learning rate depends on it or has to be found, or a monitor returns
        another state than the last.
        """
        if "steps" not in self.recipe.__dataclass_fields__ or any(m.keep != "last" for m in self.stopper):
            return ""
        if not part(Optimization, self.recipe).extends:
            return ""
        endless = dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, steps=0))
        return "steps " + endless.digest(model)


def check_family(recipe: Recipe, family: Family) -> None:
    """Raise `ValueError` where a recipe needs what only Stable Diffusion has here."""
    if recipe.needs and not family.text_encoders:
        method = next(name for name, presets in METHODS.items() if type(recipe) in map(type, presets.values()))
        others = " or ".join(name for name, presets in METHODS.items() if not next(iter(presets.values())).needs)
        raise ValueError(f"{method} needs {recipe.needs}, which {family.name} models do not have here: use {others}.")


def extractor_configs(recipe: Recipe, stopper: Iterable[Monitor]) -> list[ExtractorConfig]:
    """Return the configs of all feature extractors that a recipe and monitors use."""
    return [choice for part in (recipe, *stopper) for choice in getattr(part, "extractor_configs", ())]


def start_of(recipe: Recipe, stopper: Iterable[Monitor], model: str, extractors: ExtractorCache) -> str:
    """Return a fingerprint of all weights that decide a result: the models', and those that they measure with.

    Args:
        model: a fingerprint of the models, such as `fingerprint` gives.

    Raises:
        ValueError: the weights of a feature extractor are missing.
    """
    measured = extractors.digest(extractor_configs(recipe, stopper))
    return digest_of([], [model, measured]) if measured else model


def advice(run: Run, models: Models) -> list[str]:
    """Return sentences about what will make a run's result worse, though it can be trained."""
    encoders = models.text_encoders[:1]
    class_tokens = sum(len(encoder.tokenizer.words(run.concept.class_word)) for encoder in encoders)
    return run.concept.advice(models.resolution, class_tokens)


def check_lengths(run: Run, previews: Iterable[str], tokenizers: Iterable[Tokenizer], vectors: int = 0) -> list[str]:
    """Return a sentence for each prompt of a run of which the text encoders do not read the end.

    Args:
        previews: the preview's prompts, with `{}` for the subject.
        vectors: of the placeholder token, where it was learned earlier.

    Raises:
        ValueError: they do not read the placeholder token of one.
    """
    concept, subject = run.concept, run.recipe.subject(run.concept)
    texts = [text for value in vars(run.recipe).values() if isinstance(value, tuple) for text in value]
    scored = [line for monitor in run.stopper for line in captions_of(getattr(monitor, "prompts", ""))]
    prompts = [("caption", caption, BEFORE) for caption in concept.captions]
    prompts += [("preview prompt", prompt, 0) for prompt in previews]
    prompts += [("prompt to score", prompt, 0) for prompt in scored]
    prompts += [("class caption", caption, 0) for caption in concept.class_captions]
    prompts += [("caption for knowledge preservation", text, 0) for text in texts]
    sentences = []
    for tokenizer in tokenizers:
        own = Tokenizer(tokenizer.encode_words)
        for token, initializer in concept.words:
            own.add_placeholder(token, max(vectors, len(initializer_ids(own, initializer))))
        sentences += [cut_off(own, name, text.replace(SUBJECT, subject), before) for name, text, before in prompts]
    sentences, more = (
        [*dict.fromkeys(filter(None, sentences))],
        "more prompts are longer than what is read: shorten them.",
    )
    return sentences[:NAMED] + ([f"{len(sentences) - NAMED} {more}"] if len(sentences) > NAMED else [])
