"""The initializer of a placeholder token, chosen from the vocabulary: best or worst by CLIP score, or random.

Textual Inversion in the DVAR paper's comparison (arXiv 2302.04841) starts from a word given by hand, drawn at random,
or the best or worst of the vocabulary by CLIP score. Ours scores every word of the text encoder's vocabulary that is
one whole word of letters (entries `[a-z]+</w>`, 32,875 of the 49,408; the others are parts of words, numbers, signs,
emoji). Written as text, each of them is exactly that one entry, so the word and its id say the same.
"""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import files
from ..digest import choose, digest_of, sampled
from ..images import to_pil
from ..metrics.clip import ClipConfig
from ..metrics.feature_extractors import FeatureExtractor
from ..metrics.metrics import unit_features
from ..models.diffusion import Models
from .concept import Concept
from .context import Context

STRATEGIES = ("given", "random", "best", "worst")
TEMPLATE = "a photo of a {}"
KEPT = 10  # best and worst words in the file; only the first is used


@dataclass(frozen=True, kw_only=True)
class Word:
    """An entry of the vocabulary."""

    word: str
    id: int
    score: float | None = None  # its CLIP score


@lru_cache(maxsize=1)
def vocabulary() -> tuple[Word, ...]:
    """Return the candidates, in the order of their ids."""
    from open_clip.tokenizer import SimpleTokenizer

    entries = SimpleTokenizer().encoder.items()
    return tuple(Word(word=entry[:-4], id=i) for entry, i in entries if re.fullmatch("[a-z]+</w>", entry))


def starting_word(
    strategy: str,
    models: Models,
    images: Sequence[Tensor],
    clip: ClipConfig | None,
    generator: Generator,
    context: Context,
) -> Word:
    """Return the initializer by "random", "best" or "worst"; "given" is the concept's own.

    Args:
        images: the references, `[3, h, w]` in 0..1.
        generator: the run's; only "random" draws from it.

    Raises:
        ValueError: the CLIP cannot be loaded.
    """
    if strategy == "random":
        return choose(vocabulary(), generator)
    assert clip is not None  # the other two come with one
    return ranking(models, images, clip, context)[strategy][0]


def words(
    strategy: str, models: Models, concept: Concept, clip: ClipConfig | None, generator: Generator, context: Context
) -> str:
    """Return the initializer of one subject as `trainables.add_tokens` reads it, by any of `STRATEGIES`."""
    if strategy == "given":
        return concept.initializer
    found = starting_word(strategy, models, concept.images, clip, generator, context)
    context.notice(f"{concept.placeholder_token} starts from {found.word}")
    return found.word


def ranking(models: Models, images: Sequence[Tensor], clip: ClipConfig, context: Context) -> dict[str, list[Word]]:
    """Return the `KEPT` best and worst words for these images, the extreme ones first; cached."""
    with context.extractors.on(models.device, clip) as extractor:
        file = _file(context.cache, extractor, images)
        found = _read(file)
        if found is None:
            references = [to_pil(image) for image in images]
            found = _ranked(word_scores(extractor, references, vocabulary(), context.notice))
            _write(file, found)
    return found


@torch.no_grad()
def word_scores(
    clip: FeatureExtractor,
    images: Sequence,
    words: Sequence[Word],
    notice: Callable[[str], None] = lambda sentence: None,
    batch_size: int = 256,
) -> Tensor:
    """Return `cosine(m, CLIP text of "a photo of a {word}")` of each word, `[words]`.

    `m` is the mean of the images' CLIP features, each of length 1 before, so that every image counts the same.
    """
    mean = F.normalize(unit_features(clip.image_features, images).mean(dim=0), dim=0)
    prompts, scores = [TEMPLATE.format(word.word) for word in words], []
    for start in range(0, len(prompts), batch_size):
        notice(f"initializers scored: {start} of {len(prompts)}")
        scores.append(unit_features(clip.text_features, prompts[start : start + batch_size]) @ mean)
    return torch.cat(scores)


def _ranked(scores: Tensor) -> dict[str, list[Word]]:
    entries, order = vocabulary(), scores.argsort(stable=True).tolist()
    chosen = {"best": order[: -KEPT - 1 : -1], "worst": order[:KEPT]}
    return {name: [replace(entries[i], score=float(scores[i])) for i in indices] for name, indices in chosen.items()}


def _file(cache: Path | None, extractor: FeatureExtractor, images: Sequence[Tensor]) -> Path | None:
    """Cache file, named by the images and the CLIP's weights: its file's name may stand for other weights tomorrow."""
    if cache is None:
        return None
    weights = [sampled(parameter) for parameter in extractor.module.parameters()]
    return cache / f"words_{digest_of([*images, *weights], [TEMPLATE])}.json"


def _read(file: Path | None) -> dict[str, list[Word]] | None:
    """Read a ranking; `None` where there is none, or the file contains something else."""
    known = {(word.word, word.id) for word in vocabulary()}
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
        ranked = {name: [Word(**word) for word in found[name]] for name in ("best", "worst")}
        whole = all(each and {(word.word, word.id) for word in each} <= known for each in ranked.values())
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return ranked if whole else None


def _write(file: Path | None, ranked: dict[str, list[Word]]) -> None:
    """Write a ranking; a full disk is no reason to lose it."""
    if file:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with files.replaced(file) as temporary:
                temporary.write_text(
                    json.dumps({name: [asdict(word) for word in each] for name, each in ranked.items()})
                )
