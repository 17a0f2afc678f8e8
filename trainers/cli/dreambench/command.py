"""`python -m trainers dreambench`: train and evaluate the subjects of a data set by the DreamBooth protocol.

    python -m trainers dreambench --data DIR --checkpoint FILE --method textboost --out OUT [--set steps=100 views=64]
    python -m trainers dreambench ... --workers 4                        on four cards, through Ray (pip install ray)
    python -m trainers dreambench ... --workers 8 --ray-address auto     on the machines of a Ray cluster

DIR is a copy of the DreamBooth data set (github.com/google/dreambooth), or another in its form: a folder of images
for each subject, and prompts_and_classes.txt with a line subject_name,class for each. Columns "kind" (live or object)
and "initializer" may be added there; without a kind the classes cat and dog are live.

--prompts also takes a folder with a file of prompts for each subject, <subject>.txt, as DVAR's authors have own prompts
for each of theirs.

Each subject is trained on some of its images (--references), images of its prompts are generated and scored; its other
images are the unseen references. OUT/<subject> gets its report, OUT/dreambench.csv, .json and .html the table of all
with mean and standard deviation over subjects. Started again, subjects that are complete with the same settings are not
repeated, and an interrupted training resumes from its last checkpoint. Subjects may also be shared by hand: the same
OUT with other --subjects, and at the end all of them once for the table.

With Ray each subject is a task. Workers on other machines need this folder, DIR, OUT, the checkpoint and the metric
models' files under the same paths. The scores do not depend on the number of workers (on CPUs: with the same
OMP_NUM_THREADS).

For TextBoost the one reference of each of the 30 subjects and its initializer, such as "corgi dog", are those that the
authors name (subjects.json). Other methods train on all images and start from the class word.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ...device import training_dtype
from ...evaluation import vqa
from ...evaluation.protocol import Protocol
from ...evaluation.scorer import ScorerConfig
from ...runs import replay
from ..options import (
    METHOD_NAMES,
    WORDS,
    loader,
    method_flags,
    model_flags,
    new_parser,
    own_prompts,
    protocol_flags,
    recipe_of,
    settings_help,
    settings_of,
    training_flags,
    word_flags,
)
from . import dataset, farm
from .dataset import Subject
from .farm import Farm
from .subject import Bench, Worker
from .table import FAILED, Row, Table

ONE_IMAGE = ("textboost",)  # methods whose paper learns from a single one
CLASS = "class"  # of --initializers: the class word
OWN_WORDS = ("class_word",)  # given by the data set


def parser() -> argparse.ArgumentParser:
    """Return the flags of `dreambench`."""
    command = new_parser(" dreambench", __doc__, settings_help(METHOD_NAMES))
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set, or its folder dataset")
    model_flags(command)
    command.add_argument("--out", type=Path, required=True, help="reports, the table, and in runs/ the trainings")
    command.add_argument("--subjects", default="", metavar="A,B", help="names of the only subjects to run")
    command.add_argument(
        "--references", default="", metavar="N|FILE",
        help="train on the first N images by name, 0: all; or on the image that a FILE names, with a line "
        "subject,image.jpg for each. By default as in the papers: TextBoost on the image that its authors name, all (3 "
        "to 6) for AttnDreamBooth, Textual Inversion, DreamBooth and Custom Diffusion",
    )  # fmt: skip
    command.add_argument(
        "--initializers", default="", metavar="class|FILE",
        help="class: each subject's class word; or a FILE with a line subject,words for each. By default those of the "
        "data set; for TextBoost without --initializer-token also those that its authors name",
    )  # fmt: skip
    method = command.add_argument_group("training")
    method.add_argument("--method", default="textboost", choices=METHOD_NAMES)
    method_flags(method)
    word_flags(method, leave=OWN_WORDS)
    training_flags(method)
    protocol_flags(command)
    several = command.add_argument_group("several workers")
    several.add_argument(
        "--workers", type=int, default=1, metavar="N", help="subjects at once; more than one needs ray"
    )
    several.add_argument("--ray-address", default="", metavar="ADDRESS", help="of a Ray that runs: auto, or host:port")
    several.add_argument(
        "--gpus", type=float, help="cards of each worker, 0.5 for half of one; 1 where --device is cuda"
    )
    return command


def main(arguments: Sequence[str]) -> None:
    """Run `dreambench`; exit with 1 where a subject failed."""
    if any(row.state == FAILED for row in dreambench(parser().parse_args(arguments))):
        sys.exit(1)


def dreambench(given: argparse.Namespace) -> list[Row]:
    """Train, generate and score what is not yet done, and write the table after each subject.

    Raises:
        ValueError: a file is missing, or a setting does not fit; nothing was trained then.
    """
    say = partial(print, flush=True)
    subjects = with_lists(dataset.read(given.data, [name for name in given.subjects.split(",") if name]), given)
    bench = bench_of(given)
    for subject in subjects:
        bench.check(subject)
    workers = farm_of(given)
    worker = Worker(bench)  # reads everything once, so that errors are found here
    title, settings = f"DreamBooth protocol: {given.method}", settings_shown(given, bench, worker.model)
    rows = workers.rows(bench, subjects, say) if workers else map(partial(worker, say=say), subjects)
    del worker  # Ray's have models of their own
    found = {subject.name: Row.not_yet(subject) for subject in subjects}
    for row in rows:
        found[row.subject] = row
        Table([*found.values()]).write(given.out, settings, title)
    say(Table([*found.values()]).text())
    return [*found.values()]


def with_lists(subjects: list[Subject], given: argparse.Namespace) -> list[Subject]:
    """Return the subjects with the images and initializers that the flags choose."""
    one_image = given.method in ONE_IMAGE
    if _is_file(given.references) or (one_image and not given.references):
        subjects = dataset.with_references(subjects, Path(given.references) if given.references else None)
    if given.initializers == CLASS:
        return [dataclasses.replace(subject, initializer="") for subject in subjects]
    if given.initializers or (one_image and not given.initializer_token):
        return dataset.with_initializers(subjects, Path(given.initializers) if given.initializers else None)
    return subjects


def references_of(given: argparse.Namespace) -> int:
    """Return how many images of each subject are trained on; 0 for all."""
    if _is_file(given.references):
        return 1
    if int(given.references or 0) < 0:
        raise ValueError(f"The number of references is {given.references}: use 1 or more, or 0 for all images.")
    return int(given.references or given.method in ONE_IMAGE)


def _is_file(references: str) -> bool:
    return bool(references) and not references.removeprefix("-").isdecimal()


def bench_of(given: argparse.Namespace) -> Bench:
    """Return what all subjects have in common, from the flags."""
    device = torch.device(given.device)
    return Bench(
        load=loader(given),
        out=given.out,
        device=given.device,
        dtype=training_dtype(given.precision, device),
        recipe=recipe_of(given.method, given.preset, given.set),
        stopper=replay.monitors(json.loads(given.stopper)),
        seed=given.seed,
        words={word.name: getattr(given, word.name) for word in WORDS if word.name not in OWN_WORDS},
        references=references_of(given),
        protocol=settings_of(Protocol, given, "the protocol"),
        prompts=given.prompts if given.prompts and given.prompts.is_dir() else own_prompts(given),
        scorer_config=settings_of(ScorerConfig, given, "the metric models"),
        clip_folders=tuple(given.clip_folder),
        vqa_download=given.vqa_download,
        micro_batch_size=given.micro_batch_size,
        checkpoint_every=given.checkpoint_every,
    )


def farm_of(given: argparse.Namespace) -> Farm | None:
    """Return the workers; `None` where this process does everything.

    Raises:
        ValueError: ray is needed and missing.
    """
    if given.workers < 1:
        raise ValueError(f"The number of workers is {given.workers}: use 1 or more.")
    if given.workers == 1 and not given.ray_address:
        return None
    farm.imported()
    gpus = given.gpus if given.gpus is not None else float(given.device.startswith("cuda"))
    return Farm(workers=given.workers, gpus=gpus, address=given.ray_address)


def settings_shown(given: argparse.Namespace, bench: Bench, model: str) -> dict:
    """Return the settings that dreambench.json has."""
    return {
        "method": type(bench.recipe).__name__,
        "recipe": dataclasses.asdict(bench.recipe),
        "checkpoint": given.checkpoint.name,
        "model": model,
        "references": bench.references,
        "protocol": dataclasses.asdict(bench.protocol),
        "metric_models": dataclasses.asdict(bench.scorer_config),
        vqa.VQA: vqa.missing(bench.vqa_download) or vqa.MODEL,
    }
