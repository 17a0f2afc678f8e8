"""What is said before the wait about a concept that will not be learned well."""

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.prompts import placeholder_advice
from personalize.trainers.recipes.textual_inversion import TextualInversion
from personalize.trainers.runs.callbacks import Callbacks
from personalize.trainers.runs.run import Run
from personalize.trainers.runs.train import train


def concept(*sizes, **values):
    return Concept(images=tuple(torch.zeros(3, height, width) for height, width in sizes), **values)


@pytest.mark.parametrize(
    ("given", "resolution", "tokens", "expected"),
    [
        (concept((512, 512)), 512, 1, []),
        (concept((400, 600)), 512, 2, []),  # 1.28 times
        (
            concept((512, 512), (1000, 200), class_word="dog"), 512, 1,
            ["Image 2 is only 200 x 1000 pixels and is enlarged 2.6 times: use a larger one."],
        ),
        (
            concept((1024, 1024), resolution=512), 1024, 1,
            ["Training at 512 pixels, while the model was made for 1024: set the resolution of Load References to 0."],
        ),
        (concept((1024, 1024), resolution=768), 1024, 1, []),
        (concept((512, 512), resolution=128), 512, 1, []),
        (
            concept((512, 512), class_word="schnauzerdoodle"), 512, 4,
            ["The class word 'schnauzerdoodle' is no common word, the model reads it in 4 pieces: use a common one, "
             "such as dog, mug or backpack."],
        ),
    ],
)  # fmt: skip
def test_what_is_said(given, resolution, tokens, expected):
    assert given.advice(resolution, tokens) == expected


def test_it_is_said_by_every_training_before_it_begins(tmp_path):
    """As a warning, which the node shows and the command line prints."""
    said, recipe = [], TextualInversion(steps=1, batch_size=1, views=1)
    callbacks = Callbacks(on_warning=said.append, on_step=lambda report: said.append("a step"))
    run = Run(concept=concept((16, 40), resolution=32), recipe=recipe)
    train(run, small.models(), tmp_path, callbacks=callbacks)
    assert said == ["Image 1 is only 40 x 16 pixels and is enlarged 2.0 times: use a larger one.", "a step"]


NONE = "No prompt has the placeholder <concept>, so no image will show your subject: write it {}."
WITHOUT = (
    "The prompt {!r} has <concept> alone, but this training learns '<concept> dog': write that in prompts, or connect "
    "the output subject of Train."
)


@pytest.mark.parametrize(
    ("prompts", "subject", "expected"),
    [
        ([], "<concept>", []),  # nothing is generated
        (["a photo of <concept>", "blurry"], "<concept>", []),  # a negative prompt need not have it
        (["a photo of a dog"], "<concept>", [NONE.format("where it should be, as in 'a photo of <concept>'")]),
        (["a photo of a concept on grass"], "<concept>", [NONE.format("in place of 'concept'")]),
        (["a photo of a dog", None], "<concept>", []),  # a text that another node makes may have it
        (
            ["a <concpt>", None], "<concept>",
            ["The prompt 'a <concpt>' has <concpt>, which is no placeholder: write <concept>."],
        ),
        (
            ["a (<Concept>:1.2)"], "<concept>",
            ["The prompt 'a (<Concept>:1.2)' has <Concept>, which is no placeholder: write <concept>."],
        ),
        (["<concept> on the <left>"], "<concept>", []),  # a token of an augmentation
        (["a <concept>  Dog, <concept> dog"], "<concept> dog", []),
        (["a <concept> on grass", "<concept> dogs"], "<concept> dog", [WITHOUT.format("a <concept> on grass")]),
        (["a <concept> dog, and a <concept>"], "<concept> dog", [WITHOUT.format("a <concept> dog, and a <concept>")]),
    ],
)  # fmt: skip
def test_what_is_said_of_prompts(prompts, subject, expected):
    assert placeholder_advice(prompts, {"<concept>": subject}) == expected


def test_of_several_subjects_one_is_enough():
    subjects = {"<concept>": "<concept> dog", "<mug>": "<mug> mug"}
    assert placeholder_advice(["a <mug> mug"], subjects) == []
    assert "has <mug> alone, but this training learns '<mug> mug'" in placeholder_advice(["a <mug>"], subjects)[0]
    assert "has <mgu>, which is no placeholder: write <mug>" in placeholder_advice(["a <mgu>"], subjects)[0]
    assert placeholder_advice(["a dog"], {}) == []  # nothing is learned as a word
