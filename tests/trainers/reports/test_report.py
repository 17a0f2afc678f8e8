"""Prompt sets, and reports: are they the published prompts, and their means the means?"""

import csv
import io
import json
import statistics
from dataclasses import replace

import pytest
import torch
from PIL import Image

from personalize.trainers.data.concept import Concept
from personalize.trainers.evaluation import prompt_sets, scorer
from personalize.trainers.evaluation.report import Report, Scored, Spread
from personalize.trainers.metrics.feature_extractors import FeatureExtractor
from personalize.trainers.reports import csv_json, html
from personalize.trainers.reports import grid as report_grid

CONCEPT = Concept(images=(torch.rand(3, 32, 32),), placeholder_token="<dog>", class_word="dog")


def test_the_published_sets():
    """Facts of the papers: numbers of prompts, the first and the last, what both lists of DreamBooth share."""
    sets = prompt_sets.published()
    objects, live = sets["DreamBooth objects"], sets["DreamBooth live subjects"]
    assert len(objects) == len({*objects}) == len(live) == len({*live}) == 25
    assert objects[:10] == live[:10] and objects[20:] == live[20:] and not {*objects[10:20]} & {*live}
    assert (objects[0], objects[19], live[13]) == (
        "a {} in the jungle",
        "a {} on top of a white rug",
        "a {} wearing a black top hat and a monocle",
    )
    assert objects[20:] == [f"a {word} {{}}" for word in ("red", "purple", "shiny", "wet", "cube shaped")]
    assert sets["Textual Inversion"] == [
        "a photo of {}",
        "a photo of {} on the moon",
        "an oil painting of {}",
        "Elmo holding a {}",
    ]
    assert all(line.count("{}") == 1 for lines in sets.values() for line in lines)
    told = json.loads(prompt_sets.FILE.read_text(encoding="utf-8"))
    assert all("arXiv" in entry["source"] for entry in told.values())


@pytest.mark.parametrize(
    ("written", "subject"),
    [("V", "<dog>"), ("V C", "<dog> dog"), ("sks C", "sks dog"), ("C", "dog"), (" cute {} ", "cute <dog>"),
     ("{} {}", "<dog> <dog>"), ("VC", "VC"), ("corgi", "corgi"), ("(V:1.2) C", "(<dog>:1.2) dog")],
)  # fmt: skip
def test_the_token_format(written, subject):
    assert prompt_sets.subject_of(written, "<dog>", "dog") == subject


def test_prompts_as_drawn_and_as_compared():
    lines = prompt_sets.templates("own", "a {} on {}\n\nno subject", 0)
    (first, second) = prompt_sets.prompts(lines, CONCEPT, "V C", "class word")
    assert (first.prompt, first.text) == ("a <dog> dog on <dog> dog", "a dog on dog")
    assert (second.prompt, second.text) == ("no subject", "no subject")
    removed = prompt_sets.prompts(["a photo of {} on the moon"], CONCEPT, "V", "removed")
    assert removed[0].text == "a photo of on the moon"
    assert prompt_sets.templates("Textual Inversion", "ignored", 2) == ["a photo of {}", "a photo of {} on the moon"]
    for given in (("own", "\n"), ("none", "a")):
        with pytest.raises(ValueError, match="There is no prompt"):
            prompt_sets.templates(*given)


def scored(prompt, seed, **scores):
    image = Image.new("RGB", (40, 24), (seed * 40, 90, 200))
    return Scored(
        prompt=prompt, text=prompt, seed=seed, image=image, scores={k.replace("_", " "): v for k, v in scores.items()}
    )


@pytest.fixture
def report():
    values = {("a", 0): 0.1, ("a", 1): 0.4, ("b", 0): 0.2, ("b", 1): 0.9}
    pictures = tuple(scored(*key, DINO_seen=value) for key, value in values.items())
    return Report(label="one", images=pictures, diversity={"a": 0.3, "b": 0.5}, missing={"CLIP-T": "because"})


def test_means_and_deviations(report):
    assert report.spread("DINO seen") == Spread(
        pytest.approx(0.4), pytest.approx(statistics.stdev([0.1, 0.4, 0.2, 0.9])), 4
    )
    assert report.spread("DINO seen", prompt="b") == Spread(pytest.approx(0.55), pytest.approx(0.7 / 2**0.5), 2)
    assert report.spread("DINO seen", seed=0).mean == pytest.approx(0.15)
    assert report.spread("diversity") == Spread(pytest.approx(0.4), pytest.approx(0.02**0.5), 2)
    assert report.spread("diversity", seed=0) is None and report.spread("diversity", prompt="a").std == 0
    assert report.spread("CLIP-T") is None and report.cell("CLIP-T") == "not measured"
    assert report.cell("DINO seen") == "0.400 ± 0.356" and "CLIP-T: not measured (because)" in report.summary()


def test_the_highest_is_the_best_but_not_of_diversity(report):
    other = Report(label="two", images=(scored("a", 0, DINO_seen=0.5),), diversity={"a": 0.9})
    assert report_grid.best_of([report, other]) == {"DINO seen": 1} and report_grid.best_of([report]) == {}
    page = html.page([report, other])
    assert page.count("class=best") == 1 and page.count("<img") == 5


def test_the_grid_has_each_image_at_its_place(report):
    other = Report(label="two", images=(scored("c", 5, DINO_seen=0.5),))
    grid = report_grid.grid([report, other])
    width, height = report_grid._tile([report, other])
    assert (width, height) == (128, 77)
    top = 34 + 24
    for row in range(2):
        for column in range(2):
            y, x = top + row * (height + 6 + 26) + height // 2, 6 + column * (width + 6) + width // 2
            assert grid[y, x].tolist() == pytest.approx([column * 40 / 255, 90 / 255, 200 / 255], abs=0.01)
    assert report_grid.paired_prompts([report, other]) == [("a", "c"), ("b", "")]
    assert report_grid.table([report, other]).shape[2] == 3


def test_a_row_per_report_has_each_image_at_its_place(report):
    """A column per prompt, seeds side by side in it; images that are not there leave white."""
    colours = {("x", 7): (10, 20, 30), ("x", 8): (40, 50, 60), ("y", 7): (70, 80, 90)}
    pictures = tuple(
        Scored(prompt=f"{prompt} <v>", text=prompt, seed=seed, image=Image.new("RGB", (40, 24), colour), scores={})
        for (prompt, seed), colour in colours.items()
    )
    other = Report(label="another label that is longer", images=pictures, role="ceiling")
    grid = report_grid.grid([report, other], report_grid.REPORTS)
    names = report_grid._width(report_grid._short(other.title), 18) + 2 * 18
    width, height, head, own = 128, 77, 34, 22
    block = 2 * (width + 6) + 6
    assert grid.shape == (head + 2 * (own + height + 6), names + 2 * block, 3)

    def middle(row, column, seed):
        y = head + row * (own + height + 6) + own + height // 2
        return (grid[y, names + column * block + seed * (width + 6) + width // 2] * 255).round().int().tolist()

    assert [middle(0, column, seed) for column in (0, 1) for seed in (0, 1)] == [[0, 90, 200], [40, 90, 200]] * 2
    assert [middle(1, column, seed) for column in (0, 1) for seed in (0, 1)] == [
        *map(list, colours.values()),
        [255] * 3,
    ]


def test_prompts_stand_above_the_columns_once_where_all_were_asked_the_same(report):
    """Each report draws its own words; what they were compared with is the same."""
    drawn = tuple(replace(each, prompt=f"<v> {each.prompt}") for each in report.images)
    same = report_grid.by_report([report, replace(report, images=drawn)])
    told = tuple(replace(each, text=f"<v> {each.text}") for each in report.images)
    different = report_grid.by_report([report, replace(report, images=told)])
    assert different.shape[0] - same.shape[0] == 2 * 22


def test_floor_and_ceiling_are_never_the_best(report):
    high = Report(label="high", images=(scored("a", 0, DINO_seen=0.9),))
    low = Report(label="low", images=(scored("a", 0, DINO_seen=0.1),))
    ceiling = replace(high, role="ceiling")
    assert report_grid.best_of([low, report, high]) == {"DINO seen": 2}
    assert report_grid.best_of([low, report, ceiling]) == {"DINO seen": 1}
    assert report_grid.best_of([report, ceiling]) == {}
    assert ceiling.summary().startswith("high (ceiling): 1 images")


def test_a_image_is_encoded_once():
    seen = []

    def encode(images):
        seen.extend(images)
        return torch.stack([torch.tensor([float(image.getpixel((0, 0))[0]), 1.0]) for image in images])

    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    looked, known = [], {}
    extractor = scorer.remembering(FeatureExtractor(name="made up", image_features=encode), known, looked.append)
    assert extractor.image_features([*pictures, pictures[0]])[:, 0].tolist() == [0, 1, 2, 0]
    assert extractor.image_features([pictures[2], pictures[1].copy()])[:, 0].tolist() == [2, 1]
    assert len(seen) == 4 and sum(looked) == 4


def test_texts_of_a_table_stay_texts():
    """In a spreadsheet they would be formulas, and a lone carriage return would begin another row."""
    texts = ["=1+1", "+1", "-1", "@x", " =1", "a\rb", "a\r\nb", "a=b", ""]
    table = csv_json.table(["text", "number"], [{"text": text, "number": -0.5} for text in texts])
    cells = [row["text"] for row in csv.DictReader(io.StringIO(table, newline=""))]
    assert cells == ["'=1+1", "'+1", "'-1", "'@x", "' =1", "a\nb", "a\nb", "a=b", ""]
    assert "\r" not in table and table.count(",-0.5\n") == len(texts)
