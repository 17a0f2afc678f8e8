"""A full disk, a loss that is no number, a workflow of an older version: nothing is lost, and nobody reads Python."""

import contextlib
import errno
import json
import math
import re

import pytest
import torch

from personalize.tests.support import prompts, small
from personalize.trainers.data.concept import Concept
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train as training
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.run import Run
from personalize.trainers.text import size_of

NO_NUMBER = r"^The loss became (nan|inf) at step \d+: lower the learning rates, or set the precision to float32\.$"
NOT_FINITE = r"^The model has NaN or infinite values before it is trained, in the text encoder: load it again, or"
STEPPED_BACK = r"^the loss was no number at step \d+; this is the state after step \d+$"


@contextlib.contextmanager
def files_of_at_most(size):
    """A full disk, as far as a process can have one of its own: no file of it grows beyond `size` bytes."""
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train(folder, checkpoint_every=2, models=None):
    picture = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(5))
    recipe = TextBoost(steps=5, batch_size=2, views=4, knowledge_weight=0.0)
    run = Run(concept=Concept(images=(picture,), resolution=32), recipe=recipe)
    return training.train(run, models or small.models(), folder, checkpoint_every=checkpoint_every)


@pytest.mark.parametrize(("size", "checkpoint_every"), [(3000, 2), (7000, 2), (20_000, 0)])
def test_a_full_disk_gets_one_sentence_and_the_run_goes_on_when_there_is_room(tmp_path, size, checkpoint_every):
    """The disk is full for the image, for the first checkpoint, for the result."""
    whole = train(tmp_path / "whole" / "run")
    folder = tmp_path / "full" / "run"
    with files_of_at_most(size), pytest.raises(RuntimeError) as error:
        train(folder, checkpoint_every)
    assert re.match(
        r"^The run's folder run cannot be written \(File too large\): make room on that disk and queue again; the run "
        r"goes on from its last checkpoint\.$",
        str(error.value),
    )
    assert not prompts.faults(str(error.value))
    assert RunFolder(folder).result() is None
    result = train(folder)
    assert len(result.history) == 5 and result.complete
    assert all(torch.equal(result.lora[key], whole.lora[key]) for key in whole.lora)
    assert RunFolder(folder).result() is not None


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EROFS, r"\(Read-only file system\): allow ComfyUI to write there and queue again"),
        (errno.EACCES, r"\(Permission denied\): allow ComfyUI to write there and queue again"),
        (errno.ENOENT, r"\(No such file or directory\): put the folder back that was moved or deleted and"),
        (errno.EMFILE, r"\(Too many open files\): raise the system's limit of open files and queue again"),
        (errno.EIO, r"\(Input/output error\): check that disk and queue again"),
        (errno.ENOSPC, r"\(No space left on device\): make room on that disk and queue again"),
    ],
)
def test_what_keeps_a_run_from_being_written_decides_the_remedy(tmp_path, monkeypatch, number, sentence):
    def fails(*given):
        raise OSError(number, "x", str(tmp_path))

    monkeypatch.setattr(RunFolder, "save_state", fails)
    with pytest.raises(RuntimeError, match=f"^The run's folder run cannot be written {sentence}") as error:
        train(tmp_path / "run")
    assert not prompts.faults(str(error.value))


@pytest.mark.parametrize(("part", "name"), [("unet", "U-Net"), ("text", "text encoder"), ("autoencoder", "")])
def test_what_was_no_number_before_the_training_is_named(tmp_path, part, name):
    models, nan = small.models(), float("nan")
    if part == "autoencoder":
        models.encode_images = lambda pixels, encode=models.encode_images: (encode(pixels)[0] * nan, None)
    else:
        module = models.unet if part == "unet" else models.text_encoders[0].module
        next(p for key, p in module.named_parameters() if key.endswith("weight") and "norm" in key)[0] = nan
    sentence = f"^The model has NaN or infinite values before it is trained, in the {name}: load it again"
    with pytest.raises(
        ValueError, match=sentence if name else "^The autoencoder makes NaN or infinite values of an im"
    ):
        train(tmp_path / "run", models=models)


def test_free_space_is_said_in_the_unit_that_shows_it():
    assert [size_of(size) for size in (0, 30 * 2**20, 2**30, 5 * 2**29)] == ["0.0 MB", "30.0 MB", "1.0 GB", "2.5 GB"]


def test_the_disk_is_full_at_another_point_for_each_size(tmp_path):
    """What the sizes above are for; with other models they might test the same thing three times."""
    train(tmp_path / "whole" / "run")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "whole" / "run").rglob("*") if file.is_file()}
    assert sizes["run.json"] < 3000 < sizes["00.png"] < 7000 < sizes["last.safetensors"]
    assert sizes["lora.safetensors"] < 20_000 < sizes["clip.safetensors"]


@pytest.mark.comfy
def test_a_full_disk_leaves_the_file_that_is_saved_over(tmp_path):
    from personalize.nodes import save

    file = tmp_path / "mine.safetensors"
    save._write({"a": torch.zeros(10)}, str(file), {})
    before = file.read_bytes()
    with files_of_at_most(1000), pytest.raises(RuntimeError) as error:
        save._write({"a": torch.zeros(1000)}, str(file), {})
    assert str(error.value) == (
        "The file mine.safetensors cannot be written (File too large): make room on that disk and queue again."
    )
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.fixture(scope="module")
def good(server, object_info):
    return prompts.smallest(object_info, server.checkpoint)


def trained_now(server, prompt):
    """How the prompt ended, and the folder it left."""
    root = server.base / "output" / "personalize" / "runs"
    before = set(root.glob("*"))
    outcome = prompts.run(server.client, prompt)
    (folder,) = set(root.glob("*")) - before
    return outcome, folder


@pytest.mark.slow
@pytest.mark.comfy
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_rates_far_too_high_end_in_a_sentence_or_the_last_good_state(server, good, precision):
    """Which of the two depends on the step at which the loss is no number any more."""
    rates = {"lora_learning_rate": 1.0, "embedding_learning_rate": 1.0, "unet_lora_learning_rate": 1.0}
    wild = {"lora_alpha": 1024.0, "lora_rank": 1, "unet_lora_rank": 4, "clamp_norms": False, "max_grad_norm": 0.0}
    settings = {f"recipe.preset.{name}": value for name, value in (rates | wild | {"steps": 12}).items()}
    prompt = prompts.changed(good, settings | {"train.precision": precision, "train.checkpoint_every": 1})
    outcome, folder = trained_now(server, prompt)
    about = json.loads((folder / "run.json").read_text())
    if outcome.kind == "failed":
        assert re.match(NO_NUMBER, outcome.message) and not prompts.faults(outcome.message)
        assert not about["complete"] and RunFolder(folder).result() is None
    elif precision == "bfloat16" and about["stop_reason"] == "all 12 steps done":
        # It reaches as far as float32: on some processors every loss stays a number, and there is nothing to end.
        assert all(math.isfinite(entry["loss"]) for entry in RunFolder(folder).result().history)
    else:
        assert about["complete"] and re.match(STEPPED_BACK, about["stop_reason"])
        assert all(tensor.isfinite().all() for tensor in RunFolder(folder).result().lora.values())


@pytest.mark.slow
@pytest.mark.comfy
def test_a_model_that_is_no_number_is_one_sentence(server, good):
    """A strength of NaN gives a model of NaNs; the training names it at its first step and is not complete."""
    assert prompts.run(server.client, good).kind == "success"
    inputs = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "strength_model": float("nan")}
    lora = ("LoraLoader", {**inputs, "strength_clip": float("nan"), "lora_name": "smallest.safetensors"})
    changes = {"lora": lora, "train.model": ["lora", 0], "train.clip": ["lora", 1]}
    outcome, folder = trained_now(server, prompts.changed(good, changes))
    assert re.match(NOT_FINITE, outcome.message) and not prompts.faults(outcome.message)
    assert RunFolder(folder).result() is None and RunFolder(folder).result(partial=True) is None
