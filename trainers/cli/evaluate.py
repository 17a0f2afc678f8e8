"""`python -m trainers evaluate`: generate images with a trained run or the untrained model, and score them.

    python -m trainers evaluate RUN --checkpoint FILE --out DIR [--unseen DIR ...]
    python -m trainers evaluate none --images DIR --class-word dog --checkpoint FILE --out DIR

RUN is the folder of a finished run, as Train and `python -m trainers` write it; "none" is the untrained model, whose
prompts have the class word. DIR gets report.html, report.csv, report.json, table.png, grid.png and scatter.png.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..data.concept import Concept
from ..device import training_dtype
from ..evaluation import protocol
from ..evaluation.protocol import Evaluation, Protocol
from ..evaluation.scorer import References, ScorerConfig
from ..images import read_folder, to_pil
from ..models.fingerprint import fingerprint
from ..reports import report_folder
from ..runs import replay, restore
from ..runs.folder import RunFolder
from ..runs.pick import picked
from ..runs.result import RunResult
from ..runs.run import Run
from ..settings import checked
from ..stopping.pick_by_score import PickByScore
from .dreambench.dataset import kind_of
from .options import (
    TEXT_WEIGHT,
    extractor_cache,
    loader,
    model_flags,
    new_parser,
    own_prompts,
    precision_flag,
    protocol_flags,
    settings_of,
    word_flags,
)

NONE = "none"


def parser() -> argparse.ArgumentParser:
    """Return the flags of `evaluate`."""
    command = new_parser(" evaluate", __doc__)
    command.add_argument("run", metavar=f"RUN|{NONE}", help="the folder of a finished run; none: the untrained model")
    model_flags(command)
    command.add_argument("--out", type=Path, required=True, help="the folder of the report")
    command.add_argument("--label", default="", help="the model's name in the report; by default the method")
    command.add_argument("--unseen", type=Path, metavar="DIR", help="images of the subject that were not trained on")
    command.add_argument("--text-weight", **TEXT_WEIGHT)
    protocol_flags(command)
    untrained = command.add_argument_group(f"where {NONE} is given")
    untrained.add_argument("--images", type=Path, metavar="DIR", help="images of the subject")
    word_flags(untrained, leave=("placeholder_token", "initializer_token", "crop"))
    precision_flag(untrained)
    return command


def main(arguments: Sequence[str]) -> None:
    """Run `evaluate`."""
    evaluate(parser().parse_args(arguments))


def evaluate(given: argparse.Namespace) -> None:
    """Generate, score and write; a report with the same settings stays as it is.

    Raises:
        ValueError: a file is missing, or a setting does not fit.
    """
    run, result = _untrained(given) if given.run == NONE else finished(Path(given.run), given.text_weight)
    concept, device = run.concept, torch.device(given.device)
    chosen = settings_of(Protocol, given, "the protocol")
    subject = run.recipe.subject(concept) if result else "C"
    prompts = chosen.prompts(own_prompts(given), kind_of(concept.class_word), concept, subject)
    unseen = read_folder(given.unseen, print)[0] if given.unseen else ()
    if concept.masks:
        print("The reference images are compared whole: their masks are not used.")
    extractors, scorer_config = extractor_cache(given), settings_of(ScorerConfig, given, "the metric models")
    extractor_weights = protocol.load_extractors(scorer_config, extractors)
    models = loader(given)().to("cpu", run.dtype)
    model = fingerprint(models)
    evaluation = Evaluation(
        protocol=chosen, scorer_config=scorer_config, extractor_weights=extractor_weights,
        prompts=tuple(prompts), dtype=run.dtype, vqa_download=given.vqa_download,
        references=References(seen=[*map(to_pil, concept.images)], unseen=[*map(to_pil, unseen)]),
        side=concept.at_resolution(models.resolution),
    )  # fmt: skip
    label = given.label or (result.settings["method"] if result else "untrained")
    digest = evaluation.digest(f"{label}: {f'{run.digest(model)} {result.picked}' if result else model}")
    if report_folder.read(given.out, digest):
        print("complete with these settings, not repeated")
        return
    models = models.to(device, run.dtype)
    if result:
        restore.put(result, models)
    generated = evaluation.generated(models, print)
    del models  # frees memory for the metric models
    report = evaluation.report(label, generated, extractors, given.device, print)
    facts = {"checkpoint": given.checkpoint.name, "run": result.folder.name if result else NONE, "digest": digest}
    report_folder.write(given.out, [replace(report, settings=report.settings | facts)])
    print(report.summary())


def finished(folder: Path, text_weight: float | None) -> tuple[Run, RunResult]:
    """Read a run's settings and images, and its result.

    Args:
        text_weight: of a run with Pick by Score, which state; `None` for the last.

    Raises:
        ValueError: there is no finished run.
    """
    folder = folder.parent if folder.name == "run.json" else folder
    run = replay.read(folder / "run.json")
    result = RunFolder(folder).result()
    if result is None:
        raise ValueError(f"The run {folder.name} has no complete result: train it to its end first.")
    if text_weight is None:
        return run, result
    return run, picked(result, **checked(PickByScore, {"text_weight": text_weight}))


def _untrained(given: argparse.Namespace) -> tuple[Run, None]:
    """Return a run that trains nothing."""
    if given.images is None:
        raise ValueError("There is no image of the subject: give a folder of images with --images.")
    images, _, masks = read_folder(given.images, print)
    concept = Concept(images=images, masks=masks, class_word=given.class_word, resolution=given.resolution)
    dtype = training_dtype(given.precision, torch.device(given.device))
    return Run(concept=concept, recipe=None, dtype=dtype), None  # type: ignore[arg-type]  # nobody asks for it
