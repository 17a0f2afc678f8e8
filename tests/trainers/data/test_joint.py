"""Several concepts in one training: has each image its own words, does every token learn, and does all come back?"""

import dataclasses
import json

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.training.test_learning_rates import short
from personalize.trainers.cli import train as command
from personalize.trainers.data.class_images import PriorPreservation
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.data.joint import joined
from personalize.trainers.images import to_pil
from personalize.trainers.recipes import METHODS
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import replay
from personalize.trainers.runs import result as results
from personalize.trainers.runs import train as training
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.run import Run

JOINT = [
    METHODS["TextBoost"]["benchmark"],
    *(METHODS[method]["full"] for method in ("Textual Inversion", "DreamBooth-LoRA", "Custom Diffusion")),
]
ALONE = [METHODS["TextBoost"]["2026 CPA"], METHODS["AttnDreamBooth"]["paper"], METHODS["T-LoRA"]["single image"]]
COLOURS = {"<red>": (0.9, 0.1, 0.1), "<blue>": (0.1, 0.1, 0.9)}


def concept(token, class_word, count=1, **changes):
    """A subject whose images are of one colour."""
    image = torch.tensor(COLOURS[token])[:, None, None].expand(3, 40, 32).clone()
    words = {"placeholder_token": token, "class_word": class_word, "resolution": 32}
    return Concept(images=(image,) * count, **words | changes)


def both(**changes):
    return joined([concept("<red>", "dog", 2, **changes), concept("<blue>", "cat", **changes)])


def test_members_are_what_was_joined():
    one = concept("<red>", "dog", 2, captions=("{} here", ""), masks=(torch.zeros(1, 40, 32) + 0.5,) * 2)
    other = concept("<blue>", "cat", initializer_token="blue cat")
    whole = joined([one, other])
    for member, own in zip(whole.members, (one, other), strict=True):
        for field in dataclasses.fields(Concept):
            if field.name not in ("images", "masks", "captions"):
                assert getattr(member, field.name) == getattr(own, field.name), field.name
        assert all(torch.equal(a, b) for a, b in zip(member.images, own.images, strict=True))
    assert whole.captions == ("{} here", "", "") and [mask.mean().item() for mask in whole.masks] == [0.5, 0.5, 1.0]
    assert whole.words == [("<red>", "dog"), ("<blue>", "blue cat")] and whole.subject(True) == "<red> dog"
    assert joined([whole]).words == whole.words and one.members == (one,)


@pytest.mark.parametrize("recipe", JOINT, ids=lambda recipe: type(recipe).__name__)
def test_every_image_is_named_by_its_own_token(recipe):
    """The token in a prompt against the colour of its image, as the autoencoder gives it."""
    plain = {"augmentation_p": 0.0, "grayscale_p": 0.0, "random_size": False, "captions": ("snow",)}
    models, generator = small.models(), torch.Generator().manual_seed(0)
    recipe = short(recipe, views=3, batch_size=4, **plain)
    images = {token: torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 32, 32) for token, colour in COLOURS.items()}
    known = {token: models.encode_images(image)[0][0] for token, image in images.items()}
    stage = next(recipe.stages(models, both(), generator, Context()))
    placeholders, seen = models.text_encoders[0].tokenizer.placeholders, set()
    for _ in range(4):
        batch = next(stage.batches)
        for latents, ids in zip(batch.latents, batch.input_ids[:, 0].tolist(), strict=True):
            (token,) = [token for token in COLOURS if placeholders[token][0] in ids]
            distances = {name: (latents - mean).norm() for name, mean in known.items()}
            assert min(distances, key=distances.get) == token
            seen.add(token)
    assert seen == set(COLOURS)


@pytest.mark.parametrize("recipe", JOINT, ids=lambda recipe: type(recipe).__name__)
def test_all_tokens_learn_and_come_back(tmp_path, recipe):
    """In the result, in the file of it, and in a run that is read from its folder to be trained again."""
    run = Run(concept=both(), recipe=short(recipe, steps=2, batch_size=4, captions=("snow",)))
    training.train(run, small.models(), tmp_path)
    result, models = RunFolder(tmp_path).result(), small.models()
    for token, word in (("<red>", "dog"), ("<blue>", "cat")):
        (row,) = models.text_encoders[0].tokenizer.encode_words(word)
        assert (result.tokens[token][0] - models.text_encoders[0].embedding.weight[row]).abs().max() > 0
    again = replay.read(tmp_path / "run.json")
    assert again.digest("a model") == run.digest("a model") and again.concept.words == run.concept.words
    assert (
        results.read_complete(*results.complete(result, "mine"), tmp_path / "mine.safetensors").tokens.keys()
        >= COLOURS.keys()
    )


def test_each_class_is_preserved():
    """Class images of either class, and the knowledge of either: a template with each class word."""
    models, generator = small.models(), torch.Generator().manual_seed(0)
    settings = PriorPreservation(prior_weight=1.0, class_images=2, class_image_steps=1)
    drawn = settings.images(models, both(), generator, Context())
    assert torch.equal(drawn.input_ids, models.tokenize(["a photo of a dog"] * 2 + ["a photo of a cat"] * 2))
    recipe = TextBoost(views=2, batch_size=64, null_prob=0.0, captions=("snow",), templates="plain")
    batches = next(recipe.stages(models, both(), generator, Context())).batches
    ids = torch.cat([next(batches).preservation_ids for _ in range(4)])
    for word in ("dog", "cat"):
        assert (ids == models.tokenize([f"photo of a {word}"])).all(dim=2).any()


@pytest.mark.parametrize("recipe", ALONE, ids=lambda recipe: type(recipe).__name__)
def test_methods_of_one_subject_say_so(recipe):
    with pytest.raises(ValueError, match="learns one subject, and 2 are joined: train them one after the other"):
        recipe.check(both())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"placeholder_token": "<red>"}, "Two concepts have the placeholder <red>: give each one of its own."),
        ({"resolution": 64}, "The concepts differ in their resolution: set the same one for all."),
        ({"class_images": (torch.zeros(3, 32, 32),)}, "Only some concepts have class images: give class images to all"),
    ],
    ids=str,
)
def test_what_cannot_be_joined_gets_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        joined([concept("<red>", "dog"), concept("<blue>", "cat", **changes)])


@pytest.fixture
def listed(tmp_path):
    """`listed(entries)`: the run of a command line with a list of further concepts."""
    for token, name in (("<red>", "red"), ("<blue>", "blue")):
        (tmp_path / name).mkdir()
        to_pil(concept(token, "dog").images[0]).save(tmp_path / name / "a.png")

    def run(entries):
        text = entries if isinstance(entries, str) else json.dumps(entries)
        (tmp_path / "concepts.json").write_text(text.replace("BLUE", str(tmp_path / "blue")))
        paths = ["--images", str(tmp_path / "red"), "--checkpoint", "x", "--out", "y", "--device", "cpu"]
        words = ["--placeholder-token", "<red>", "--resolution", "32", "--concepts", str(tmp_path / "concepts.json")]
        return command.run_of(command.parser().parse_args(["textboost", *paths, *words]))

    return run


def test_the_command_line_joins_a_list(listed):
    run = listed([{"images": "BLUE", "class_word": "cat", "placeholder_token": "<blue>"}])
    assert run.concept.words == [("<red>", "dog"), ("<blue>", "cat")] and len(run.concept.images) == 2
    assert {member.resolution for member in run.concept.members} == {32}


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ("[", r"The list of concepts 'concepts.json' is no list: write \[\{"),
        ([{"images": ""}], "The folder '' of 'concepts.json' does not exist: correct its path."),
        ([{"images": "nowhere"}], "The folder 'nowhere' of 'concepts.json' does not exist: correct its path."),
        ([{"class_word": "cat"}], "A concept in 'concepts.json' has no images: write the path of their folder."),
        ([{"images": "BLUE", "crop": "center"}], "A concept in 'concepts.json' has 'crop': use images, class_images, "),
        ([{"images": "BLUE", "class_word": 7}], "The value of class_word of a concept is 7: use text."),
        ([{"images": "BLUE", "placeholder_token": "a b"}], "The placeholder 'a b' is not one word"),
    ],
    ids=str,
)
def test_a_bad_list_gets_one_sentence(listed, entries, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        listed(entries)


@pytest.mark.comfy
def test_the_node_joins_what_is_connected():
    from personalize.nodes.join_concepts import JoinConcepts

    given = {"concept0": concept("<red>", "dog"), "concept1": concept("<blue>", "cat")}
    (whole,) = JoinConcepts.execute(given).result
    assert whole.words == [("<red>", "dog"), ("<blue>", "cat")]
