"""Placeholder tokens are words of a prompt: neither parts of other words, nor other words."""

import pytest

from personalize.trainers.models.tokenizer import Tokenizer, bundled_words
from personalize.trainers.text import unknown_tokens


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(bundled_words())
    for token in ("007", "<dog>", "<dog>2", "sks"):
        tokenizer.add_placeholder(token, 1)
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a 007 in 2007", ["a", "007", "in 2007"]),
        ("0071 and x007", ["0071 and x007"]),
        ("a 007-like 007's house, 007.", ["a", "007", "-like", "007", "'s house,", "007", "."]),
        ("the <dog>s run to <dog>2", ["the", "<dog>", "s run to", "<dog>2"]),
        ("<dog>21", ["<dog>", "21"]),  # the longer token is no word here
        ("asks sks sksy", ["asks", "sks", "sksy"]),
        ("a_sks sks_a", ["a_sks sks_a"]),
    ],
)
def test_a_placeholder_is_a_word(tokenizer, prompt, pieces):
    ids = [i for piece in pieces for i in tokenizer.placeholders.get(piece) or tokenizer.encode_words(piece)]
    assert tokenizer.words(prompt) == ids


def test_weights_and_what_is_beyond_75_tokens_are_no_part_of_a_prompt_here(tokenizer):
    """As Train's tooltip says of its previews: the graph's own encoder reads `(dog:1.2)` as a weight."""
    ids = tokenizer(["(dog:1.2)", "dog " * 80])
    assert ids[0, 1:8].tolist() == [
        i for piece in ("(", "dog", ":", "1", ".", "2", ")") for i in tokenizer.encode_words(piece)
    ]
    assert ids.shape == (2, 77) and ids[1, 1:76].tolist() == 75 * tokenizer.encode_words("dog")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a <dog> and sks", {}),
        ("a <Dog> dog", {"<Dog>": "<dog>"}),
        ("a SKS", {"SKS": "sks"}),
        ("a <dgo>", {"<dgo>": "<dog>"}),
        ("a dog in 2007, 1 < 2 > 0, <lora:dog:1>", {}),
    ],
)
def test_a_word_that_is_nearly_a_placeholder_is_named(prompt, unknown):
    assert unknown_tokens(prompt, ["<dog>", "sks", "007"]) == unknown
