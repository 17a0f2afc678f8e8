"""`python -m trainers dreambench`: the right table, whatever ends it in between, and however many work on it."""

import csv
import dataclasses
import errno
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from personalize.demo import build
from personalize.tests.support import drawn_subjects, evaluating, waiting
from personalize.trainers import __main__ as command
from personalize.trainers import images
from personalize.trainers.cli.dreambench import command as dreambench
from personalize.trainers.cli.dreambench import dataset as dreambench_data
from personalize.trainers.cli.dreambench.subject import Worker
from personalize.trainers.cli.dreambench.table import FAILED, MISSING, SCORES, Row, Table
from personalize.trainers.evaluation import scorer, vqa
from personalize.trainers.evaluation.report import COLUMNS, Report, Scored, Spread
from personalize.trainers.metrics.extractor_cache import ExtractorCache
from personalize.trainers.models import sampler
from personalize.trainers.models.checkpoint import load_models
from personalize.trainers.runs import restore
from personalize.trainers.runs.folder import RunFolder

TRAINED = ["steps=12", "batch_size=1", "views=2", "knowledge_weight=0", "augmentation_prompt=none"]
SHORT = ["--set", *TRAINED[:3], "--set", *TRAINED[3:], "--steps", "3", "--cfg", "4", "--seeds", "2"]
NAMES = ["cup_1", "dog_0", "fish_2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data set of three subjects, and the flags that all calls share."""
    folder = tmp_path_factory.mktemp("world")
    drawn_subjects.write(folder / "data", ["dog", "cup", "fish"], pictures=2)
    (folder / "prompts.txt").write_text(drawn_subjects.PROMPTS)
    prompts = ["--resolution", "128", "--prompts", str(folder / "prompts.txt"), "--checkpoint-every", "2"]
    flags = [*drawn_subjects.models(folder), *prompts, *SHORT]
    return SimpleNamespace(folder=folder, data=folder / "data", flags=flags)


def arguments(files, out, *more):
    return ["--data", str(files.data), "--out", str(out), *files.flags, *more]


def bench(files, out, *more):
    """The rows of a call in this process."""
    return dreambench.dreambench(dreambench.parser().parse_args(arguments(files, out, *more)))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of a call that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert [row.subject for row in bench(files, out)] == NAMES
    return out


def told(out, name):
    return json.loads((out / name / "report.json").read_text())["reports"][0]


def rows_of(file):
    return [*csv.DictReader(file.read_text(encoding="utf-8").splitlines())]


def scores(out, names=NAMES):
    return {name: (told(out, name)["scores"], told(out, name)["images"]) for name in names}


@pytest.mark.slow
def test_the_table_holds_what_scoring_gives(files, whole):
    """One subject by hand: learned from the first image, drawn, scored; and the means over all subjects."""
    folder = whole / "runs" / told(whole, "fish_2")["settings"]["run"]
    models = load_models(files.folder / "tiny.safetensors", build.UNET, build.HEADS).to("cpu", torch.float32)
    restore.put(RunFolder(folder).result(), models)
    lines = drawn_subjects.PROMPTS.splitlines()
    pairs = [(line, seed) for line in lines for seed in (0, 1)]
    texts = [line.replace("{}", "<concept>") for line, _ in pairs]
    pixels = sampler.sample(models, texts, [seed for _, seed in pairs], size=(128, 128), steps=3, guidance=4.0)
    drawn = [
        scorer.GeneratedImage(prompt=text, text=line.replace("{}", "fish"), seed=seed, image=images.to_pil(picture))
        for text, (line, seed), picture in zip(texts, pairs, pixels, strict=True)
    ]
    first, second = (images.to_pil(picture) for picture in images.read_folder(files.data / "fish_2")[0])
    given = dreambench.parser().parse_args(arguments(files, whole))
    metric_models = dreambench.bench_of(given).scorer_config
    shelf = ExtractorCache(folders=lambda: [files.folder / "metric_models"])
    by_hand = scorer.Scorer(scorer_config=metric_models, extractors=shelf).report(
        "fish_2", drawn, scorer.References(seen=[first], unseen=[second])
    )

    rows = [row for row in rows_of(whole / "fish_2" / "report.csv") if row["of"] == "image"]
    found = [{name: float(row[name]) for name in COLUMNS[:-1]} for row in rows]
    assert found == [each.scores for each in by_hand.images]
    table = {row["subject"]: row for row in rows_of(whole / "dreambench.csv")}
    for name in COLUMNS:
        assert float(table["fish_2"][name]) == by_hand.spread(name).mean
        means = [told(whole, subject)["scores"][name]["mean"] for subject in NAMES]
        assert float(table["mean"][name]) == statistics.fmean(means)
        assert float(table["standard deviation"][name]) == statistics.stdev(means)
    assert table["mean"]["state"] == "3 of 3 subjects"
    assert table["fish_2"]["VQA"] == ""
    assert table["fish_2"]["note"] == "VQA: the package t2v_metrics is not installed"
    assert '<a href="fish_2/report.html">' in (whole / "dreambench.html").read_text()


def test_masks_of_a_subject_are_trained_with_and_files_that_are_left_out_are_named(files, tmp_path, monkeypatch):
    folder, runs, said = tmp_path / "data" / "dog", [], []
    folder.mkdir(parents=True)
    for name in ("1.png", "2.png", "2-masklabel.png"):
        Image.new("RGB", (32, 32), "white").save(folder / name)
    (folder / "notes.pdf").write_text("x")
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path), *files.flags, "--references", "0"]
    (subject,) = dreambench_data.read(tmp_path / "data", [])
    worker = object.__new__(Worker)
    worker.bench = dreambench.bench_of(dreambench.parser().parse_args(flags))
    monkeypatch.setattr(Worker, "_evaluation", lambda self, subject, run, unseen: runs.append(run) or 1 / 0)
    assert worker(dataclasses.replace(subject, reference="2.png"), said.append).state == FAILED
    assert said[0] == "dog: left out: 'notes.pdf'" and len(runs[0].concept.masks) == 2


def test_a_failed_subject_names_no_folder_of_this_machine(files, tmp_path, monkeypatch):
    """Its sentence stands in a page that others may read."""
    worker = object.__new__(Worker)
    worker.bench = dreambench.bench_of(dreambench.parser().parse_args(arguments(files, tmp_path)))
    (subject, *_) = dreambench_data.read(files.data, [])
    locked = OSError(errno.EACCES, "Permission denied", str(tmp_path / "1.png"))
    monkeypatch.setattr(Worker, "_done", lambda *given: (_ for _ in ()).throw(locked))
    row = worker(subject, lambda sentence: None)
    assert row.why == "The file '1.png' cannot be used (Permission denied): allow ComfyUI to write there."


@pytest.mark.slow
def test_only_what_has_other_settings_is_made_again(files, whole, tmp_path, capsys):
    one, out = ["--subjects", "dog_0"], tmp_path / "out"
    shutil.copytree(whole, out)
    before = (out / "dog_0" / "report.json").stat().st_mtime_ns
    bench(files, out, *one)
    assert "dog_0: complete with these settings, not repeated" in capsys.readouterr().out
    assert (out / "dog_0" / "report.json").stat().st_mtime_ns == before
    bench(files, out, *one, "--cfg", "3")  # other images of the same training
    said = capsys.readouterr().out
    assert "dog_0: already trained" in said and told(out, "dog_0")["settings"]["cfg"] == 3.0
    bench(files, out, *one, "--references", "0")
    said = capsys.readouterr().out
    assert "already trained" not in said and "step 1 of 12" in said
    assert told(out, "dog_0")["not measured"]["DINO unseen"] == "all images were trained on"


@pytest.mark.slow
def test_another_metric_model_of_the_same_name_is_asked_again(files, whole, tmp_path, capsys):
    out, metric_models = tmp_path / "out", tmp_path / "metric_models"
    shutil.copytree(whole, out)
    shutil.copytree(files.folder / "metric_models", metric_models)
    given = [
        str(metric_models) if word == str(files.folder / "metric_models") else word for word in arguments(files, out)
    ]
    dreambench.dreambench(dreambench.parser().parse_args(given))
    assert capsys.readouterr().out.count("not repeated") == 3
    state = load_file(metric_models / evaluating.ENCODER)
    save_file({name: weight * 1.01 for name, weight in state.items()}, metric_models / evaluating.ENCODER)
    dreambench.dreambench(dreambench.parser().parse_args([*given, "--subjects", "dog_0"]))
    said = capsys.readouterr().out
    assert "dog_0: already trained" in said and "not repeated" not in said


def test_a_subject_that_fails_stops_no_other(files, tmp_path, capsys):
    data = drawn_subjects.write(tmp_path / "data", ["dog", "cup"], pictures=1)
    (data / "cup_1" / "00.jpg").write_bytes(b"no picture")
    others = SimpleNamespace(data=data, flags=files.flags)
    with pytest.raises(SystemExit) as ended:
        command.main(["dreambench", *arguments(others, tmp_path / "out", "--set", "steps=1")])
    assert ended.value.code == 1
    table = {row["subject"]: row for row in rows_of(tmp_path / "out" / "dreambench.csv")}
    assert table["cup_1"]["state"] == FAILED and "'00.jpg' cannot be read" in table["cup_1"]["note"]
    assert table["dog_0"]["state"] == "done" and table["mean"]["state"] == "1 of 2 subjects"
    assert "cup_1, failed: The image '00.jpg' cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--data", "nowhere"], "The folder 'nowhere' has no subjects: give a copy of the DreamBooth data set"),
        (["--subjects", "dog_0,god"], "The subject 'god' does not exist: choose among cup_1, dog_0, fish_2"),
        (["--workers", "2"], "Several workers need the package ray: pip install ray"),
        (["--workers", "0"], "The number of workers is 0"),
        (["--references", "-2"], "The number of references is -2"),
        (["--references", "list.txt"], "The list 'list.txt' cannot be read"),
        (["--initializers", "list.txt"], "The list 'list.txt' cannot be read"),
        (["--placeholder-token", "dog"], "The placeholder dog is a word of the vocabulary"),
        (["--dino-weights", "none.safetensors"], "There are no DINO weights 'none.safetensors'"),
        (["--set", "stepz=1"], "TextBoost has no setting 'stepz'"),
        (["--steps", "0"], "The value of steps of the protocol is 0: use 1 to 1000"),
        (["--checkpoint", "nothing.safetensors"], "No such file"),
    ],
)
def test_what_is_wrong_gets_one_sentence_before_anything_is_trained(files, tmp_path, monkeypatch, more, sentence):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as ended:
        command.main(["dreambench", *arguments(files, tmp_path / "out", *more)])
    assert ended.value.code.startswith("error: ") and sentence in ended.value.code
    assert "\n" not in ended.value.code and not (tmp_path / "out").exists()


def test_a_subject_without_a_class(tmp_path):
    data = drawn_subjects.write(tmp_path, ["dog"], pictures=1)
    (data / "god").mkdir()
    Image.new("RGB", (32, 32)).save(data / "god" / "0.png")
    with pytest.raises(ValueError, match="The subject 'god' has no class: add its line to prompts_and_classes.txt"):
        dreambench_data.read(data, [])
    (data / dreambench_data.CLASSES).write_text("Classes\n")
    with pytest.raises(ValueError, match="it has no line subject_name,class"):
        dreambench_data.read(data, [])
    (data / dreambench_data.CLASSES).write_text("subject_name,class,kind\ngod,god,alive\ndog_0,dog\n")
    with pytest.raises(ValueError, match="The kind of 'god' is 'alive': use live or object"):
        dreambench_data.read(data, [])
    (found,) = dreambench_data.read(data, ["dog_0"])
    assert (found.kind, found.initializer) == ("live", "")


def test_the_published_data_set(tmp_path):
    """In its layout, with and without its text file: 30 subjects, 9 of them live, as in the paper."""
    known = json.loads(dreambench_data.FILE.read_text())["classes"]
    for name in known:
        (tmp_path / "dataset" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "dataset" / name / "00.jpg")
    subjects = dreambench_data.read(tmp_path, [])
    assert len(subjects) == 30 and sum(each.kind == "live" for each in subjects) == 9
    rows = "".join(f"{name},{word}\n" for name, word in known.items()).replace("can,can", "can,tin")
    text = f"Classes\n\nsubject_name,class\n{rows}\nPrompts\n\nObject Prompts\n\nprompt_list = [\n'a {{0}} {{1}}'\n]\n"
    (tmp_path / "dataset" / dreambench_data.CLASSES).write_text(text)
    again = dreambench_data.read(tmp_path / "dataset", [])
    words = {each.name: each.class_word for each in again}
    assert words == {**known, "can": "tin"} and len(again) == 30


def test_the_lists_of_textboosts_authors(tmp_path):
    """One image and one initializer for each of the 30 subjects; 9 of the images are 00.jpg."""
    known = json.loads(dreambench_data.FILE.read_text())
    assert known["references"].keys() == known["initializers"].keys() == known["classes"].keys()
    assert sorted(known["references"].values()).count("00.jpg") == 9 and known["references"]["dog6"] == "01.jpg"
    assert known["initializers"]["dog"] == "corgi dog" and known["initializers"]["backpack"] == "red backpack"
    assert all(words.endswith(f" {known['classes'][name]}") for name, words in known["initializers"].items())
    for name in ("dog6", "dog", "mine"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i:02d}.jpg")
    lines = "subject_name,class,kind,initializer\ndog6,dog,,\ndog,dog,,red dog\nmine,cup,,\n"
    (tmp_path / dreambench_data.CLASSES).write_text(lines)
    (tmp_path / "list.txt").write_text("dog,01.jpg\n")
    (tmp_path / "words.txt").write_text("mine,blue cup\n")

    def chosen(*flags):
        given = ["--data", str(tmp_path), "--checkpoint", "x", "--out", "x", *flags]
        given = dreambench.parser().parse_args(given)
        subjects = dreambench.with_lists(dreambench_data.read(tmp_path, []), given)
        return dreambench.references_of(given), [(each.reference, each.initializer) for each in subjects]

    assert chosen() == (1, [("00.jpg", "red dog"), ("01.jpg", "corgi dog"), ("", "")])
    assert chosen("--references", "2", "--initializers", "class") == (2, [("", ""), ("", ""), ("", "")])
    files = ("--references", str(tmp_path / "list.txt"), "--initializers", str(tmp_path / "words.txt"))
    assert chosen(*files) == (1, [("01.jpg", "red dog"), ("", ""), ("", "blue cup")])
    assert chosen("--initializer-token", "cat") == (1, [("00.jpg", "red dog"), ("01.jpg", ""), ("", "")])
    assert chosen("--method", "dreambooth-lora") == (0, [("", "red dog"), ("", ""), ("", "")])
    (tmp_path / "list.txt").write_text("dog,7.jpg\n")
    with pytest.raises(ValueError, match="The subject 'dog' has no image '7.jpg': correct its line in list.txt"):
        chosen(*files)


def test_each_subject_may_have_its_own_prompts(files, tmp_path):
    """As in DVAR's code, whose table has other prompts for each concept."""
    (tmp_path / "dog_0.txt").write_text("a {} in a swimming pool\na {} wearing sunglasses\n")
    (tmp_path / "cup_1.txt").write_text("a {} in the Grand Canyon\n")
    given = arguments(files, tmp_path / "out", "--prompts", str(tmp_path))
    bench = dreambench.bench_of(dreambench.parser().parse_args(given))
    cup, dog, fish = dreambench_data.read(files.data, [])
    assert bench.own_prompts(dog).splitlines() == ["a {} in a swimming pool", "a {} wearing sunglasses"]
    bench.check(dog)
    bench.check(cup)
    with pytest.raises(ValueError, match=f"The prompt file 'fish_2.txt' cannot .*: write it into '{tmp_path.name}'"):
        bench.check(fish)
    whole = dreambench.bench_of(dreambench.parser().parse_args(arguments(files, tmp_path)))
    assert whole.own_prompts(dog) == whole.own_prompts(cup) == drawn_subjects.PROMPTS


def test_rows_that_are_not_there_stand_in_the_table():
    done = Row(subject="<a>", class_word="dog", state="done", scores={"CLIP-T": Spread(0.5, 0.1, 4)})
    table = Table([done, Row(subject="b", class_word="cat", state=MISSING, why="not finished")])
    rows = [*csv.DictReader(table.csv().splitlines())]
    assert [row["CLIP-T"] for row in rows] == ["0.5", "", "0.5", "0.0"] and rows[1]["note"] == "not finished"
    assert "b, missing: not finished" in table.text()
    page = table.html("x")
    assert "<a>" not in page and '<a href="&lt;a&gt;/report.html">&lt;a&gt;</a>' in page


# -- VQA


def pictures(texts):
    image = Image.new("RGB", (8, 8))
    return tuple(Scored(prompt=text, text=text, seed=0, image=image, scores={}) for text in texts)


def test_why_there_is_no_vqa(tmp_path, monkeypatch):
    report = Report(label="x", images=pictures(["a dog"]))
    assert vqa.added(report, True, "cpu").missing == {"VQA": "the package t2v_metrics is not installed"}
    (tmp_path / "t2v_metrics.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert "--vqa-download is not given" in vqa.added(report, False, "cpu").missing["VQA"]


def test_vqa_asks_its_package_for_each_image_and_its_text(tmp_path, monkeypatch):
    """A stand-in with the package's interface: `[images, texts]` by files and texts. The model never ran here."""
    lines = [
        "from pathlib import Path",
        "import torch",
        "class VQAScore:",
        "    def __init__(self, model, device):",
        "        assert (model, device) == ('clip-flant5-xxl', 'cpu')",
        "    def __call__(self, images, texts):",
        "        numbers = [float(Path(image).read_bytes()[1:4] == b'PNG') for image in images]",
        "        return torch.tensor([[number * len(text) for text in texts] for number in numbers])",
    ]
    (tmp_path / "t2v_metrics.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "t2v_metrics", raising=False)
    vqa._model.cache_clear()
    report = vqa.added(Report(label="x", images=pictures(["a dog", "a red dog", "a dog"])), True, "cpu")
    assert [each.scores["VQA"] for each in report.images] == [5.0, 9.0, 5.0]
    assert report.metric_models["VQA"] == "clip-flant5-xxl" and report.spread("VQA").n == 3
    sys.modules.pop("t2v_metrics")
    vqa._model.cache_clear()


# -- other processes


def start(files, out, *more):
    """The command as a process; its lines go to OUT.log."""
    line = [sys.executable, "-m", "trainers", "dreambench", *arguments(files, out, *more)]
    environment = drawn_subjects.environment(files.folder)
    root = Path(build.__file__).parents[1]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(line, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)


def until(process, ready):
    """Waits for something that the process does, and kills it then."""

    def alive():
        assert process.poll() is None, "it ended before"

    waiting.until(ready, alive)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def steps(out):
    """Steps of every run's log."""
    return sorted(len(log.read_text().splitlines()) for log in (out / "runs").glob("*/steps.jsonl"))


@pytest.mark.slow
def test_a_killed_call_goes_on_where_it_was(files, whole, tmp_path):
    """Killed within the second subject: the first is not repeated, the second goes on from its checkpoint."""
    out = tmp_path / "out"
    until(start(files, out), lambda: len(steps(out)) == 2 and steps(out)[0] > 5)
    assert [file.parent.name for file in out.glob("*/report.json")] == ["cup_1"]
    written = (out / "cup_1" / "report.json").stat().st_mtime_ns
    assert start(files, out).wait() == 0
    assert (out / "cup_1" / "report.json").stat().st_mtime_ns == written
    lines = out.with_suffix(".log").read_text().splitlines()
    (going_on,) = (line for line in lines if line.startswith("dog_0: going on after step "))
    assert int(going_on.split()[-1]) >= 4
    assert sum(line.startswith("dog_0: textboost: step 1 ") for line in lines) == 1 and steps(out) == [12, 12, 12]
    assert "cup_1: complete with these settings, not repeated" in lines
    assert scores(out) == scores(whole)


@pytest.mark.slow
def test_two_workers_give_what_one_gives(files, whole, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    two = ["cup_1", "fish_2"]
    ended = start(files, out, "--workers", "2", "--subjects", ",".join(two)).wait()
    assert ended == 0, out.with_suffix(".log").read_text()[-3000:]
    assert scores(out, two) == scores(whole, two)
    same = ["subject", "class", "state", *SCORES, "note"]
    alone, shared = (
        [{name: row[name] for name in same} for row in rows_of(folder / "dreambench.csv") if row["subject"] in two]
        for folder in (whole, out)
    )
    assert len(alone) == 2 and shared == alone
    lines = out.with_suffix(".log").read_text()
    assert "pid=" not in lines
