"""Pick by Score on a real server: one training, whatever the slider says, and the state that it says."""

import json

import pytest

from personalize.demo import show
from personalize.tests.support import evaluating, host, prompts
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.pick import candidates, preferred

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
STEPS, EVERY, SEED = 6, 2, 1130


@pytest.fixture(scope="module")
def build(server, object_info):
    """`build(text_weight)`: an API prompt from one image to a saved file of what was picked."""
    metric_models = evaluating.write_for_server(server.base / "models" / "clip_vision")

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": prompts.defaults(object_info[kind]["input"]) | inputs}

    def go(text_weight, **changes):
        recipe = {
            "preset": "benchmark",
            "preset.steps": STEPS,
            "preset.batch_size": 2,
            "preset.views": 4,
            **host.CAPTIONS,
        }
        recipe |= {"preset.lora_learning_rate": 0.01, "preset.embedding_learning_rate": 0.05}
        picker = {
            "metric_models": ["metric models", 0],
            "every": EVERY,
            "sampler_steps": 2,
            "prompts": "a {} on the beach\na {} in the snow",
        }
        return {
            "metric models": node("PersonalizeMetricModels", **metric_models),
            "checkpoint": node("CheckpointLoaderSimple", ckpt_name=server.checkpoint),
            "picture": node("LoadImage", image=show.REFERENCE),
            "references": node(
                "PersonalizeLoadReferences", **{"images.image0": ["picture", 0]}, resolution=64, crop="center"
            ),
            "recipe": {"class_type": "PersonalizeTextBoost", "inputs": recipe},
            "picker": node("PersonalizePickByScore", **picker | {"text_weight": text_weight} | changes),
            "train": node(
                "PersonalizeTrain", model=["checkpoint", 0], clip=["checkpoint", 1], vae=["checkpoint", 2],
                concept=["references", 0], recipe=["recipe", 0], stopper=["picker", 0], preview_every=0, seed=SEED,
                precision="auto",
            ),
            "save": node("PersonalizeSave", result=["train", 2], name="picked", overwrite=True),
            "plot": node("PersonalizePlotHistory", result=["train", 2], prefix="personalize/picked", scale="linear"),
        }  # fmt: skip

    return go


def saved_steps(server):
    """How many steps led to what was saved, by its own header."""
    from safetensors import safe_open

    with safe_open(server.base / "models" / "personalize" / "picked.safetensors", "pt") as file:
        return json.loads(file.metadata()["personalize"])["steps"]


def runs(server):
    """{folder of a run of this file: when its log was last written}"""
    found = (RunFolder(log.parent) for log in (server.base / "output").glob("personalize/runs/*/steps.jsonl"))
    return {
        each.path: (each.path / "steps.jsonl").stat().st_mtime_ns
        for each in found
        if each.info().settings.get("seed") == SEED
    }


def summary(server, history):
    texts = [shown["text"][0] for shown in history["outputs"].values() if "text" in shown]
    (text,) = [each for each in texts if "evaluations" in each]
    return text


def test_the_slider_picks_another_state_of_the_same_training(server, build):
    told = server.run(build(0.5))
    ((folder, written),) = runs(server).items()
    log = RunFolder(folder).history(STEPS)
    assert [each.step for each in candidates(log)] == [2, 4, 6]
    for weight in (0.5, 0.0, 1.0):
        told = server.run(build(weight)) if weight != 0.5 else told
        best = preferred(log, weight)
        assert saved_steps(server) == best.step
        assert f"Step {best.step}: its state was picked, by score." in summary(server, told)
    assert runs(server) == {folder: written}  # nothing was trained for it
    server.run(build(0.5, every=3))  # but this is another training
    assert len(runs(server)) == 2


def test_an_earlier_run_loads_with_the_preferred_state(server, build, object_info):
    server.run(build(0.5))
    folder = next(each for each in runs(server) if len(candidates(RunFolder(each).history(STEPS))) == 3)
    for weight in (0.0, 1.0):
        prompt = {name: node for name, node in build(weight).items() if name in ("checkpoint", "save")}
        loading = prompts.defaults(object_info["PersonalizeLoad"]["input"]) | {"run": folder.name}
        loading |= {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "text_weight": weight}
        prompt["load"] = {"class_type": "PersonalizeLoad", "inputs": loading}
        prompt["save"]["inputs"]["result"] = ["load", 2]
        server.run(prompt)
        assert saved_steps(server) == preferred(RunFolder(folder).history(STEPS), weight).step


def test_a_prompt_without_the_subject_is_refused_before_anything_runs(server, build):
    from personalize.demo.client import HostError

    before = runs(server)
    with pytest.raises(HostError, match="The prompts to score have no place for the subject: write {}"):
        server.run(build(0.5, prompts="a dog in the snow"))
    assert runs(server) == before
