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


def drawing(side, model=("train", 0), **meta):
    """Images of `side` pixels a side, with the model of an output."""
    ends = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}
    settings = {"seed": 0, "steps": 1, "cfg": 1.0, "denoise": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    return encoding("a <concept>") | {
        "latent": ("EmptyLatentImage", {"width": side, "height": side, "batch_size": 1}),
        "sampler": ("KSampler", {"model": [*model], **ends, **settings}),
        "shown": ("PreviewAny", {"source": ["sampler", 0]}),
    }


SHIFTED = {"shift": ("ModelSamplingDiscrete", {"model": ["train", 0], "sampling": "eps", "zsnr": False})}


@pytest.mark.parametrize(
    ("changes", "named"),
    [(drawing(40), True), (drawing(48), False), (SHIFTED | drawing(40, ("shift", 0)), True),
     (drawing(40, ("checkpoint", 0)), False)],
)  # fmt: skip
def test_images_much_smaller_than_the_training_are_named_before_it(server, smallest, changes, named):
    """The smallest training is of 64 x 64 pixels."""
    before = len(server.log)
    server.run(changed(smallest, changes | {"train.seed": next(SEEDS)}))
    sentence = (
        "EmptyLatentImage makes images of 40 x 40 pixels, while your subject is learned at 64 x 64: set its width"
    )
    assert (sentence in server.log[before:]) == named
    assert ("makes images of" in server.log[before:]) == named


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
