"""The starting word: is the score open_clip's own, and are best, worst and random drawn from whole words?"""

import json

import pytest
import torch
import torch.nn.functional as F

from personalize.demo import evaluators
from personalize.tests.support import small, world_clip
from personalize.trainers.data import initializer
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.models.tokenizer import bundled_words

open_clip = pytest.importorskip("open_clip")


@pytest.fixture
def few(monkeypatch):
    """A vocabulary that is scored in a moment: every 2000th word, and some that the world knows."""
    whole = initializer.vocabulary()
    some = tuple(word for i, word in enumerate(whole) if i % 2000 == 0 or word.word in ("dog", "car", "sketch"))
    monkeypatch.setattr(initializer, "vocabulary", lambda: some)
    return some


def context(shelf, cache=None):
    return Context(extractors=shelf, cache=cache)


def test_the_candidates_are_whole_words_of_letters():
    words = {word.word: word.id for word in initializer.vocabulary()}
    assert len(words) == len(initializer.vocabulary()) == 32875
    encode, decoder = bundled_words(), open_clip.tokenizer.SimpleTokenizer().decoder
    assert all(encode(word) == [i] for word, i in words.items())  # written, each is that one entry
    assert all(decoder[i] == f"{word}</w>" and word.isascii() and word.isalpha() for word, i in words.items())
    assert "dog" in words and "ktn" not in words and decoder[42170] == "ktn"  # a part of words only
    taken = set(words.values())
    left_out = [entry for i, entry in decoder.items() if i not in taken and entry.endswith("</w>")]
    assert not any(entry[:-4].isascii() and entry[:-4].isalpha() and entry.islower() for entry in left_out)


@torch.no_grad()
def test_the_score_is_that_of_open_clip(shelf, folder, few):
    pictures = world_clip.pictures(count=3)
    model, _, preprocess = open_clip.create_model_and_transforms(
        evaluators.CLIP_NAME, pretrained=str(folder / world_clip.FILE)
    )
    tokenize = open_clip.get_tokenizer(evaluators.CLIP_NAME)
    model.eval()
    each = [F.normalize(model.encode_image(preprocess(picture)[None]), dim=-1)[0].double() for picture in pictures]
    expected = []
    for word in few:
        text = model.encode_text(tokenize([f"a photo of a {word.word}"]))[0].double()
        expected.append(float(F.cosine_similarity(sum(each) / 3, text, dim=0)))
    scores = initializer.word_scores(shelf.load(world_clip.CHOICE), pictures, few, batch_size=7)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_best_and_worst_are_the_extremes(shelf, few):
    images = world_clip.tensors(world_clip.pictures())
    best, worst = (
        initializer.starting_word(strategy, small.models(), images, world_clip.CHOICE, None, context(shelf))
        for strategy in ("best", "worst")
    )
    assert best.word == "dog" and best.id == bundled_words()("dog")[0]
    scores = initializer.word_scores(shelf.load(world_clip.CHOICE), world_clip.pictures(), few)
    assert best.score == pytest.approx(float(scores.max()), abs=1e-6)
    assert worst.score == pytest.approx(float(scores.min()), abs=1e-6)
    ranked = initializer.ranking(small.models(), images, world_clip.CHOICE, context(shelf))
    for name, order in (("best", sorted(scores.tolist(), reverse=True)), ("worst", sorted(scores.tolist()))):
        assert [word.score for word in ranked[name]] == pytest.approx(order[: initializer.KEPT], abs=1e-6)


def test_random_is_the_runs_own_draw():
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        made = [
            initializer.starting_word("random", None, (), world_clip.CHOICE, generator, Context()) for _ in range(20)
        ]
        return made, generator.get_state()

    torch.manual_seed(1)
    first = drawn(3)
    torch.manual_seed(2)
    again = drawn(3)
    assert first[0] == again[0] != drawn(4)[0] and torch.equal(first[1], again[1])
    assert set(first[0]) <= set(initializer.vocabulary()) and len(set(first[0])) > 15


def test_given_is_the_concepts_word():
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32, initializer_token="corgi dog")
    assert initializer.words("given", small.models(), concept, world_clip.CHOICE, None, Context()) == "corgi dog"


def test_every_strategy_gives_a_word_to_start_from(shelf, few):
    concept = Concept(images=world_clip.tensors(world_clip.pictures()), resolution=32)
    for strategy in initializer.STRATEGIES:
        generator = torch.Generator().manual_seed(0)
        word = initializer.words(strategy, small.models(), concept, world_clip.CHOICE, generator, context(shelf))
        assert len(bundled_words()(word)) == 1 and isinstance(word, str)


def test_what_was_found_is_kept_by_images_and_weights(shelf, few, tmp_path, monkeypatch):
    images, cats = (world_clip.tensors(world_clip.pictures(thing)) for thing in ("dog", "cat"))
    made, here = small.models(), context(shelf, tmp_path / "cache")
    found = initializer.ranking(made, images, world_clip.CHOICE, here)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_size < 4096
    monkeypatch.setattr(initializer, "word_scores", lambda *given: pytest.fail("scored again"))
    assert initializer.ranking(made, images, world_clip.CHOICE, here) == found
    for changed in (cats, images[:1]):
        with pytest.raises(pytest.fail.Exception):
            initializer.ranking(made, changed, world_clip.CHOICE, here)
    with torch.no_grad():
        next(shelf.load(world_clip.CHOICE).module.parameters()).add_(1)
    with pytest.raises(pytest.fail.Exception):
        initializer.ranking(made, images, world_clip.CHOICE, here)
    shelf.clear()


@pytest.mark.parametrize(
    "contents",
    ["", "{", "[]", '{"best": [], "worst": []}', '{"best": [{"word": "<evil>", "id": 3}], "worst": [{}]}',
     '{"best": [{"word": [], "id": 3}], "worst": []}', '{"best": 3}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_is_made_again(shelf, few, tmp_path, contents):
    images, made, here = world_clip.tensors(world_clip.pictures()), small.models(), context(shelf, tmp_path)
    found = initializer.ranking(made, images, world_clip.CHOICE, here)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(contents)
    assert initializer.ranking(made, images, world_clip.CHOICE, here) == found
    assert json.loads(file.read_text()) == json.loads(whole)


def test_a_disk_without_room_costs_nothing(shelf, few, tmp_path):
    (tmp_path / "file").write_text("")
    images, made, here = world_clip.tensors(world_clip.pictures()), small.models(), context(shelf, tmp_path / "file")
    assert initializer.ranking(made, images, world_clip.CHOICE, here)["best"][0].word == "dog"


def test_textual_inversion_starts_from_it(shelf, few):
    """The word's vector, before the first step, is the chosen word's row; and the training is told."""
    from personalize.trainers.recipes.textual_inversion import TextualInversion

    concept = Concept(images=world_clip.tensors(world_clip.pictures()), resolution=32, initializer_token="corgi")
    clip = {"clip_model": world_clip.CHOICE.clip_model, "clip_weights": world_clip.CHOICE.clip_weights}
    rows = {}
    for strategy in initializer.STRATEGIES:
        made, said = small.models(), []
        here = Context(extractors=shelf, notice=said.append)
        recipe = TextualInversion(initializer_strategy=strategy, views=2, **clip)
        stage = next(recipe.stages(made, concept, torch.Generator().manual_seed(0), here))
        (rows[strategy],) = stage.parameters()[0].detach()
        table = made.text_encoders[0].embedding.table
        word = said[-1].split()[-1] if strategy != "given" else "corgi"
        assert torch.equal(rows[strategy], table[bundled_words()(word)[0]])
        assert (recipe.clip == world_clip.CHOICE) if strategy in ("best", "worst") else recipe.clip is None
    assert torch.equal(rows["best"], table[bundled_words()("dog")[0]])
    given, best, worst = (rows[strategy] for strategy in ("given", "best", "worst"))
    assert not torch.equal(best, worst) and not torch.equal(best, given)
