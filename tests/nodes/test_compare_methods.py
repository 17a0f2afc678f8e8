"""Compare Methods without a training: names of its rows, and what it says before the graph runs."""

from dataclasses import replace

import pytest

from personalize.trainers.recipes import METHODS

pytestmark = pytest.mark.comfy


def test_each_recipe_has_a_name_of_its_own():
    from personalize.nodes.evaluation.compare_methods import labelled

    benchmark, readme, cpa = (METHODS["TextBoost"][name] for name in ("benchmark", "readme", "2026 CPA"))
    custom = METHODS["Custom Diffusion"]["short"]
    assert labelled([benchmark, custom]) == {"TextBoost": benchmark, "Custom Diffusion": custom}
    several = [readme, cpa, replace(readme, steps=3), replace(readme, steps=4), benchmark, benchmark]
    assert list(labelled(several)) == [
        "TextBoost, readme", "TextBoost, 2026 CPA", "TextBoost, own settings 1", "TextBoost, own settings 2",
        "TextBoost, benchmark 1", "TextBoost, benchmark 2",
    ]  # fmt: skip
    assert list(labelled(several).values()) == several
    with pytest.raises(ValueError, match="There is no recipe to compare: connect the node of a method"):
        labelled([])


def test_what_is_wrong_is_known_before_the_graph_runs(monkeypatch, tmp_path):
    from personalize.nodes.evaluation.compare_methods import CompareMethods

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    good = {"prompt_set": "own", "prompts": "a {}", "prompt_file": "", "prefix": "reports", "metric_models": None}
    assert CompareMethods.validate_inputs(**good) is True
    for name, value in (("prompts", ""), ("prefix", "../x"), ("prompt_set", "none")):
        assert isinstance(CompareMethods.validate_inputs(**good | {name: value}), str), name
    del good["metric_models"]  # nothing is connected: they are the published ones, which are not here
    assert "on Metric Models" in CompareMethods.validate_inputs(**good)
