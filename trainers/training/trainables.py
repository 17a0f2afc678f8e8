"""Trainable parts: embedding rows of new tokens, LoRA layers, selected weights. Everything else stays frozen."""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..models.diffusion import Models
from ..models.flow import is_linear
from ..models.text_encoder import TextEncoder
from ..models.tokenizer import START, Tokenizer
from ..text import quoted

MOST_VECTORS = 16  # of the 75 tokens of a prompt
ATTENTION = ("*attn*", "*attention*", "*single_blocks.*.linear[12]")


class TokenEmbedding(nn.Module):
    """A frozen embedding table with a small trainable `rows` behind it.

    Ids below `len(table)` read the table, the others read `rows`. Because the table is no parameter of the
    optimizer, neither a gradient nor weight decay can ever reach it.
    """

    table: Tensor

    def __init__(self, table: Tensor, rows: Tensor):
        super().__init__()
        self.register_buffer("table", table.detach(), persistent=False)
        self.rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """Frozen table, under the name that it has in `nn.Embedding`."""
        return self.table

    def forward(self, input_ids: Tensor) -> Tensor:
        vocabulary = len(self.table)
        known = F.embedding(input_ids.clamp(max=vocabulary - 1), self.table)
        new = F.embedding((input_ids - vocabulary).clamp(min=0), self.rows)
        return torch.where((input_ids >= vocabulary)[..., None], new.to(known.dtype), known)


def add_tokens(encoder: TextEncoder, initializers: Iterable[tuple[str, str]], most: int = 0) -> TokenEmbedding:
    """Add tokens to a text encoder, each with one row per token of its initializer, and return their embedding.

    A token that was learned earlier in the graph starts from its learned rows instead.

    Args:
        initializers: pairs of placeholder and initializer, such as `("<dog>", "corgi dog")` (two rows).
        most: rows of a token at most, from the first tokens of its initializer; 0 for all.

    Raises:
        ValueError: a placeholder that is taken, empty or a word of the vocabulary, or an initializer without a token.
    """
    tokenizer, table = encoder.tokenizer, encoder.embedding.weight
    rows = []
    for token, initializer in initializers:
        check_placeholder(tokenizer, token)
        ids = initializer_ids(tokenizer, initializer)
        if not ids:
            raise ValueError(
                f"The initializer of {token} is empty: write a word of the vocabulary, such as its class word."
            )
        learned = encoder.known_tokens.get(token)
        rows.append(table[ids[: most or None]].detach().clone() if learned is None else learned.to(table))
        tokenizer.add_placeholder(token, len(rows[-1]))
    embedding = TokenEmbedding(table, torch.cat(rows).float())
    encoder.set_embedding(embedding)
    return embedding


def initializer_ids(tokenizer: Tokenizer, words: str) -> list[int]:
    """Return the rows of the vocabulary that a placeholder token starts from: those of words, and 42170 for `id:42170`.

    Some rows cannot be written: `ktn` is row 42170, but as text it becomes the two tokens `k` and `tn`.

    Raises:
        ValueError: the vocabulary has no such row.
    """
    ids = []
    for piece in re.split(r"(?<!\S)(id:\d+)(?!\S)", words):
        if not re.fullmatch(r"id:\d+", piece):
            ids += tokenizer.encode_words(piece)
        elif int(piece[3:]) < min(START, tokenizer.vocab_size):
            ids.append(int(piece[3:]))
        else:
            raise ValueError(f"The initializer {quoted(piece)} is not in the vocabulary: use id:0 to id:{START - 1}.")
    return ids


def check_placeholder(tokenizer: Tokenizer, token: str) -> None:
    """Raise `ValueError` unless `token` can become a placeholder."""
    if token in tokenizer.placeholders:
        raise ValueError(f"The placeholder {token} is already taken: choose another name.")
    if len(tokenizer.encode_words(token)) == 1:
        raise ValueError(f"The placeholder {token} is a word of the vocabulary: write it as <{token}>.")


def check_words(tokenizer: Tokenizer, token: str, initializer: str, class_word: str) -> None:
    """Raise `ValueError` unless `token` can become a placeholder of a `class_word` that starts from `initializer`."""
    check_placeholder(tokenizer, token)
    for name, words in (("class word", class_word), ("initializer", initializer)):
        if not any(letter.isalpha() for letter in words):
            raise ValueError(
                f"The {name} {quoted(words)} is not a word: write your subject's class, such as corgi dog."
            )
        if (count := len(initializer_ids(tokenizer, words))) > MOST_VECTORS:
            raise ValueError(f"The {name} has {count} tokens, too many for a prompt: use at most {MOST_VECTORS}.")


def gaussian(noise: Tensor, rank: int) -> Tensor:
    """LoRA's initial A from standard normal noise of its shape: `normal(0, 1 / rank)`, peft's "gaussian"."""
    return noise / rank


def add_lora(
    module: nn.Module,
    targets: list[str],
    rank: int,
    alpha: float,
    generator: Generator,
    rows: slice = slice(None),
    init: Callable[[Tensor, int], Tensor] = gaussian,
) -> list[nn.Parameter]:
    """Add LoRA to every linear layer of `module` whose name ends with one of `targets`.

    Layers that have one keep it. Returns the parameters of all LoRA in `module`, in its own order.

    `y = W x + (alpha / rank) B A x` (arXiv 2106.09685) with A `[rank, in]` of `init` and B `[out, rank]` of zeros.

    Args:
        generator: draws A's noise.
        init: A from standard normal noise and the rank.
        rows: the rows of B that receive a gradient, counted from 0 along its outputs. The others stay exactly zero,
            because weight decay of zero is zero: those outputs stay the base's.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    plain = [name for name, layer in module.named_modules() if is_linear(layer) and ".lora_" not in name]
    targets = [name for name in plain if f".{name}".endswith(tuple(f".{target}" for target in targets))]
    earlier = {name for name, _ in module.named_parameters() if "lora_" in name}
    vars(module).pop("peft_config", None)  # of an earlier call, which peft would warn about
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]  # divides as well
    own = {type(layer) for layer in map(module.get_submodule, targets) if not isinstance(layer, nn.Linear)}
    config._register_custom_module(dict.fromkeys(own, Linear))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # it asks for in_features, which these have
        inject_adapter_in_model(config, module)
    lora = {name: p for name, p in module.named_parameters() if "lora_" in name}
    for name, parameter in lora.items():
        if name in earlier:
            continue
        parameter.data = parameter.data.float()  # the base may be half precision, trained weights are not
        if "lora_A" in name:
            parameter.data.copy_(init(torch.randn(parameter.shape, generator=generator), rank))
        elif rows != slice(None):
            parameter.register_hook(partial(_only_rows, rows))
    return list(lora.values())


def layers(models: Models, patterns: str = "") -> list[str]:
    """Return the names of linear layers in a network's transformer blocks.

    Args:
        patterns: separated by commas, with `*` for anything, such as `*attn*`: only layers that fit one of them, also
            outside of the blocks; empty for all layers of the blocks.

    Raises:
        ValueError: no layer fits.
    """
    linear = [name for name, layer in models.unet.named_modules() if is_linear(layer)]
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if wanted:
        found = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in wanted)]
    else:
        lists = [name for name, part in models.unet.named_children() if isinstance(part, nn.ModuleList)]
        in_blocks = re.compile(r"(^|\.)transformer_blocks\." if "down_blocks" in lists else rf"({'|'.join(lists)})\.")
        found = [name for name in linear if in_blocks.search(name)]
    if not found:
        raise ValueError(
            f"No linear layer of this model fits {quoted(patterns)}: its layers are called such as "
            f"{quoted(linear[len(linear) // 2])}."
        )
    return found


def attention_layers(models: Models) -> list[str]:
    """Return the names of the linear layers of attention in a transformer's blocks.

    Those that have `attn` or `attention` in their path, and the two of each single block of Flux and Chroma, which hold
    attention and feed-forward together. Queries, keys and values may be one layer. Blocks inside of other parts, such
    as those that fuse Krea 2's text, are left alone: their rows are not samples.
    """
    lists = {name for name, part in models.unet.named_children() if isinstance(part, nn.ModuleList)}
    inside = [name for name in layers(models) if name.partition(".")[0] in lists]
    return [name for name in inside if any(fnmatchcase(name, pattern) for pattern in ATTENTION)]


def _only_rows(rows: slice, gradient: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[rows] = gradient[rows]
    return kept


def select(models: Models, pattern: str = "") -> list[nn.Parameter]:
    """Select the U-Net's own weights whose name contains `pattern` for training, in float32, and return them.

    Their initial values are copied to `models.base_weights`, so that the difference can be saved.
    """
    chosen = [(name, p) for name, p in models.unet.named_parameters() if pattern in name and "lora_" not in name]
    for name, parameter in chosen:
        if name not in models.base_weights:
            models.base_weights[name] = parameter.detach().to("cpu", copy=True)
            parameter.data = parameter.data.float()
    return [parameter for _, parameter in chosen]


def not_finite(models: Models) -> str:
    """Return the name of a part of models whose weights contain NaN or infinite values, leaving out what trains."""
    for name, module in [("U-Net", models.unet), *(("text encoder", encoder) for encoder in models.text_encoders)]:
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        if not all(weight.isfinite().all() for weight in frozen):
            return name
    return "" if all(weight.isfinite().all() for weight in models.base_weights.values()) else "U-Net"


def mean_norm(table: Tensor) -> float:
    """Return the mean Euclidean length of a vocabulary's rows."""
    return table.float().norm(dim=-1).mean().item()


@torch.no_grad()
def clamp_norms(rows: Tensor, longest: float) -> None:
    """Scale every row that is longer than `longest` back to that length, in place."""
    rows.mul_((longest / rows.norm(dim=-1, keepdim=True).clamp(min=math.ulp(1.0))).clamp(max=1.0))


def norm_clamp(embeddings: Iterable[TokenEmbedding], limit: float = 0.0) -> Callable[[], None]:
    """Return a function for after each step that scales new rows back to a length of `limit`.

    Args:
        limit: 0 for the mean length of each embedding's vocabulary.
    """
    longest = [(embedding.rows, limit or mean_norm(embedding.table)) for embedding in embeddings]

    def clamp() -> None:
        for rows, length in longest:
            clamp_norms(rows, length)

    return clamp
