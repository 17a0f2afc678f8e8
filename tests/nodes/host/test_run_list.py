"""The list of runs in the editor: what it shows, and that it names, renames and deletes nothing but the pack's runs."""

import asyncio
import json

import pytest
from PIL import Image

from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.info import RunInfo

pytestmark = pytest.mark.comfy
ONE, TWO = "0" * 15 + "1", "0" * 15 + "2"


@pytest.fixture
def personalize(tmp_path, monkeypatch):
    """output/personalize with two runs, a cache, and a folder that is no run."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    root = tmp_path / "personalize"
    for digest, more in ((ONE, {"complete": True, "steps": 7, "checkpoint": "sd.safetensors"}), (TWO, {})):
        folder = root / "runs" / digest
        (folder / "images").mkdir(parents=True)
        (folder / "previews").mkdir()
        words = {"placeholder_token": "<dog>", "class_word": "dog"}
        RunInfo(settings={"method": "TextBoost", "concept": words}, dataset="", **more).write(folder)
        Image.new("RGB", (8, 8)).save(folder / "images" / "00.png")
    Image.new("RGB", (8, 8)).save(root / "runs" / ONE / "previews" / "step_0007.png")
    (root / "runs" / "mine").mkdir()
    (root / "runs" / "mine" / "run.json").write_text("{}")
    (root / "cache" / "a").mkdir(parents=True)
    (root / "cache" / "a" / "0000.png").write_bytes(b"x" * 1000)
    return root


class Request:
    """A POST as the host's server hands it over, as far as a route reads it."""

    def __init__(self, body, content_type="application/json"):
        self.body, self.content_type = body, content_type

    async def read(self):
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def post(route, body, **more):
    from personalize.nodes.host import routes

    answer = asyncio.run(getattr(routes, route)(Request(body, **more)))
    return answer.status, json.loads(answer.body)


def test_a_card_says_what_a_run_is(personalize):
    from personalize.nodes.host import run_list

    one, two = sorted(run_list.cards(), key=lambda card: card["run"])
    shown = {"placeholder_token": "<dog>", "class_word": "dog", "method": "TextBoost", "name": ""}
    assert {**one, **shown} == one and {**two, **shown} == two
    assert (one["state"], one["steps"], one["checkpoint"], one["image"]) == (
        "complete", 7, "sd.safetensors", "previews/step_0007.png",
    )  # fmt: skip
    assert (two["state"], two["image"]) == ("not finished", "images/00.png")
    assert one["size"] == sum(file.stat().st_size for file in (personalize / "runs" / ONE).rglob("*.*"))
    assert run_list.cache_size() == 1000


def test_a_run_is_renamed_and_keeps_its_place(personalize):
    from personalize.nodes.host import run_list

    before = run_list.labels()
    status, answer = post("post_rename", {"run": ONE, "name": " Rex, the dog "})
    assert status == 200 and {card["run"]: card.get("name") for card in answer["runs"]} == {
        ONE: "Rex, the dog",
        TWO: "",
    }
    label = f"Rex, the dog: <dog> TextBoost, 7 steps {ONE}"
    assert run_list.labels() == [label if ONE in line else line for line in before]
    assert run_list.find(label).path.name == ONE
    assert post("post_rename", {"run": ONE, "name": ""})[0] == 200 and run_list.labels() == before


def test_a_run_that_its_user_ended_is_opened_again_for_one_node(personalize):
    from personalize.nodes.host import live

    folder = RunFolder(personalize / "runs" / ONE)
    (folder.path / "last.safetensors").write_bytes(b"")
    before = live.REOPENED["12:3"]
    status, answer = post("post_reopen", {"run": ONE, "node": "12:3"})
    assert status == 409 and "cannot train on: only one that Finish now ended can" in answer["error"]
    folder.note(stops=[{"monitor": "you", "step": 7}])
    assert live.history(ONE)["can_go_on"] and not live.history(TWO)["can_go_on"]
    assert post("post_reopen", {"run": ONE, "node": "12:3"})[0] == 200
    assert live.REOPENED["12:3"] == before + 1 and not folder.info().complete and not live.history(ONE)["can_go_on"]


def test_a_run_and_the_cache_are_deleted(personalize):
    status, answer = post("post_delete", {"run": ONE})
    assert status == 200 and [card["run"] for card in answer["runs"]] == [TWO] and answer["cache"] == 1000
    assert not (personalize / "runs" / ONE).exists() and (personalize / "runs" / TWO / "run.json").exists()
    status, answer = post("post_delete_cache", {})
    assert status == 200 and answer["cache"] == 0 and not (personalize / "cache").exists()
    assert (personalize / "runs" / TWO / "run.json").exists()
    assert post("post_delete_cache", {})[0] == 200  # there is none


@pytest.mark.parametrize(
    ("route", "body", "status", "sentence"),
    [
        ("post_delete", {"run": "mine"}, 400, "The request is not valid"),
        ("post_delete", {"run": "../runs/" + ONE}, 400, "The request is not valid"),
        ("post_delete", {"run": 7}, 400, "The request is not valid"),
        ("post_delete", {}, 400, "The request is not valid"),
        ("post_delete", [ONE], 400, "The request is not valid"),
        ("post_delete", b"{", 400, "The request is not valid"),
        ("post_delete", b"[" * 100_000, 400, "The request is not valid"),
        ("post_delete", {"run": "f" * 16}, 409, "There is no run"),
        ("post_rename", {"run": ONE}, 400, "The request is not valid"),
        ("post_rename", {"run": ONE, "name": "x" * 61}, 409, "cannot name a run: write one line of at most 60"),
        ("post_rename", {"run": ONE, "name": "a\nb"}, 409, "cannot name a run"),
        ("post_rename", {"run": ONE, "name": "\ud83d"}, 409, "cannot name a run"),
        ("post_delete_cache", {"run": ONE}, 400, "The request is not valid"),
    ],
)
def test_what_is_no_run_is_left_alone(personalize, route, body, status, sentence):
    before = sorted(personalize.rglob("*"))
    answer = post(route, body)
    assert answer[0] == status and sentence in answer[1]["error"]
    assert sorted(personalize.rglob("*")) == before


@pytest.mark.parametrize("route", ["post_delete", "post_delete_cache"])
def test_a_form_of_another_page_changes_nothing(personalize, route):
    status, _ = post(route, {"run": ONE} if route == "post_delete" else {}, content_type="text/plain")
    assert status == 400 and (personalize / "runs" / ONE).exists() and (personalize / "cache").exists()


def test_links_are_never_followed(personalize, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "photo.png").write_bytes(b"x")
    (personalize / "runs" / ONE / "previews" / "led").symlink_to(outside, target_is_directory=True)
    (personalize / "cache" / "led").symlink_to(outside, target_is_directory=True)
    for route, body in (
        ("post_delete", {"run": ONE}),
        ("post_rename", {"run": ONE, "name": "x"}),
        ("post_delete_cache", {}),
    ):
        status, answer = post(route, body)
        assert status == 409 and "The link" in answer["error"]
    assert (outside / "photo.png").exists() and (personalize / "cache" / "a" / "0000.png").exists()


def test_while_it_trains_a_run_and_the_cache_stay(personalize, monkeypatch):
    from personalize.nodes.host import live

    monkeypatch.setitem(live.RUNNING, ONE, None)
    with RunFolder(personalize / "runs" / ONE).lock():
        assert post("post_delete", {"run": ONE})[0] == 409 and post("post_rename", {"run": ONE, "name": "x"})[0] == 409
        status, answer = post("post_delete_cache", {})
    assert status == 409 and "A training is running" in answer["error"]
    assert (personalize / "cache" / "a" / "0000.png").exists()
