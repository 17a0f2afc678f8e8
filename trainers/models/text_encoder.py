"""CLIP's text encoder as the host reads it: hidden state, pooled output, fixed outputs, mask of the placeholder token.

This and diffusion.py are the only files with transformers' attribute names.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .tokenizer import END, Tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel


@dataclass(kw_only=True)
class Subject:
    """The placeholder token that adapters follow, and its mask in the current prompts."""

    ids: tuple[int, ...]
    mask: Tensor | None = None  # [n, 77, 1]

    def find(self, input_ids: Tensor) -> Tensor:
        """Set the mask `[n, 77, 1]` for ids `[n, 77]`: 1 from the token to the first end token, else 0.

        What follows the end is padding, whatever it is called: CLIP-L pads with the end token itself.
        """
        words = one_of(input_ids, self.ids)
        ends = input_ids == END
        begun, ended = words.cumsum(dim=1) > 0, ends.cumsum(dim=1) - ends.int() > 0
        self.mask = (begun & ~ended)[..., None].float()
        return self.mask


def one_of(input_ids: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Return a mask of the wanted ids; `torch.isin` would copy those to the device in every step."""
    return torch.stack([input_ids == token for token in wanted]).any(dim=0)


class TextEncoder(nn.Module):
    """CLIP's text model with its tokenizer, read at the layer the host reads it.

    Args:
        layer: `None` for the last hidden state, or a negative index into the hidden states ("clip skip").
        final_norm: whether the final norm follows a hidden state that `layer` chose; it always follows the last.
        projection: of the pooled output `[p, d]`, for an encoder whose pooled output is read.
    """

    projection: Tensor | None

    def __init__(
        self,
        module: "CLIPTextModel",
        tokenizer: Tokenizer,
        layer: int | None = None,
        *,
        final_norm: bool = True,
        projection: Tensor | None = None,
    ):
        super().__init__()
        self.module = module
        self.tokenizer = tokenizer
        self.layer = layer
        self.final_norm = final_norm
        self.register_buffer("projection", projection)
        # Learned earlier in the graph: vectors a placeholder starts from, and outputs that are already fixed.
        self.known_tokens: dict[str, Tensor] = {}
        self.fixed_outputs: Tensor | None = None
        self.subject: Subject | None = None
        self.checkpointing = False

    @property
    def text_model(self) -> "CLIPTextModel":
        """The transformer itself, which transformers 4 nests and 5 does not."""
        return getattr(self.module, "text_model", self.module)

    @property
    def layers_read(self) -> list[str]:
        """Names within `text_model` of the layers that the output depends on; the others would train in name only."""
        unread = 0 if self.layer is None or self.projection is not None else -self.layer - 1
        return [f"encoder.layers.{i}" for i in range(len(self.text_model.encoder.layers) - unread)]

    @property
    def embedding(self) -> nn.Embedding:
        """The table of token embeddings, or what `set_embedding` put in its place."""
        return self.text_model.embeddings.token_embedding

    def set_embedding(self, module: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = module

    @property
    def device(self) -> torch.device:
        return self.text_model.final_layer_norm.weight.device

    def save_memory(self, checkpointing: bool) -> None:
        """Turn gradient checkpointing of every layer on or off; the library's own changes its name between versions."""
        self.checkpointing = checkpointing
        for layer in self.text_model.encoder.layers:
            vars(layer).pop("forward", None)  # back to the class's
            if checkpointing:  # there is no dropout whose random numbers would have to be the same
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return hidden states `[n, 77, d]` for ids `[n, 77]`, and with a projection the pooled output `[n, p]`."""
        if self.subject:
            self.subject.find(input_ids)
        output = self.module(input_ids=input_ids, output_hidden_states=self.layer is not None)
        hidden = output.last_hidden_state if self.layer is None else self._normed(output.hidden_states[self.layer])
        ends = (input_ids == END).int().argmax(dim=1)
        pooled = None if self.projection is None else _pooled(output.last_hidden_state, ends, self.projection)
        if self.fixed_outputs is None:
            return hidden, pooled
        return self._fixed(self.fixed_outputs.to(hidden), input_ids, hidden, pooled)

    def _normed(self, hidden: Tensor) -> Tensor:
        return self.text_model.final_layer_norm(hidden) if self.final_norm else hidden

    def _fixed(
        self, outputs: Tensor, input_ids: Tensor, hidden: Tensor, pooled: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        fixed = outputs[-1 if self.layer is None else self.layer]
        hidden = torch.cat([fixed[:1].expand(len(hidden), -1, -1), hidden[:, 1:]], dim=1)
        empty = input_ids[:, 1] == END
        hidden = torch.where(empty[:, None, None], fixed, hidden)
        if pooled is not None and self.projection is not None:
            last = outputs[-1:] if self.final_norm else self.text_model.final_layer_norm(outputs[-1:])
            first = _pooled(last, torch.ones_like(input_ids[:1, 0]), self.projection)
            pooled = torch.where(empty[:, None], first, pooled)
        return hidden, pooled

    @torch.no_grad()
    def fix_special_outputs(self) -> None:
        """Fix the current outputs of the start token and of the empty prompt.

        `fixed_outputs` holds them for every layer, `[layers + 1, 77, d]`, because a graph may read another one later;
        after the final norm where that follows whatever layer is read.
        """
        if self.fixed_outputs is None:
            output = self.module(input_ids=self.tokenizer([""]).to(self.device), output_hidden_states=True)
            self.fixed_outputs = self._normed(torch.cat(output.hidden_states)).clone()


def build_text_encoder(state: dict[str, Tensor], *, heads: int, activation: str = "quick_gelu") -> nn.Module:
    """Build a frozen `CLIPTextModel` from weights named `text_model.*`, sized by their shapes."""
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix = "text_model."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    vocabulary, width = state["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers.")),
        num_attention_heads=heads,
        max_position_embeddings=len(state["embeddings.position_embedding.weight"]),
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=END,
    )
    with torch.device("meta"):  # no time and no memory for weights that are replaced at once
        model = CLIPTextModel(config)
    text_model = getattr(model, "text_model", model)
    state.pop("embeddings.position_ids", None)  # a buffer that old checkpoints carry
    text_model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    state = {key: value.float() for key, value in state.items()}
    missing, unexpected = text_model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"The weights are not those of a CLIP text model ({len(missing)} missing, {len(unexpected)} unknown): use "
            "another file."
        )
    return model.requires_grad_(False).eval()


def _pooled(last_hidden_state: Tensor, ends: Tensor, projection: Tensor) -> Tensor:
    """Return the last hidden state at each prompt's end token, projected, `[n, p]`."""
    rows = torch.arange(len(ends), device=ends.device)
    return last_hidden_state[rows, ends] @ projection.T
