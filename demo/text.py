"""Words of the demo world as token ids, and the shape of the tiny text encoder.

Training uses a compact vocabulary: only the tokens that captions can use have trained rows; a few more ids stand for
strangers, words that the world never uses, whose rows are drawn again at every step (so that an unknown word before
"dog" does no harm later). build.py puts the trained rows back into the full table of 49408. The tokenizer is the
standard one of CLIP, from a folder.
"""

import re

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import every_word
from .world import SUBJECTS

START, END, POSITIONS = 49406, 49407, 77
STRANGERS = 32
ROW_STD = 0.09
WIDTH, LAYERS, HEADS, INNER = 128, 3, 4, 512
WORD = re.compile(r"[a-z]+|[^\sa-z]+")


class Vocabulary:
    """Captions to compact ids. tokens lists the token id of every compact id below the strangers'."""

    def __init__(self, tokenizer_folder: str):
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
        self.known = {}
        ids = {token for word in set(WORD.findall(every_word() + ",")) for token in self._ids(word)}
        self.tokens = sorted(ids | {START, END})
        self.compact = {token: index for index, token in enumerate(self.tokens)}
        self.size = len(self.tokens) + STRANGERS

    def _ids(self, word: str) -> list:
        if word not in self.known:
            self.known[word] = self.tokenizer(word, add_special_tokens=False).input_ids
        return self.known[word]

    def _row(self, caption: str, rng, strange: float) -> list:
        row = [self.compact[START]]
        for word in WORD.findall(caption):
            chance = rng.random() if strange and word in SUBJECTS else 1
            if chance < strange:
                row.append(len(self.tokens) + rng.randrange(STRANGERS))
            if chance >= strange / 4:
                row.extend(self.compact[token] for token in self._ids(word))
        return row[: POSITIONS - 1]

    def encode(self, captions: list, rng=None, strange: float = 0.0, full: bool = True) -> torch.Tensor:
        """Compact ids [N, 77], padded with the end token; only as long as the longest caption needs unless full."""
        rows = [self._row(caption, rng, strange) for caption in captions]
        length = POSITIONS if full else min(POSITIONS, max(map(len, rows)) + 2)
        end = self.compact[END]
        return torch.tensor([row + [end] * (length - len(row)) for row in rows])


def text_encoder(rows: int) -> CLIPTextModel:
    """An untrained text encoder with the given number of token rows."""
    shape = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER)
    config = CLIPTextConfig(vocab_size=rows, max_position_embeddings=POSITIONS, hidden_act="quick_gelu", **shape)
    model = CLIPTextModel(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=ROW_STD)
    return model


@torch.no_grad()
def new_strangers(model: CLIPTextModel):
    """Draws the strangers' rows again, as strong as the trained rows are on average."""
    table = model.get_input_embeddings().weight
    table[-STRANGERS:] = torch.randn(STRANGERS, WIDTH) * table[:-STRANGERS].std()


def at_end(hidden: torch.Tensor, ids: torch.Tensor, end: int) -> torch.Tensor:
    """The hidden state at the first end token, [N, WIDTH]."""
    return hidden[torch.arange(len(ids)), (ids == end).int().argmax(1)]
