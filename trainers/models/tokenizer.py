"""CLIP's tokenizer plus placeholder tokens: prompts to ids, without embedding vectors."""

import re
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..text import any_of

START, END = 49406, 49407  # CLIP's <|startoftext|> and <|endoftext|>
LENGTH = 77
ROOM = LENGTH - 2  # tokens of a prompt between the start and the end token


class Tokenizer:
    """Maps prompts to ids `[n, 77]`, where a placeholder stands for one or more rows behind the vocabulary.

    Args:
        encode_words: text to CLIP byte-pair ids, without start, end or padding.
        vocab_size: number of rows in the model's own embedding table; the first new row gets this id.
        pad_token_id: what fills a prompt up to 77 (the end token for CLIP-L, 0 for OpenCLIP's encoders).
    """

    def __init__(self, encode_words: Callable[[str], list[int]], vocab_size: int = 49408, pad_token_id: int = END):
        self.encode_words = encode_words
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.placeholders: dict[str, list[int]] = {}

    def add_placeholder(self, token: str, vectors: int) -> list[int]:
        """Reserve `vectors` new ids for `token`; wherever a prompt has it as a word, exactly these ids appear."""
        first = self.vocab_size + sum(map(len, self.placeholders.values()))
        self.placeholders[token] = list(range(first, first + vectors))
        return self.placeholders[token]

    def words(self, text: str) -> list[int]:
        """Return ids of `text` alone, placeholders expanded, without start, end or padding."""
        if not self.placeholders:
            return list(self.encode_words(text))
        pieces = re.split(f"({any_of(self.placeholders)})", text)
        return [i for piece in pieces for i in self.placeholders.get(piece) or self.encode_words(piece)]

    def __call__(self, prompts: list[str]) -> Tensor:
        """Return ids `[len(prompts), 77]`; what does not fit into 75 tokens is cut off."""
        return torch.tensor([self._padded(self.words(prompt)) for prompt in prompts], dtype=torch.long)

    def _padded(self, ids: list[int]) -> list[int]:
        ids = [START, *ids[:ROOM], END]
        return ids + [self.pad_token_id] * (LENGTH - len(ids))


@lru_cache(maxsize=1)
def bundled_words() -> Callable[[str], list[int]]:
    """Return CLIP's byte-pair encoding, from the vocabulary in open_clip's package: nothing is downloaded."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer().encode
