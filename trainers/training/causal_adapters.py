"""Causality-preserved adapters: low-rank layers that act from the placeholder token on, and nowhere before it.

TextBoost, arXiv 2409.08248v2: `y = W x + m * up(down(x))` with m = 1 at the first position of the token and at every
later one up to the end token, else 0. CLIP's attention is causal, so what stands before the token is encoded exactly
as by the frozen model, and so is a prompt without the token.
"""

import torch
from torch import Generator, Tensor, nn

from ..models.diffusion import Models
from ..models.text_encoder import Subject


class LowRank(nn.Module):
    """`up @ down @ x` with `down [r, in]` and `up [out, r]`."""

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.to(x).T @ self.up.to(x).T


class CausalLinear(nn.Module):
    """A frozen linear layer of a text encoder with its adapter: `y = W x + m * adapter(x)`."""

    def __init__(self, base: nn.Module, adapter: LowRank, subject: Subject):
        super().__init__()
        self.base, self.adapter = base, adapter
        self.subject = subject

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + _mask(self.subject).to(x) * self.adapter(x)


def _mask(subject: Subject) -> Tensor:
    assert subject.mask is not None  # an encoder finds it in its ids, and the U-Net gets that of its encoding
    return subject.mask


def add_adapters(
    models: Models, placeholder: str, encoders: slice, rank: int, generator: Generator, cross_attention: bool
) -> list[nn.Parameter]:
    """Add adapters to `fc2` of every MLP that the output depends on, and for TextBoost++ to every cross-attention.

    With those of the cross-attentions the last MLP has none, as layer 22 of SD 2.1 in the authors' code.

    They start as `down ~ normal(0, 1 / r)` and `up = 0`, or as those that the token learned earlier in the graph.

    Args:
        encoders: the text encoders that get them; all of them must have the token `placeholder` already.
        cross_attention: also add `H_l = H + m * A_l(H)` before keys and values of each layer l (TextBoost++).

    Returns:
        The adapters' parameters.
    """
    subject = models.follow(placeholder)
    known, added = models.known_adapters.get(placeholder, {}), nn.ModuleList()

    def new(name: str, inputs: int, outputs: int, device: torch.device) -> LowRank:
        down, up = known.get(f"{name}.down"), known.get(f"{name}.up")
        if down is None or up is None or down.shape != (rank, inputs) or up.shape != (outputs, rank):
            down, up = torch.randn(rank, inputs, generator=generator) / rank, torch.zeros(outputs, rank)
        adapter = LowRank(down.clone().to(device), up.clone().to(device))
        added.append(adapter)
        return adapter

    for i in range(len(models.text_encoders))[encoders]:
        encoder = models.text_encoders[i]
        for path in encoder.layers_read[: -1 if cross_attention else None]:
            mlp = encoder.text_model.get_submodule(path).mlp
            name = f"text_encoders.{i}.{path}.mlp.fc2"
            adapter = new(name, mlp.fc2.in_features, mlp.fc2.out_features, encoder.device)
            mlp.fc2 = CausalLinear(mlp.fc2, adapter, subject)
    for path, attention in _cross_attentions(models.unet) if cross_attention else ():
        width = attention.to_k.in_features
        attention.context_adapter = new(f"unet.{path}", width, width, models.device)
        attention.register_forward_pre_hook(_adapted(attention.context_adapter, subject), with_kwargs=True)
    return list(added.parameters())


def _cross_attentions(unet: nn.Module):
    return [(path, module) for path, module in unet.named_modules() if path.endswith(".attn2")]


def _adapted(adapter: LowRank, subject: Subject):
    """Return a hook that lets a cross-attention read `H + m * A(H)` instead of the prompt's states H."""

    def hook(module, args, kwargs):
        states = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": states + _mask(subject).to(states) * adapter(states)}

    return hook


def tensors(models: Models) -> dict[str, Tensor]:
    """Return the adapters in `models` as `<name>.down` and `<name>.up`, on the CPU."""
    roots = {f"text_encoders.{i}": encoder.text_model for i, encoder in enumerate(models.text_encoders)}
    found: dict[str, Tensor] = {}
    for root, module in {**roots, "unet": models.unet}.items():
        for path, layer in module.named_modules():
            if isinstance(layer, LowRank):
                name = f"{root}.{path.removesuffix('.adapter').removesuffix('.context_adapter')}"
                found |= {f"{name}.{part}": getattr(layer, part).detach().float().cpu() for part in ("down", "up")}
    return found
