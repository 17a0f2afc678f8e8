"""What editors are told of a training: events, a run's history, and the request to finish. No browser here."""

import asyncio
import contextlib
import json
import math
import time
import types
import urllib.error
import urllib.request

import pytest

from personalize.tests.support import waiting
from personalize.tests.support.prompts import changed, smallest

pytestmark = pytest.mark.comfy
STEPS = 40


def line(step, stage="a", stage_step=None, steps=10, **more):
    """A line of steps.jsonl."""
    entry = {"step": step, "steps": steps, "stage": stage, "stage_step": stage_step or step, "loss": 1 / step}
    return entry | {"terms": {}, "seconds": 2.0 * step} | more


def write(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")


def view(folder, steps):
    from personalize.nodes.host.live import Live

    return Live(folder, steps, types.SimpleNamespace(unique_id="12:3", extra_pnginfo=None))


def test_a_long_history_is_thinned_evenly_and_keeps_what_counts(tmp_path):
    from personalize.nodes.host.live import read

    entries = [
        line(step, "a", step) if step <= 60_000 else line(step, "b", step - 60_000) for step in range(1, 100_001)
    ]
    for entry in entries[9::500]:
        entry["measures"] = {"DVAR": {"ratio": 0.5}}
    write(tmp_path, entries)
    kept = read(tmp_path, most=1000)
    steps = [entry["step"] for entry in kept]
    assert steps == sorted(set(steps)) and {1, 60_001, 99_999, 100_000} <= set(steps)
    assert 1000 <= len(kept) <= 1210
    assert max(b - a for a, b in zip(steps, steps[1:])) == 100, "there is a gap"
    assert sum("measures" in entry for entry in kept) == 200, "what was measured seldom is gone"
    assert read(tmp_path) == entries


def test_an_entry_holds_only_what_is_drawn_and_only_numbers():
    from personalize.nodes.host.live import compact

    measures = {"DVAR": {"ratio": math.nan, "threshold": 0.15, "note": "x"}, "odd": 3}
    entry = line(3, measures=measures, start={"DVAR": {"fixed_loss": 0.5}})
    seen = compact(entry)
    assert seen == {"step": 3, "stage": "a", "loss": 0.33333, "measures": {"DVAR": {"threshold": 0.15}}} | {
        "start": {"DVAR": {"fixed_loss": 0.5}}
    }
    json.dumps(seen, allow_nan=False)


def test_a_damaged_log_is_read_as_far_as_it_can_be(tmp_path):
    from personalize.nodes.host.live import read

    write(tmp_path, [line(1), {"step": "x"}, line(2)])
    with (tmp_path / "steps.jsonl").open("a", encoding="utf-8") as log:
        log.write('[1]\n{"step": 3, "loss": 0.')  # a line that is just being written
    assert [entry["step"] for entry in read(tmp_path)] == [1, 2]
    assert read(tmp_path / "nothing") == []


def test_the_end_moves_when_a_stage_ends_early(tmp_path):
    """Three stages of 10, 20 and 30 steps; the first was ended after its fourth."""
    live = view(tmp_path, 60)
    assert live.steps() == 60
    live.add(line(1))
    live.add(line(4))
    assert live.steps() == 60
    live.add(line(5, "b", stage_step=1, steps=20))
    assert live.steps() == 4 + 20 + 30
    live.add(line(5, "b", stage_step=1, steps=20))  # once more, with less memory
    assert live.steps() == 54


def test_a_run_that_goes_on_knows_its_earlier_stages(tmp_path):
    write(tmp_path, [line(step) for step in range(1, 7)])  # 6 of 10 steps, ended by hand
    live = view(tmp_path, 60)
    live.add(line(7, "b", stage_step=1, steps=20))
    assert live.steps() == 6 + 20 + 30


def test_the_time_left_follows_the_pace_of_the_stage(tmp_path, monkeypatch):
    from personalize.nodes.host import live as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    live = view(tmp_path, 30)
    for step in range(1, 11):
        clock[0] += 2.0
        live.add(line(step))
    assert live.seconds_left() == 2.0 * 20
    for step in range(11, 21):
        clock[0] += 5.0
        live.add(line(step, "b", stage_step=step - 10, steps=20))
        if step <= 12:  # the first steps say nothing of a pace yet
            assert live.seconds_left() == 2.0 * (30 - step)
    assert live.seconds_left() == 5.0 * 10
    assert live.words() == "b: step 10 of 20, loss 0.0500"
    clock[0] += 1000
    live.add(line(21, "b", stage_step=11, steps=20))
    assert live.words().endswith("about 16 minutes left")


def test_finishing_is_answered_once(tmp_path):
    live = view(tmp_path, 10)
    assert not live.finish()
    live.finishing = True
    live.add(line(1))
    assert live.finish() and not live.finish()


def test_finishing_a_stage_that_has_just_ended_does_not_end_the_next_one(tmp_path):
    live = view(tmp_path, 30)
    live.add(line(10))
    live.finishing = True
    live.add(line(11, "b", stage_step=1, steps=20))
    assert not live.finish()


# ---- through the server


def answer(server, path, body=None):
    """Status and JSON."""
    request = urllib.request.Request(server.url + path, data=body)
    try:
        with urllib.request.urlopen(request, timeout=waiting.LIMIT) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


BODIES = [b"", b"[]", b"null", b'"0123456789abcdef"', b"{}", b'{"run": 1}', b'{"run": "0123"}', b'{"run": "../../etc"}']
BODIES += [b'{"run": "0123456789ABCDEF"}', b'{"run": "0123456789abcdef\\n"}', b'{"run": "0123456789abcdef", "x": 1}']
BODIES += [b'{"run": "0123456789abcdef", "client": 1}']
BODIES += [b'{"run": ["0123456789abcdef"]}', b"\xff\xfe", b"[" * 100_000, b'{"run": "0123456789abcde\xc3\xa9"}']


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_finishing_takes_a_digest_and_nothing_else(server, body):
    status, said = answer(server, "/personalize/finish", body)
    sentence = 'The request is not valid: send {"run": "..."} with the 16 hexadecimal digits of a run.'
    assert status == 400 and said == {"error": sentence}


@pytest.mark.slow
def test_a_run_that_does_not_train_cannot_be_finished(server):
    body = json.dumps({"run": "0123456789abcdef"}).encode()
    assert answer(server, "/personalize/finish", body) == (
        404,
        {"error": "The run is not training: there is nothing to finish."},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0123456789abcdef", "x", "..%2f..%2fruns", "0123456789ABCDEF", "0123456789abcdef%00"])
def test_a_run_that_there_is_not(server, name):
    status, said = answer(server, f"/personalize/runs/{name}")
    assert status == 404 and said == {"error": "The run does not exist: its folder may have been deleted."}


@pytest.fixture(scope="module")
def watched(server, object_info):
    """A training that is finished by hand at half its steps, and all that its editor and another one heard of it."""
    small = {"recipe.preset.steps": STEPS, "train.preview_every": 5, "train.preview_steps": 1, "train.seed": 770_077}
    prompt = changed(smallest(object_info, server.checkpoint), small)

    async def go():
        import aiohttp

        events, middle, answers, strangers = [], {}, [], []
        async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:
            other, socket = [
                await stack.enter_async_context(session.ws_connect(f"{server.url}/ws?clientId={name}", max_msg_size=0))
                for name in ("stranger", "owner")
            ]
            async with session.post(server.url + "/prompt", json={"prompt": prompt, "client_id": "owner"}) as response:
                queued = (await response.json())["prompt_id"]
            async for message in socket:
                if not (event := step_event(message)):
                    continue
                events.append((time.monotonic(), event))
                if not event["running"]:
                    break
                if event["step"] >= STEPS // 2 and not middle:
                    async with session.get(f"{server.url}/api/personalize/runs/{event['run']}") as response:
                        middle.update(await response.json())
                    for client in ({}, {"client": "stranger"}, {"client": "owner"}):
                        body = {"run": event["run"], **client}
                        async with session.post(f"{server.url}/api/personalize/finish", json=body) as response:
                            answers.append((response.status, await response.json()))
            with contextlib.suppress(asyncio.TimeoutError):
                while True:
                    strangers.append(step_event(await other.receive(timeout=1)))
        return queued, events, middle, answers, [*filter(None, strangers)]

    queued, events, middle, answers, strangers = asyncio.run(go())
    history = server.client.wait(queued, 60)
    digest = events[0][1]["run"]
    folder = server.base / "output" / "personalize" / "runs" / digest
    found = {"queued": queued, "events": events, "middle": middle, "answers": answers, "strangers": strangers}
    return types.SimpleNamespace(**found, history=history, digest=digest, folder=folder)


def step_event(message):
    """What a message of the server says of a training; nothing for other messages."""
    data = json.loads(message.data) if isinstance(message.data, str) else {}
    return data["data"] if data.get("type") == "personalize.step" else None


@pytest.mark.slow
def test_a_training_is_shown_to_the_client_that_queued_it_and_ended_by_it_alone(watched):
    assert watched.strangers == []
    refused = {"error": "The run was queued by another client: finish it in the editor that queued it."}
    assert watched.answers == [(403, refused), (403, refused), (200, {"run": watched.digest})]


@pytest.mark.parametrize("several_users", [False, True])
def test_a_training_whose_client_stays_away_is_everybodys_unless_there_are_several_users(
    tmp_path, monkeypatch, several_users
):
    from personalize.nodes.host import internals
    from personalize.nodes.host import live as module

    clock, server = [0.0], types.SimpleNamespace(client_id="owner", sockets={"owner": None, "other": None})
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(internals.args, "multi_user", several_users)
    live = view(tmp_path, 10)
    clock[0] = 100.0
    assert live.owner() == "owner"
    del server.sockets["owner"]  # while its page is reloaded
    clock[0] = 159.0
    assert live.owner() == "owner"
    clock[0] = 161.0
    assert live.owner() == ("owner" if several_users else None)


@pytest.mark.slow
def test_every_point_arrives_once_and_in_order(watched):
    log = [json.loads(entry) for entry in (watched.folder / "steps.jsonl").read_text().splitlines()]
    heard = [entry for _, event in watched.events for entry in event["entries"]]
    assert [(e["step"], e["stage"]) for e in heard] == [(e["step"], e["stage"]) for e in log]
    assert [e["loss"] for e in heard] == pytest.approx([e["loss"] for e in log], rel=1e-4)


@pytest.mark.slow
def test_events_are_few_and_say_where_it_stands(watched):
    times = [when for when, _ in watched.events]
    assert len(times) <= 5 * (times[-1] - times[0]) + 3
    event = watched.events[-2][1]
    assert (event["node"], event["prompt_id"], event["workflow"]) == ("train", watched.queued, None)
    assert (event["stage"], event["steps"], event["stage_steps"]) == ("textboost", STEPS, STEPS)
    assert event["step"] == event["stage_step"] == event["entries"][-1]["step"]
    assert event["seconds"] > 0 and event["seconds_left"] > 0
    assert event["previews"][:2] == ["step_0000.png", "step_0005.png"]


@pytest.mark.slow
def test_finish_ends_it_with_a_complete_result(server, watched):
    about = json.loads((watched.folder / "run.json").read_text())
    assert about["complete"] and STEPS // 2 <= about["steps"] < STEPS
    assert "finished by hand" in about["stop_reason"]
    assert watched.history["outputs"]["train"]["personalize_run"] == [watched.digest]


@pytest.mark.slow
def test_the_history_of_a_run_in_progress_and_after_it(server, watched):
    middle, steps = watched.middle, len((watched.folder / "steps.jsonl").read_text().splitlines())
    assert middle["running"] and middle["stop_reason"] == "" and middle["steps"] == STEPS
    assert [e["step"] for e in middle["entries"]] == list(range(1, len(middle["entries"]) + 1))
    assert len(middle["entries"]) >= STEPS // 2
    status, end = answer(server, f"/personalize/runs/{watched.digest}")
    assert status == 200 and not end["running"] and (end["method"], end["word"]) == ("TextBoost", "<concept>")
    assert [e["step"] for e in end["entries"]] == list(range(1, steps + 1)) and end["steps"] == steps
    assert "finished by hand" in end["stop_reason"] and end["stops"][0]["step"] == steps
    assert end["previews"] == sorted(file.name for file in (watched.folder / "previews").iterdir())
    assert str(server.base) not in json.dumps(end), "a path of the machine"
    place = {"subfolder": f"personalize/runs/{watched.digest}/previews", "type": "output"}
    assert server.client.fetch("/view", filename=end["previews"][-1], **place)[:4] == b"\x89PNG"
