"""`python -m trainers evaluate`: a run's folder and a checkpoint to a report, and the untrained model beside it."""

import json
import shutil

import pytest
import torch

from personalize.demo import build
from personalize.tests.support import drawn_subjects
from personalize.trainers import __main__ as command
from personalize.trainers.cli import evaluate as evaluate_command
from personalize.trainers.evaluation import scorer as scoring
from personalize.trainers.evaluation.prompt_sets import published
from personalize.trainers.images import read_folder, to_pil
from personalize.trainers.metrics.extractor_cache import ExtractorCache
from personalize.trainers.models import sampler
from personalize.trainers.models.checkpoint import load_models
from personalize.trainers.runs import pick, restore
from personalize.trainers.runs.folder import RunFolder

WORLD = ("clip_model", "clip_weights", "dino_model", "dino_weights")
TRAINED = ["steps=2", "batch_size=2", "views=2", "knowledge_weight=0", "augmentation_prompt=none"]
PROTOCOL = ["--steps", "2", "--seeds", "2", "--first-seed", "7", "--cfg", "4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dog's images in two folders, flags of models and metric models, and a finished run: their folder."""
    folder = tmp_path_factory.mktemp("world")
    drawn_subjects.write(folder, ["dog"], pictures=3)
    (folder / "others").mkdir()
    (folder / "dog_0" / "02.jpg").rename(folder / "others" / "02.jpg")
    (folder / "prompts.txt").write_text(drawn_subjects.PROMPTS)
    (folder / "flags.json").write_text(json.dumps(drawn_subjects.models(folder)))
    settings = [text for value in TRAINED for text in ("--set", value)]
    images = ["--images", str(folder / "dog_0"), "--class-word", "dog", "--resolution", "128"]
    files = json.loads((folder / "flags.json").read_text())[:8]  # no metric models
    command.main(["train", "textboost", *images, *settings, *files, "--out", str(folder / "runs")])
    return folder


def evaluate(world, what, out, *more):
    """The report's JSON."""
    flags = [*json.loads((world / "flags.json").read_text()), *PROTOCOL]
    command.main(["evaluate", str(what), "--out", str(out), *flags, *more])
    return json.loads((out / "report.json").read_text())["reports"][0]


def run_of(world):
    (found,) = (path for path in (world / "runs").iterdir() if (path / "run.json").exists())
    return found


def fresh(world):
    return load_models(world / "tiny.safetensors", build.UNET, build.HEADS).to("cpu", torch.float32)


def by_hand(world, models, prompt, text, unseen=()):
    """What Scoring gives for what the sampler draws with `models`, by column."""
    pixels = sampler.sample(models, [prompt] * 2, [7, 8], size=(128, 128), steps=2, guidance=4.0)
    drawn = [
        scoring.GeneratedImage(prompt=prompt, text=text, seed=seed, image=to_pil(picture))
        for seed, picture in zip((7, 8), pixels, strict=True)
    ]
    given = evaluate_command.parser().parse_args(
        ["none", "--out", "x", *json.loads((world / "flags.json").read_text())]
    )
    metric_models = evaluate_command.settings_of(scoring.ScorerConfig, given, "")
    seen = [to_pil(picture) for picture in read_folder(world / "dog_0")[0]]
    scorer = scoring.Scorer(
        scorer_config=metric_models, extractors=ExtractorCache(folders=lambda: [world / "metric_models"])
    )
    report = scorer.report("x", drawn, scoring.References(seen=seen, unseen=unseen))
    return [each.scores for each in report.images]


def test_the_scores_are_those_of_what_was_learned(world, tmp_path):
    more = ["--prompts", str(world / "prompts.txt"), "--first", "1", "--unseen", str(world / "others")]
    told, models = evaluate(world, run_of(world), tmp_path, *more), fresh(world)
    restore.put(RunFolder(run_of(world)).result(), models)
    unseen = [to_pil(picture) for picture in read_folder(world / "others")[0]]
    line = drawn_subjects.PROMPTS.splitlines()[0]
    prompt, text = line.replace("{}", "<concept>"), line.replace("{}", "dog")
    assert [each["scores"] for each in told["images"]] == by_hand(world, models, prompt, text, unseen)


def test_a_finished_run(world, tmp_path, capsys):
    more = ["--prompts", str(world / "prompts.txt"), "--unseen", str(world / "others"), "--label", "mine"]
    told = evaluate(world, run_of(world), tmp_path, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png", "report.csv", "report.html", "report.json", "scatter.png", "table.png",
    ]  # fmt: skip
    assert told["label"] == "mine" and [each["seed"] for each in told["images"]] == [7, 8, 7, 8]
    assert told["images"][0]["prompt"] == "a photo of a <concept> in the snow"
    assert told["images"][0]["text"] == "a photo of a dog in the snow"
    assert all(told["scores"][name] for name in ("CLIP-T", "DINO seen", "DINO unseen"))
    assert "generated 4 of 4 images" in capsys.readouterr().out
    written = (tmp_path / "report.json").stat().st_mtime_ns
    evaluate(world, run_of(world) / "run.json", tmp_path, *more)
    assert "not repeated" in capsys.readouterr().out
    assert (tmp_path / "report.json").stat().st_mtime_ns == written
    told = evaluate(world, run_of(world), tmp_path, *more, "--token-format", "V C", "--compare-with", "removed")
    assert told["images"][0]["prompt"] == "a photo of a <concept> dog in the snow"
    assert told["images"][0]["text"] == "a photo of a in the snow"


def test_the_preferred_state_of_a_run(world, tmp_path, capsys):
    """Each state that Pick by Score kept, as the preference asks for it."""
    flags = json.loads((world / "flags.json").read_text())
    known = dict(zip(flags[::2], flags[1::2], strict=True))
    metric_models = {name: known[f"--{name.replace('_', '-')}"] for name in WORLD}
    picker = {"monitor": "Pick by Score", "every": 1, "prompts": "a {}", "seeds": 1, "sampler_steps": 1} | metric_models
    settings = [text for value in (*TRAINED, "embedding_learning_rate=0.5") for text in ("--set", value)]
    images = ["--images", str(world / "dog_0"), "--class-word", "dog", "--resolution", "128"]
    line = ["train", "textboost", *images, *settings, *flags[:8], "--out", str(tmp_path / "runs")]
    command.main([*line, "--stopper", json.dumps([picker])])
    assert "of 2 scored states the one after step" in capsys.readouterr().out
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if (path / "run.json").exists())
    found = []
    for weight in (0.0, 1.0):
        more = ["--prompts", str(world / "prompts.txt"), "--first", "1", "--text-weight", str(weight)]
        told, models = evaluate(world, folder, tmp_path / "out", *more), fresh(world)
        step = pick.preferred(RunFolder(folder).history(2), weight).step
        restore.put(RunFolder(folder).result(step=step), models)
        scores = by_hand(world, models, told["images"][0]["prompt"], told["images"][0]["text"])
        assert [each["scores"] for each in told["images"]] == scores
        found.append((step, scores))
    last = evaluate(world, folder, tmp_path / "last", *more[:-2])
    assert [[each["scores"] for each in last["images"]] == scores for _, scores in found] == [s == 2 for s, _ in found]
    with pytest.raises(SystemExit, match="error: The value of text_weight of PickByScore is 2.0: use 0.0 to 1.0"):
        evaluate(world, folder, tmp_path / "out", "--text-weight", "2")


def test_the_untrained_model(world, tmp_path):
    """The prompts are those of live subjects, with the class word."""
    flags = ["--images", str(world / "dog_0"), "--class-word", "dog", "--resolution", "128", "--first", "1"]
    told = evaluate(world, "none", tmp_path, *flags)
    assert told["label"] == "untrained" and told["not measured"]["CLIP-I unseen"] == "no unseen references"
    text = published()["DreamBooth live subjects"][0].replace("{}", "dog")
    assert [each["scores"] for each in told["images"]] == by_hand(world, fresh(world), text, text)


@pytest.mark.parametrize(
    ("what", "more", "sentence"),
    [
        ("none", [], "There is no image of the subject: give a folder of images with --images"),
        ("nothing", [], "run.json does not describe a run"),
        ("run", ["--clip-weights", "none"], "There are no CLIP weights 'none'"),
        ("run", ["--prompt-set", "own"], "There is no prompt: write one per line"),
        ("run", ["--seeds", "0"], "The value of seeds of the protocol is 0: use 1 to 256"),
        ("broken", [], "has no complete result: train it to its end first"),
    ],
)
def test_what_is_wrong_gets_one_sentence(world, tmp_path, what, more, sentence):
    shutil.copytree(run_of(world), tmp_path / "broken")
    (tmp_path / "broken" / "clip.safetensors").unlink()
    where = {"run": run_of(world), "none": "none"}.get(what, tmp_path / what)
    with pytest.raises(SystemExit) as ended:
        evaluate(world, where, tmp_path / "out", *more)
    assert ended.value.code.startswith("error: ") and sentence in ended.value.code
    assert "\n" not in ended.value.code and not (tmp_path / "out").exists()


def test_the_report_names_the_checkpoint(world, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(world / "tiny.safetensors")
    state["model.diffusion_model.out.2.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    more = ["--prompts", str(world / "prompts.txt"), "--checkpoint", str(tmp_path / "other.safetensors")]
    told = evaluate(world, run_of(world), tmp_path / "out", *more, "--first", "1")
    assert told["settings"]["checkpoint"] == "other.safetensors"
