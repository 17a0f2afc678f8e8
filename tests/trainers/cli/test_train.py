"""`python -m trainers train` and `rerun`: is a run of the graph, trained again, the same settings and images?"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from personalize.trainers import __main__ as command
from personalize.trainers.cli import evaluate, train
from personalize.trainers.cli.dreambench import command as dreambench
from personalize.trainers.data.concept import Concept
from personalize.trainers.evaluation.protocol import Protocol
from personalize.trainers.evaluation.scorer import ScorerConfig
from personalize.trainers.images import read_folder
from personalize.trainers.recipes import METHODS
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import replay, saved_images
from personalize.trainers.runs.info import RunInfo
from personalize.trainers.runs.run import Run
from personalize.trainers.stopping.monitor import FixedSteps

FAST = TextBoost(steps=2, batch_size=2, views=4, knowledge_weight=0.0, augmentation_prompt="none")


def picture(levels=255, channels=3, seed=0):
    """`[channels, 40, 32]` as read from a file with that many levels."""
    drawn = torch.randint(levels + 1, (channels, 40, 32), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(drawn.numpy().astype(np.float32) / levels)


def concept(**changes):
    """With a mask as the host makes it of transparency, an image of 16 bits, and class images."""
    masks = (1 - picture(channels=1), torch.ones(1, 40, 32))
    words = {"class_word": "cat", "resolution": 32, "captions": ("{} here", ""), "class_captions": ("a cat",)}
    pictures = {"images": (picture(), picture(65535)), "masks": masks, "class_images": (picture(seed=1),)}
    return Concept(**pictures | words | changes)


def folder_of(run, path):
    """A run's folder as far as a repeat reads it."""
    saved_images.write(run.concept, path)
    RunInfo(settings=run.settings(), dataset=run.dataset()).write(path)
    return path


def test_all_values_of_8_bits_come_back_from_a_png(tmp_path):
    """As the host divides them, and so without a file of numbers beside."""
    every = torch.from_numpy(np.arange(256, dtype=np.float32).reshape(1, 16, 16) / 255).expand(3, -1, -1)
    saved_images.write(Concept(images=(every,)), tmp_path)
    assert torch.equal(saved_images.read(tmp_path)["images"][0], every)
    assert not (tmp_path / saved_images.EXACT).exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_read_back_from_its_folder(tmp_path, method):
    stopper = (FixedSteps(steps=3, stop_training=False), *replay.monitors([{"monitor": "DVAR", "window": 7}]))
    for recipe in METHODS[method].values():
        run = Run(concept=concept(), recipe=recipe, stopper=stopper, seed=2**60, dtype=torch.bfloat16)
        again = replay.read(folder_of(run, tmp_path / method / str(id(recipe))) / "run.json")
        assert again.recipe == recipe and again.stopper == stopper and again.dtype == run.dtype
        assert again.digest("a model") == run.digest("a model")


def test_only_what_a_png_would_round_is_kept_as_numbers(tmp_path):
    saved_images.write(concept(), tmp_path)
    assert set(load_file(tmp_path / saved_images.EXACT)) == {"images/01", "masks/00"}
    names = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png"))
    assert names == ["class_images/00.png", "images/00.png", "images/01.png", "masks/00.png", "masks/01.png"]


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (["run_format"], 99, "run.json is of another version"),
        (["method"], "TextBust", "There is no method 'TextBust': choose one of TextBoost,"),
        (["recipe", "stepz"], 3, "TextBoost has no setting 'stepz': use steps, "),
        (["recipe", "steps"], 0, "The value of steps of TextBoost is 0: use 1 to 100000"),
        (["recipe", "steps"], "3", "The value of steps of TextBoost is '3': use a whole number"),
        (["recipe", "templates"], "none", "templates of TextBoost is 'none': use one of imagenet_small, plain"),
        (["concept", "class_wort"], "dog", "Concept has no setting 'class_wort'"),
        (["concept", "crop"], "left", "The crop is 'left': use one of auto, center, random, bucket"),
        (["concept", "images"], [], "has images, which are not words"),
        (["precision"], "float64", "The precision is 'float64': use float32, "),
        (["seed"], "1", "The seed is '1'"),
        (["stopper"], [{"monitor": "dvar"}], "There is no monitor 'dvar': choose one of DVAR, "),
        (["stopper"], [{"monitor": "DVAR", "epsilon": 1}], "DVAR has no setting 'epsilon'"),
    ],
)
def test_what_is_unknown_gets_one_sentence(tmp_path, place, value, sentence):
    folder_of(Run(concept=concept(), recipe=FAST), tmp_path)
    about = json.loads((tmp_path / "run.json").read_text())
    inner = about["settings"]
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError) as error:
        replay.read(tmp_path / "run.json")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_images_gets_one_sentence(tmp_path):
    folder_of(Run(concept=concept(), recipe=FAST), tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="has no images next to its run.json"):
        replay.read(tmp_path / "run.json")
    (tmp_path / "images" / "00.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="images of the run .* cannot be read"):
        replay.read(tmp_path / "run.json")
    with pytest.raises(ValueError, match="does not describe a run"):
        replay.read(tmp_path / "nothing.json")


# -- a method by its name


def asked(tmp_path, *arguments, method="textboost"):
    """The run that a command line asks for."""
    paths = ["--images", str(tmp_path), "--checkpoint", "x", "--out", "y", "--device", "cpu"]
    return train.run_of(train.parser().parse_args([method, *paths, *arguments]))


def test_a_command_line_is_the_run_of_the_same_settings(tmp_path):
    Image.fromarray((picture().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("{} here\n")
    settings = ["--set", "steps=7", "lora_learning_rate=1e-3", "--set", "with_class_word=false"]
    words = ["--class-word", "cat", "--resolution", "32", "--seed", "5", "--crop", "bucket"]
    monitor = ["--stopper", '[{"monitor": "Fixed Steps", "steps": 3}]']
    run = asked(tmp_path, "--preset", "readme", *settings, *words, *monitor)
    recipe = dataclasses.replace(
        METHODS["TextBoost"]["readme"], steps=7, lora_learning_rate=1e-3, with_class_word=False
    )
    same = Concept(images=(picture(),), class_word="cat", resolution=32, captions=("{} here",), crop="bucket")
    by_hand = Run(concept=same, recipe=recipe, seed=5, stopper=(FixedSteps(steps=3),))
    assert run.digest("a model") == by_hand.digest("a model")
    staged = asked(tmp_path, "--set", "run_stages=1", method="attndreambooth").recipe  # text, though it looks a number
    assert staged.run_stages == "1"


def test_every_method_and_setting_stands_in_the_help():
    text = train.parser().format_help()
    for name, presets in METHODS.items():
        assert f"settings of {name.lower().replace(' ', '-')} (presets: {', '.join(presets)})" in text
        for field in (field for preset in presets.values() for field in dataclasses.fields(preset)):
            assert f"  {field.name}=" in text and field.metadata["help"] in text


def test_the_help_of_a_method_shows_its_own_presets_defaults():
    """The first preset's, and what others have instead."""
    text = train.parser("textboost").format_help()
    assert "  steps=250 (style: 150, 2026 CPA: 100, 2026++: 80)  " in text
    assert "  lora_rank=4  " in text and "settings of attndreambooth" not in text
    assert "  cross_attention=False (2026++: True)  " in text  # the first preset that has it


@pytest.mark.parametrize("parser", [evaluate.parser, dreambench.parser])
def test_the_other_commands_have_a_flag_for_every_setting(parser):
    """Of what is generated and how it is scored, with its dataclass's default and help."""
    flags = {action.dest: action for action in parser()._actions}
    for field in (field for settings in (Protocol, ScorerConfig) for field in dataclasses.fields(settings)):
        assert flags[field.name].default == field.default and field.metadata["help"] in flags[field.name].help


def test_the_commands_help_reads_like_a_map(capsys):
    command.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"python -m trainers {word} " in text for word in command.COMMANDS)
    with pytest.raises(SystemExit, match="The command 'textboost' does not exist: use one of train, rerun"):
        command.main(["textboost"])


def test_a_folder_is_read_as_load_references_reads_it(tmp_path):
    """16-bit gray keeps its levels, .tiff is not skipped, a huge image is refused from its header."""
    gray = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(gray).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "b.tiff")
    images, *_ = read_folder(tmp_path)
    assert (images[0][0] - torch.from_numpy(gray.astype(np.float32) / 65535)).abs().max() < 1e-6
    assert images[1][:, 0, 0].tolist() == [1.0, 0.0, 0.0]
    Image.new("1", (20_000, 6_000)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="'c.png' has more than 100 million pixels: make it smaller"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "stepz=1"], "TextBoost has no setting 'stepz'"),
        (["--set", "steps=many"], "The value of steps of TextBoost is 'many'"),
        (["--preset", "none"], "textboost has no preset 'none': use one of benchmark, readme"),
        (["--class-word", ""], "The class word is empty"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(tmp_path, arguments, sentence):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError) as error:
        asked(tmp_path, *arguments)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


# -- the graph's runs


def tiny(folder):
    """The demo's checkpoint, all of it in float16, its MODEL, CLIP and VAE, and its layout."""
    import comfy.sd

    from personalize.demo import architecture, build

    architecture.register()
    path = build.build_checkpoint(folder / "tiny.safetensors")
    with torch.inference_mode():
        return path, comfy.sd.load_checkpoint_guess_config(str(path))[:3], {"unet": build.UNET, "heads": build.HEADS}


def wide(folder):
    """A random SD 1.x in float32, whose text encoder the host keeps in float16."""
    from personalize.tests.support import random_sd

    path = random_sd.write_checkpoint(folder / "random.safetensors")
    return path, random_sd.load(path), {"unet": random_sd.UNET, "heads": random_sd.HEADS}


@pytest.fixture(scope="module", params=[tiny, wide])
def of_graph(request, tmp_path_factory):
    """A run through Train's own functions: its folder, the checkpoint, the checkpoint's layout as a file."""
    import folder_paths

    from personalize.nodes import train as node

    folder = tmp_path_factory.mktemp("graph")
    path, graph, layout = request.param(folder)
    (folder / "layout.json").write_text(json.dumps(layout))
    run = Run(
        concept=concept(class_images=(), class_captions=()),
        recipe=FAST,
        stopper=(FixedSteps(steps=1, stop_training=False),),
    )
    hidden = SimpleNamespace(unique_id="1", extra_pnginfo=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "get_output_directory", lambda: str(folder))
        result = node.find_or_train(*graph, run, lambda sentence: None, hidden=hidden, checkpoint_every=0)
    return result.folder, path, folder / "layout.json"


def rerun(of_graph, out):
    folder, path, layout = of_graph
    files = ["--checkpoint", str(path), "--layout", str(layout), "--out", str(out), "--device", "cpu"]
    command.main(["rerun", str(folder), *files])
    return next(path for path in out.iterdir() if path.name != "cache")


@pytest.mark.comfy
@pytest.mark.slow
def test_a_run_of_the_graph_is_trained_again_with_its_settings_and_images(of_graph, tmp_path, capsys):
    """What it learns is that of the graph up to rounding: the host keeps text encoders in half precision."""
    folder = rerun(of_graph, tmp_path)
    about, original = (json.loads((one / "run.json").read_text()) for one in (folder, of_graph[0]))
    assert about["settings"] == original["settings"] and about["dataset"] == original["dataset"]
    ours, theirs = (load_file(one / "lora.safetensors") for one in (folder, of_graph[0]))
    assert ours.keys() == theirs.keys() and len(ours)
    for name, value in theirs.items():  # two steps of AdamW move a value by at most twice the learning rate
        assert (ours[name] - value).abs().max() <= 4.1 * FAST.lora_learning_rate, name
    rerun(of_graph, tmp_path)
    assert "not trained again" in capsys.readouterr().out


def test_files_that_are_left_out_are_named_and_masks_are_used(tmp_path, capsys):
    for name in ("a.png", "a-masklabel.png"):
        Image.new("RGB", (32, 32), "white").save(tmp_path / name)
    for name in ("notes.pdf", "b.heic"):
        (tmp_path / name).write_text("x")
    assert asked(tmp_path).concept.masks is not None
    assert capsys.readouterr().out == "left out: 'b.heic', 'notes.pdf'\n"
    given = evaluate.parser().parse_args(
        ["none", "--images", str(tmp_path), "--checkpoint", "x", "--out", "y", "--class-word", "dog"]
    )
    with pytest.raises(ValueError, match="CLIP"):  # no metric model is given
        evaluate.evaluate(given)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "left out: 'b.heic', 'notes.pdf'",
        "The reference images are compared whole: their masks are not used.",
    ]


@pytest.mark.parametrize("name", ["none", "a.png"])
def test_a_folder_of_images_that_does_not_exist_gets_one_sentence(tmp_path, name):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"^The folder '.*{name}' does not exist: check its path.$"):
        asked(tmp_path / name)
