"""What is known before a training is said before it, and stays on the node while it runs."""

from itertools import count

import pytest

from personalize.tests.support import prompts
from personalize.tests.support.prompts import changed

pytestmark = [pytest.mark.slow, pytest.mark.comfy]
SHORT = {"preset": "short", "preset.steps": 1, "preset.views": 1, "preset.prior_weight": 0.0}
CUSTOM = {"recipe": ("PersonalizeCustomDiffusion", SHORT)}
LISTED = {"prompts": "a {}", "prompt_file": "", "subject": "<concept>", "prefix": "p", "max_prompts": 0}
PROMPTS = ("PersonalizePromptList", LISTED)
SEEDS = count(1)  # a Train node that has run with the same inputs does not run again
REPLACED = {"string": "a {} on grass", "find": "{}", "replace": ["references", 2]}


@pytest.fixture(scope="module")
def smallest(server, object_info):
    return prompts.smallest(object_info, server.checkpoint)


def encoding(text, clip=("train", 1)):
    return {
        "text": ("CLIPTextEncode", {"clip": [*clip], "text": text}),
        "shown": ("PreviewAny", {"source": ["text", 0]}),
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (encoding("a photo of a dog"), "No prompt has the placeholder <concept>, so no image will"),
        (
            {"skip": ("CLIPSetLastLayer", {"clip": ["train", 1], "stop_at_clip_layer": -1})}
            | encoding("a <concpt>", ("skip", 0)),
            "The prompt 'a <concpt>' has <concpt>, which is no placeholder: write <concept>.",
        ),
        (
            CUSTOM | {"made": ("StringReplace", REPLACED)} | encoding(["made", 0]),
            "The prompt 'a <concept> on grass' has <concept> alone, but this training learns '<concept> dog'",
        ),
        (CUSTOM | {"made": PROMPTS} | encoding(["made", 0]), "The prompt 'a <concept>' has <concept> alone"),
        (
            CUSTOM
            | {"made": ("StringReplace", REPLACED | {"replace": ["train", 4]})}
            | encoding(["made", 0]),
            "",
        ),
        (encoding("a <concept>"), ""),
        (encoding(["train", 4]), ""),
    ],
)  # fmt: skip
def test_prompts_that_miss_the_subject_are_named_before_the_training(server, smallest, changes, sentence):
    before = len(server.log)
    server.run(changed(smallest, changes | {"train.seed": next(SEEDS)}))
    said = server.log[before:]
    if sentence:
        assert sentence in said
    else:
        assert "placeholder" not in said and "alone" not in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"references.placeholder_token": "my dog"}, "The placeholder 'my dog' is not one word"),
        ({"references.class_word": " "}, "The class word is empty"),
        ({"references.folder": "nowhere"}, "The folder 'nowhere' does not exist"),
        ({"references.class_folder": "../output"}, "is not inside ComfyUI's input folder"),
        ({"references.folder": "\ud83d"}, "is not inside ComfyUI's input folder"),
    ],
)
def test_a_wrong_word_or_folder_is_refused_when_it_is_queued(server, smallest, changes, sentence):
    outcome = prompts.queue(server.client, changed(smallest, changes))
    assert outcome.kind == "refused" and sentence in outcome.message and not prompts.faults(outcome.message)
