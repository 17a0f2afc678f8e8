"""Evaluate, Score Images and Report on the real host: the pictures are KSampler's, the scores the metric models' own,
and bad input gets one sentence before anything is drawn.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.tests.support import evaluating, world_clip
from personalize.trainers.data.concept import Concept
from personalize.trainers.evaluation.report import COLUMNS
from personalize.trainers.images import to_pil
from personalize.trainers.metrics import metrics

pytestmark = pytest.mark.comfy
WORD = "<dog>"
OWN = {"prompt_set": "own", "prompts": "a photo of {}\n{} in the snow", "token_format": "V C"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A random SD 1.x whose CLIP knows the word."""
    from personalize.tests.support import random_sd

    model, clip, vae = random_sd.graph(tmp_path_factory.mktemp("sd"))
    return model, evaluating.teach(clip, WORD), vae, clip


@pytest.fixture
def folders(tmp_path, monkeypatch, model_folders):
    """ComfyUI's folders: metric models below models/clip_vision, nothing in the hub's cache."""
    import folder_paths

    from personalize.nodes.host import session

    place = tmp_path / "models" / "clip_vision"
    place.mkdir(parents=True)
    evaluating.write(place)
    known = folder_paths.folder_names_and_paths["clip_vision"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_vision", ([str(place)], known))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    session.extractors.clear()
    return tmp_path


@pytest.fixture(scope="module")
def concept():
    seen = world_clip.tensors(world_clip.pictures(count=2))
    masks = tuple((torch.arange(image.shape[-1]) < 64).float().expand(1, *image.shape[-2:]) for image in seen)
    return Concept(images=seen, masks=masks, placeholder_token=WORD, class_word="dog", resolution=64)


@pytest.fixture
def evaluate(graph, concept, folders):
    """`evaluate(**inputs)`: what the node gives of two prompts, two seeds and four steps."""
    from personalize.nodes.evaluation.evaluate import Evaluate

    shown = {i.id: i.default for i in Evaluate.define_schema().inputs if getattr(i, "default", None) is not None}
    shown |= (
        {"compare_with": "class word", "seeds": 2, "steps": 4, "diversity": "DINO encoder"} | OWN | evaluating.WORLD
    )
    model, clip, vae, _ = graph

    def go(**inputs):
        with torch.inference_mode():
            given = shown | {"model": model, "clip": clip, "vae": vae, "concept": concept} | inputs
            return Evaluate.execute(**evaluating.connected(given)).result

    return go


def test_images_are_those_of_a_ksampler_with_that_seed(evaluate, graph):
    import nodes

    model, clip, vae, _ = graph
    report, *_, pictures = evaluate()
    assert [(each.prompt, each.seed) for each in report.images] == [
        (prompt, seed) for prompt in (f"a photo of {WORD} dog", f"{WORD} dog in the snow") for seed in (0, 1)
    ]
    with torch.inference_mode():
        for each, picture in zip(report.images, pictures, strict=True):
            positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (each.prompt, ""))
            latent = {"samples": torch.zeros(1, 4, 8, 8)}
            settings = each.seed, 4, 7.5, "dpmpp_2m", "karras"
            (drawn,) = nodes.KSampler().sample(model, *settings, positive, negative, latent)
            expected = vae.decode(drawn["samples"])[0]
            assert (picture - expected).abs().max() < 1e-3
    assert (pictures[0] - pictures[2]).abs().max() > 0.02 and (pictures[0] - pictures[1]).abs().max() > 0.02


def test_all_prompts_of_a_seed_start_alike_whatever_their_neighbours(graph):
    from personalize.nodes.host.sampler import Sampling, start_latents

    sampling = Sampling(
        seeds=(3, 9),
        steps=1,
        cfg=1,
        sampler="euler",
        scheduler="normal",
        negative="",
        width=64,
        height=96,
        batch_size=2,
    )
    both = start_latents(graph[0], (3, 9), sampling)
    assert both.shape == (2, 4, 12, 8)
    for seed, latents in zip((3, 9), both):
        assert torch.equal(latents, torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(seed))[0])


def test_the_report_says_how_references_were_compared(evaluate, concept, folders):
    best, plain = (evaluate(reference_scores=name)[0] for name in ("TextBoost 2026", "floored mean"))
    model = plain.metric_models["DINO seen"]
    assert best.metric_models["DINO seen"] == f"{model}, compared as TextBoost 2026" and len(concept.images) > 1
    assert best.metric_models["CLIP-I seen"].endswith("compared as TextBoost 2026")
    assert best.metric_models["CLIP-T"] == plain.metric_models["CLIP-T"]
    pairs = zip(best.images, plain.images, strict=True)
    assert all(one.scores["DINO seen"] > other.scores["DINO seen"] for one, other in pairs)


def test_scores_are_the_metric_models_own(evaluate, concept, folders):
    unseen = torch.stack([image.movedim(0, -1) for image in world_clip.tensors(world_clip.pictures(count=4)[2:])])
    report, grid, table, summary, pictures = evaluate(held_out=unseen)
    shelf = evaluating.write(folders)
    from personalize.trainers.evaluation.scorer import ScorerConfig

    metric_models = ScorerConfig(**evaluating.WORLD)
    clip, dino = shelf.load(metric_models.clip), shelf.load(metric_models.dino)
    images = [to_pil(picture.movedim(-1, 0)) for picture in pictures]
    texts = ["a photo of dog"] * 2 + ["dog in the snow"] * 2
    seen, others = [to_pil(image) for image in concept.images], world_clip.pictures(count=4)[2:]
    expected = {
        "CLIP-T": metrics.clip_text(clip, images, texts),
        "CLIP-I seen": metrics.clip_image(clip, images, seen),
        "CLIP-I unseen": metrics.clip_image(clip, images, others),
        "DINO seen": metrics.dino(dino, images, seen),
        "DINO unseen": metrics.dino(dino, images, others),
    }
    assert [each.text for each in report.images] == texts
    for column, values in expected.items():
        assert [each.scores[column] for each in report.images] == pytest.approx(values.tolist(), abs=1e-5), column
    one, other = (metrics.unit_features(dino.image_features, images[i : i + 1]) for i in (0, 1))
    assert report.diversity[report.images[0].prompt] == pytest.approx(1 - float(one[0] @ other[0]), abs=1e-5)
    assert (
        report.metric_models["diversity"]
        == f"1 - cosine of DINO {evaluating.WORLD['dino_model']} from {evaluating.ENCODER}"
    )
    assert grid.shape[0] == table.shape[0] == 1 and grid.min() >= 0 and grid.max() <= 1
    assert re.search(r"per image: \d+\.\d+ s to generate, \d+\.\d+ s to score", summary)
    assert str(folders) not in summary + repr(report)


def test_without_lpips_its_column_reads_not_measured(evaluate):
    report, *_, summary, _ = evaluate(diversity="LPIPS", lpips_weights="none.safetensors")
    assert report.cell("diversity") == "not measured" and not report.diversity
    assert report.cell("DINO unseen") == "not measured" and "no unseen references" in summary
    assert re.search("diversity: not measured (.*(lpips is not installed|no LPIPS weights))", summary)


def test_masked_references_hide_the_rest(evaluate, concept):
    report, masked = evaluate()[0], evaluate(mask_references=True)[0]
    assert masked.images[0].scores["CLIP-T"] == pytest.approx(report.images[0].scores["CLIP-T"], abs=1e-6)
    assert abs(masked.images[0].scores["DINO seen"] - report.images[0].scores["DINO seen"]) > 1e-4
    reference = np.asarray(masked.references["seen"][0])
    assert (reference[:, -8:] == 128).all() and not (reference[:, :8] == 128).all()


def test_the_untrained_model_reads_the_class_word(evaluate, graph):
    report = evaluate(clip=graph[3], token_format="C", label="base")[0]
    assert report.label == "base" and report.images[0].prompt == "a photo of dog" == report.images[0].text
    removed = evaluate(token_format="sks C", compare_with="removed", seeds=1)[0]
    assert [(each.prompt, each.text) for each in removed.images] == [
        ("a photo of sks dog", "a photo of"),
        ("sks dog in the snow", "in the snow"),
    ]
    assert removed.missing["diversity"] == "no prompt has two images"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_format": " "}, "The token format is empty"),
        ({"prompts": "\n"}, "There is no prompt"),
        ({"prompt_file": "none.txt"}, "The prompts file 'none.txt' cannot be read"),
        ({"clip_weights": "none.safetensors"}, "There are no CLIP weights"),
        ({"clip_weights": "", "clip_model": "ViT-B-32"}, "are not on this computer, and clip_download is off"),
        ({"dino_weights": "none.safetensors"}, "There are no DINO weights"),
        ({"dino_weights": "", "dino_model": "vit_small_patch16_224.dino"}, "and dino_download is off"),
        ({"dino_model": "vit_small_patch16_224"}, "are not those of 'vit_small_patch16_224'"),
        ({"width": 8}, "The image size 8 is not possible"),
        ({"seeds": 256, "width": 4096, "height": 4096}, "The 512 images to generate have 8589 million pixels together"),
        ({"cfg": float("nan")}, "The value of cfg is nan"),
        ({"scheduler": "best"}, "The value of scheduler is 'best'"),
    ],
)
def test_what_cannot_be_gets_one_sentence_before_anything_is_drawn(evaluate, monkeypatch, changes, words):
    from personalize.nodes.host import sampler, session

    monkeypatch.setattr(sampler, "generate", lambda *given: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=words) as caught:
        evaluate(**changes)
    assert "\n" not in str(caught.value) and not session.extractors.loaded


def test_a_word_that_the_clip_never_learned_is_refused(evaluate, graph, concept):
    with pytest.raises(ValueError, match="This CLIP has not learned <dog>"):
        evaluate(clip=graph[3])
    with pytest.raises(ValueError, match="The reference images have no masks"):
        evaluate(concept=replace(concept, masks=None), mask_references=True)


def test_what_is_wrong_is_known_before_the_graph_runs(folders):
    from personalize.nodes.evaluation.evaluate import Evaluate
    from personalize.nodes.evaluation.score_images import ScoreImages

    good = {"prompt_set": "own", "prompts": "a {}", "prompt_file": "", "token_format": "V"}
    linked = {"metric_models": None}
    assert Evaluate.validate_inputs(**good | linked) is True and Evaluate.validate_inputs(**linked) is True
    assert "clip_download is off" in Evaluate.validate_inputs(**good)  # without a link they are the published ones
    assert "clip_download is off" in ScoreImages.validate_inputs() and ScoreImages.validate_inputs(metric_models=[None])
    good |= linked
    for name, value in (("prompts", ""), ("prompt_file", "../x"), ("token_format", ""), ("prompt_set", "none")):
        assert isinstance(Evaluate.validate_inputs(**good | {name: value}), str), name
    assert Evaluate.validate_inputs(**good | {"prompt_set": "Textual Inversion", "prompts": ""}) is True
    (folders / "input" / "more.txt").write_text("{} on grass")
    seen = Evaluate.fingerprint_inputs(prompt_file="more.txt")
    (folders / "input" / "more.txt").write_text("{} on sand")
    assert Evaluate.fingerprint_inputs(prompt_file="more.txt") != seen


@pytest.mark.parametrize("when", [1, 9, 17])
def test_it_can_be_interrupted_and_leaves_nothing(evaluate, monkeypatch, when):
    """In the first prompt's steps, in the last one's, while metric models look."""
    import comfy.model_management as mm

    from personalize.nodes.host import session

    asked = []
    original = session.check_interrupted

    def check():
        asked.append(1)
        if len(asked) == when + 3:  # three texts are encoded first
            mm.interrupt_current_processing()
        original()

    monkeypatch.setattr(session, "check_interrupted", check)
    with pytest.raises(mm.InterruptProcessingException):
        evaluate(batch_size=1 if when < 17 else 2)
    assert not session.extractors.loaded


@pytest.fixture
def score(concept, folders):
    from personalize.nodes.evaluation.score_images import ScoreImages

    shown = {i.id: i.default for i in ScoreImages.define_schema().inputs if getattr(i, "default", None) is not None}
    shown |= {"compare_with": "class word", "diversity": "DINO encoder"} | evaluating.WORLD

    def go(images, **inputs):
        given = evaluating.connected(shown | {"concept": concept} | inputs)
        values = {name: [value] for name, value in given.items()}
        for name in ("prompts", "mask", "held_out"):
            if isinstance(inputs.get(name), list):
                values[name] = inputs[name]
        with torch.inference_mode():
            return ScoreImages.execute(images=images, **values).result

    return go


def test_images_are_scored_as_evaluate_scores_them(evaluate, score):
    report, *_, pictures = evaluate()
    again = score([pictures[:2], pictures[2:]], prompts=[f"a photo of {WORD} dog", f"{WORD} dog in the snow"])[0]
    for one, other in zip(report.images, again.images, strict=True):
        assert (one.prompt, one.text, one.seed) == (other.prompt, other.text, other.seed)
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert report.diversity == pytest.approx(again.diversity, abs=1e-5)


def test_prompts_belong_to_images_batches_or_all(score):
    from personalize.nodes.evaluation.score_images import prompts_for

    assert prompts_for(["a\nb\n", "c"], [2, 1]) == ["a", "b", "c"]
    assert prompts_for(["a", "b"], [2, 1]) == ["a", "a", "b"]
    assert prompts_for(["a"], [2, 1]) == ["a"] * 3
    with pytest.raises(ValueError, match="3 images in 2 batches but 0 prompts"):
        prompts_for([""], [2, 1])
    pictures = torch.rand(2, 32, 32, 3)
    with pytest.raises(ValueError, match="2 images but 1 masks"):
        score([pictures], prompts="a", mask=[torch.ones(1, 32, 32)])


def test_a_mask_hides_the_rest_of_an_image_from_identity_only(score):
    pictures = torch.stack([image.movedim(0, -1) for image in world_clip.tensors(world_clip.pictures())])
    half = torch.zeros(2, 128, 128)
    half[:, :, :64] = 1
    plain = score([pictures], prompts="a dog", held_out=[pictures])[0]
    masked = score([pictures], prompts="a dog", held_out=[pictures], mask=[half])[0]
    assert plain.images[0].scores["CLIP-T"] == pytest.approx(masked.images[0].scores["CLIP-T"], abs=1e-6)
    assert plain.images[0].scores["DINO unseen"] > masked.images[0].scores["DINO unseen"] + 0.01


def written(report, folders, **inputs):
    from personalize.nodes.evaluation.report import WriteReport

    values = {"prefix": "personalize/reports", "reports": {"report0": report}} | inputs
    result = WriteReport.execute(**values).result
    return result, (folders / "output" / result[2]).parent


def test_two_reports_beside_each_other(evaluate, graph, folders):
    import csv

    base = evaluate(clip=graph[3], token_format="C", label="base <&>")[0]
    trained = evaluate(label="trained")[0]
    (table, grid, page, path, summary, scatter), folder = written(
        None, folders, reports={"report0": base, "report1": trained}
    )
    assert sorted(each.name for each in folder.iterdir()) == [
        "grid.png", "report.csv", "report.html", "report.json", "scatter.png", "table.png",
    ]  # fmt: skip
    assert page.startswith("personalize/reports/base_trained_") and path.endswith("/report.csv")
    assert summary == f"{base.summary()}\n\n{trained.summary()}"
    rows = [*csv.DictReader((folder / "report.csv").read_text(encoding="utf-8").splitlines())]
    kinds = [row["of"] for row in rows if row["report"] == "trained"]
    assert kinds == ["image"] * 4 + ["prompt"] * 2 + ["seed"] * 2 + ["mean", "standard deviation"]
    values = [float(row["CLIP-T"]) for row in rows if row["report"] == "trained" and row["of"] == "image"]
    assert float(next(r for r in rows if r["report"] == "trained" and r["of"] == "mean")["CLIP-T"]) == pytest.approx(
        sum(values) / 4
    )
    assert {row["DINO unseen"] for row in rows} == {"not measured"}
    told = json.loads((folder / "report.json").read_text(encoding="utf-8"))["reports"]
    assert [each["label"] for each in told] == ["base <&>", "trained"]
    assert (
        told[1]["scores"]["CLIP-T"]["mean"] == pytest.approx(sum(values) / 4)
        and told[1]["scores"]["DINO unseen"] is None
    )
    assert told[1]["settings"]["sampler"] == "dpmpp_2m, karras"
    again = written(None, folders, reports={"report0": base, "report1": trained})[1]
    assert again == folder  # the same reports, the same folder


def test_floor_first_ceiling_last(evaluate, graph, folders):
    """Among what is compared they have no best; a saved graph without them gives what it always gave."""
    import csv

    from personalize.trainers.reports import grid as report_grid

    base, one = evaluate(clip=graph[3], token_format="C", label="base")[0], evaluate(label="one")[0]
    links = {"reports": {"report0": one}, "floor": base, "ceiling": replace(base, label="real")}
    (table, grid, page, *_, scatter), folder = written(None, folders, grid_rows="reports", **links)
    assert page.startswith("personalize/reports/base_one_real_")
    told = json.loads((folder / "report.json").read_text(encoding="utf-8"))["reports"]
    assert [(each["label"], each.get("role")) for each in told] == [
        ("base", "floor"),
        ("one", None),
        ("real", "ceiling"),
    ]
    rows = csv.DictReader((folder / "report.csv").read_text(encoding="utf-8").splitlines())
    assert [*dict.fromkeys(row["report"] for row in rows)] == ["base (floor)", "one", "real (ceiling)"]
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.index("base (floor)") < html.index("real (ceiling)") and "class=best" not in html
    assert html.count('class="card plot"') == 1 and base.role == ""
    for name, picture in (("table", table), ("grid", grid), ("scatter", scatter)):
        with Image.open(folder / f"{name}.png") as image:
            assert image.size == (picture.shape[2], picture.shape[1])
    plain, elsewhere = written(None, folders, reports={"report0": base, "report1": one})
    assert torch.equal(plain[1][0], report_grid.by_prompt([base, one])) and "role" not in (
        elsewhere / "report.json"
    ).read_text(encoding="utf-8")
    alone = written(one, folders)[1]
    assert (
        'class="card plot"' not in (alone / "report.html").read_text(encoding="utf-8")
        and (alone / "scatter.png").exists()
    )


def test_the_page_needs_nothing_else_and_runs_nothing(evaluate, graph, folders):
    from html.parser import HTMLParser

    label = '"><script>alert(1)</script>'
    page = (written(evaluate(label=label)[0], folders)[1] / "report.html").read_text(encoding="utf-8")
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Reader().feed(page)
    assert not {tag for tag, _ in found} & {"script", "link", "iframe", "object", "base", "form"}
    assert all(a["src"].startswith("data:image/") for tag, a in found if tag == "img")
    assert sum(tag == "img" for tag, _ in found) == 4 + 2  # images and references
    assert not [name for _, a in found for name in a if name.startswith("on") or name == "href"]
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page
    assert all(column in page for column in COLUMNS) and "not measured" in page


@pytest.mark.parametrize("prefix", ["../away", "/etc", "a//b", ""])
def test_nothing_is_written_outside_the_output_folder(evaluate, folders, prefix):
    from personalize.nodes.evaluation.report import WriteReport

    with pytest.raises(ValueError, match="cannot be a folder of the output folder"):
        written(evaluate(seeds=1, first=1)[0], folders, prefix=prefix)
    assert isinstance(WriteReport.validate_inputs(prefix=prefix), str)


@pytest.mark.parametrize("reports", [None, {}, {"report0": None}, {"report0": "none"}])
def test_a_report_without_reports_says_so(folders, reports):
    from personalize.nodes.evaluation.report import WriteReport

    with pytest.raises(ValueError, match="There is no report to write|received no PERSONALIZE_REPORT"):
        WriteReport.execute(prefix="personalize/reports", reports=reports)
