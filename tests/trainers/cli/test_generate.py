"""`python -m trainers generate`: a folder of images for each prompt, those that the learned model generates."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.demo import build
from personalize.tests.support import drawn_subjects
from personalize.trainers import __main__ as command
from personalize.trainers.cli import generate
from personalize.trainers.images import to_pil
from personalize.trainers.models import sampler
from personalize.trainers.models.checkpoint import load_models
from personalize.trainers.runs import restore
from personalize.trainers.runs.folder import RunFolder

TRAINED = ["run_stages=1", "steps_1=2", "batch_size_1=1", "views=2", "learning_rate_1=0.1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of the tiny model, two prompts, and in runs/ a finished run of AttnDreamBooth: their folder."""
    folder = tmp_path_factory.mktemp("world")
    drawn_subjects.write(folder, ["dog"], pictures=1)
    (folder / "prompts.txt").write_text("a photo of a {} in the snow\n\na painting of a {}\n")
    flags = drawn_subjects.models(folder)[:8]  # no metric models
    (folder / "flags.json").write_text(json.dumps(flags))
    settings = [text for value in TRAINED for text in ("--set", value)]
    images = ["--images", str(folder / "dog_0"), "--class-word", "dog", "--resolution", "128"]
    command.main(["train", "attndreambooth", *images, *settings, *flags, "--out", str(folder / "runs")])
    return folder


def run_of(world):
    (found,) = (path for path in (world / "runs").iterdir() if (path / "run.json").exists())
    return found


def arguments(world, out, *more):
    flags = json.loads((world / "flags.json").read_text())
    given = ["--prompts", str(world / "prompts.txt"), "--steps", "2", "--images", "3", "--batch-size", "2"]
    return ["--out", str(out), *flags, *given, *more]


def test_every_prompt_gets_a_folder_with_the_learned_models_images(world, tmp_path, capsys):
    command.main(["generate", str(run_of(world)), *arguments(world, tmp_path / "out")])
    prompts = ["a photo of a <concept> dog in the snow", "a painting of a <concept> dog"]
    names = ["01_a_photo_of_a_concept_dog_in_the_snow", "02_a_painting_of_a_concept_dog"]
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"prompts.txt", *(f"{name}/{i:03d}.png" for name in names for i in range(3))}
    table = "".join(f"{name}\t{prompt}\n" for name, prompt in zip(names, prompts, strict=True))
    assert (tmp_path / "out" / "prompts.txt").read_text() == table
    assert f"{names[0]}: 3 images of" in capsys.readouterr().out
    models = load_models(world / "tiny.safetensors", build.UNET, build.HEADS).to("cpu", torch.float32)
    restore.put(RunFolder(run_of(world)).result(), models)
    for name, prompt in zip(names, prompts, strict=True):
        pixels = sampler.sample(models, [prompt] * 3, [0, 1, 2], size=(128, 128), steps=2, guidance=7.5)
        for i, expected in enumerate(map(to_pil, pixels)):
            with Image.open(tmp_path / "out" / name / f"{i:03d}.png") as image:
                assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1  # another batch rounds


def test_another_form_of_the_subject_and_other_seeds(world, tmp_path):
    more = ("--token-format", "V", "--images", "1", "--first-seed", "2")
    command.main(["generate", str(run_of(world)), *arguments(world, tmp_path, *more)])
    assert (tmp_path / "prompts.txt").read_text().splitlines()[
        1
    ] == "02_a_painting_of_a_concept\ta painting of a <concept>"
    assert [path.name for path in (tmp_path / "02_a_painting_of_a_concept").iterdir()] == ["000.png"]


def test_the_defaults_are_the_authors():
    """16 images per prompt in 50 steps, guidance 7.5, seed 0."""
    given = generate.parser().parse_args(["x", "--checkpoint", "x", "--prompts", "x", "--out", "x"])
    assert (given.images, given.steps, given.cfg, given.first_seed) == (16, 50, 7.5, 0)


@pytest.mark.parametrize(
    ("what", "more", "sentence"),
    [
        ("run", ["--prompts", "none.txt"], "The prompt file 'none.txt' cannot be read"),
        ("run", ["--prompts", "EMPTY"], "There is no prompt: write one per line"),
        ("run", ["--images", "0"], "The value of images of the generation is 0: use 1 to 256"),
        ("nothing", [], "run.json does not describe a run"),
        ("broken", [], "has no complete result: train it to its end first"),
    ],
)
def test_what_is_wrong_gets_one_sentence(world, tmp_path, what, more, sentence):
    shutil.copytree(run_of(world), tmp_path / "broken")
    for file in (tmp_path / "broken").glob("*.safetensors"):
        file.unlink()
    Path(tmp_path / "empty.txt").write_text("\n")
    more = [str(tmp_path / "empty.txt") if word == "EMPTY" else word for word in more]
    where = run_of(world) if what == "run" else tmp_path / what
    with pytest.raises(SystemExit) as ended:
        command.main(["generate", str(where), *arguments(world, tmp_path / "out", *more)])
    assert ended.value.code.startswith("error: ") and sentence in ended.value.code
    assert "\n" not in ended.value.code and not (tmp_path / "out").exists()
