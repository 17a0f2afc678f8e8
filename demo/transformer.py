"""The demo's second model: a tiny flow-matching transformer in Z-Image's layout (NextDiT), same latents, same text.

Its names and shapes are those of ComfyUI's NextDiT, which loads and draws with the weights. What stands here is the
same network in plain functions for the training, quick on a processor; a test compares the two. The text encoder is
the demo's, frozen: its hidden states take the place of Qwen's. Like Z-Image it predicts the velocity noise - image
between the image (sigma 0) and noise (sigma 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .latents import CHANNELS, to_tiles
from .sample import sheet
from .text import END, WIDTH
from .world import TILES

# 7.3 million values. Z-Image's modulation reads 256 values, so no smaller width fits its layout.
DIM, INNER, LAYERS, HEADS, PATCH = 256, 512, 6, 8, 2
# Channels of one head that turn with the token's place: in the caption, down and across the image.
AXES, THETA = (8, 12, 12), 256.0
# Captions are filled with one learned row up to a multiple of this many tokens, as in Z-Image.
FILL = 32
# Noise levels move towards noise by this factor, in training and in sampling: sigma = shift u / (1 + (shift - 1) u).
SHIFT = 1.5
# Rotary embedding turns neighbouring channels; in this order a head's two halves turn, which is the quicker way.
HALVES = torch.cat([torch.arange(0, DIM // HEADS, 2), torch.arange(1, DIM // HEADS, 2)])


def shifted(u):
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def _block_shapes(modulated: bool) -> dict:
    shapes = {
        "attention.qkv.weight": (3 * DIM, DIM),
        "attention.out.weight": (DIM, DIM),
        "attention.q_norm.weight": (DIM // HEADS,),
        "attention.k_norm.weight": (DIM // HEADS,),
        "feed_forward.w1.weight": (INNER, DIM),
        "feed_forward.w2.weight": (DIM, INNER),
        "feed_forward.w3.weight": (INNER, DIM),
    }
    shapes |= {f"{name}.weight": (DIM,) for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")}
    if modulated:
        shapes |= {"adaLN_modulation.0.weight": (4 * DIM, 256), "adaLN_modulation.0.bias": (4 * DIM,)}
    return shapes


def shapes() -> dict:
    """The shape of every weight by its name in ComfyUI's NextDiT."""
    values = {
        "x_embedder.weight": (DIM, PATCH * PATCH * CHANNELS),
        "x_embedder.bias": (DIM,),
        "x_pad_token": (1, DIM),
        "cap_pad_token": (1, DIM),
        "cap_embedder.0.weight": (WIDTH,),
        "cap_embedder.1.weight": (DIM, WIDTH),
        "cap_embedder.1.bias": (DIM,),
        "t_embedder.mlp.0.weight": (DIM, 256),
        "t_embedder.mlp.0.bias": (DIM,),
        "t_embedder.mlp.2.weight": (256, DIM),
        "t_embedder.mlp.2.bias": (256,),
        "final_layer.adaLN_modulation.1.weight": (DIM, 256),
        "final_layer.adaLN_modulation.1.bias": (DIM,),
        "final_layer.linear.weight": (PATCH * PATCH * CHANNELS, DIM),
        "final_layer.linear.bias": (PATCH * PATCH * CHANNELS,),
    }
    blocks = {"noise_refiner.0.": True, "context_refiner.0.": False} | {f"layers.{i}.": True for i in range(LAYERS)}
    for place, modulated in blocks.items():
        values |= {place + name: shape for name, shape in _block_shapes(modulated).items()}
    return values


def untrained_transformer() -> dict:
    """Weights by name; modulation and the output begin at zero, so the first prediction is zero."""
    weights = {}
    for name, shape in shapes().items():
        weight = weights[name] = nn.Parameter(torch.zeros(shape))
        if name.endswith("pad_token"):
            nn.init.normal_(weight, std=0.02)
        elif "norm" in name or name == "cap_embedder.0.weight":
            nn.init.ones_(weight)
        elif len(shape) == 2 and "adaLN" not in name and "final" not in name:
            nn.init.xavier_uniform_(weight)
    return weights


def _linear(x, weights: dict, place: str):
    return F.linear(x, weights[place + ".weight"], weights[place + ".bias"])


def _norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def _turn(x, cosine, sine):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def _heads(x, weight, scale, turn):
    """[N, heads, T, channels] of one projection, normalised and turned to its places."""
    head = DIM // HEADS
    rows = weight.view(HEADS, head, DIM)[:, HALVES].flatten(0, 1)
    return _turn(_norm(F.linear(x, rows).unflatten(-1, (HEADS, head)), scale[HALVES]).transpose(1, 2), *turn)


def attention(x, weights, turn):
    """Self-attention over all tokens [N, T, 256]. Written out: the fused backward pass in bf16 is ten times slower."""
    query, key, value = weights["attention.qkv.weight"].chunk(3)
    query = _heads(x, query, weights["attention.q_norm.weight"], turn) * (DIM // HEADS) ** -0.5
    key = _heads(x, key, weights["attention.k_norm.weight"], turn)
    value = F.linear(x, value).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    mixed = (query @ key.transpose(-1, -2)).softmax(-1) @ value
    return F.linear(mixed.transpose(1, 2).flatten(2), weights["attention.out.weight"])


def block(x, weights: dict, turn, condition=None):
    """One transformer block on tokens [N, T, 256]; condition [N, 256] scales and gates it where the block has that."""
    if condition is None:
        scale, gate = (0, 0), (1, 1)
    else:
        change = _linear(condition, weights, "adaLN_modulation.0")
        first, gate_first, second, gate_second = change[:, None].chunk(4, -1)
        scale, gate = (first, second), (gate_first.tanh(), gate_second.tanh())
    inside = attention(_norm(x, weights["attention_norm1.weight"]) * (1 + scale[0]), weights, turn)
    x = x + gate[0] * _norm(inside, weights["attention_norm2.weight"])
    inside = _norm(x, weights["ffn_norm1.weight"]) * (1 + scale[1])
    inside = F.silu(F.linear(inside, weights["feed_forward.w1.weight"])) * F.linear(
        inside, weights["feed_forward.w3.weight"]
    )
    return x + gate[1] * _norm(F.linear(inside, weights["feed_forward.w2.weight"]), weights["ffn_norm2.weight"])


def turns(places: torch.Tensor, dtype) -> tuple:
    """Cosine and sine [T, 16] of the angles of places [T, 3]."""
    angles = []
    for axis, size in enumerate(AXES):
        speed = THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles.append(places[:, axis, None].double() * speed)
    angles = torch.cat(angles, -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def time_values(sigmas: torch.Tensor) -> torch.Tensor:
    """Sinusoidal embedding [N, 256] of the time 1000 (1 - sigma)."""
    speed = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = 1000 * (1 - sigmas.float())[:, None] * speed
    return torch.cat([angles.cos(), angles.sin()], -1)


def _of(weights: dict, place: str) -> dict:
    return {name.removeprefix(place): value for name, value in weights.items() if name.startswith(place)}


def caption_tokens(weights: dict, context, lengths):
    """Tokens [N, T, 256] of context [N, T0, 128] with lengths [N]; T is the next multiple of FILL."""
    filled = -(-context.shape[1] // FILL) * FILL
    context = F.pad(context, (0, 0, 0, filled - context.shape[1]))
    embedded = _linear(_norm(context, weights["cap_embedder.0.weight"]), weights, "cap_embedder.1")
    inside = torch.arange(filled)[None] < lengths[:, None]
    return torch.where(inside[..., None], embedded, weights["cap_pad_token"])


def velocity(weights: dict, noisy, sigmas, context, lengths, block=block, dtype=torch.bfloat16):
    """Velocity [N, 4, H, W] of noisy [N, 4, H, W] at sigmas [N], for context [N, T, 128] of which lengths [N] count.

    block is the function above or its compiled form. The result is float32, whatever dtype the network computes in.
    """
    weights = {name: value.to(dtype) for name, value in weights.items()}
    count, _, height, width = noisy.shape
    rows, columns = height // PATCH, width // PATCH
    condition = _linear(time_values(sigmas).to(dtype), weights, "t_embedder.mlp.0")
    condition = _linear(F.silu(condition), weights, "t_embedder.mlp.2")

    text = caption_tokens(weights, context.to(dtype), lengths)
    places = torch.zeros(text.shape[1], 3)
    places[:, 0] = torch.arange(text.shape[1]) + 1
    words = turns(places, dtype)
    text = block(text, _of(weights, "context_refiner.0."), words)

    patches = noisy.to(dtype).view(count, CHANNELS, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3)
    image = _linear(patches.flatten(1, 2), weights, "x_embedder")
    places = torch.cartesian_prod(torch.tensor([text.shape[1] + 1]), torch.arange(rows), torch.arange(columns))
    tiles = turns(places, dtype)
    image = block(image, _of(weights, "noise_refiner.0."), tiles, condition)

    tokens, turn = torch.cat([text, image], 1), tuple(map(torch.cat, zip(words, tiles)))
    for layer in range(LAYERS):
        tokens = block(tokens, _of(weights, f"layers.{layer}."), turn, condition)
    scale = _linear(F.silu(condition), weights, "final_layer.adaLN_modulation.1")
    image = F.layer_norm(tokens[:, text.shape[1] :], (DIM,), eps=1e-6) * (1 + scale[:, None])
    image = _linear(image, weights, "final_layer.linear").float()
    image = image.view(count, rows, columns, PATCH, PATCH, CHANNELS).permute(0, 5, 1, 3, 2, 4)
    return -image.reshape(noisy.shape)


class Captions:
    """Captions to the text encoder's hidden states [N, T, 128] and their numbers of tokens [N], end token included."""

    def __init__(self, text, words):
        self.text, self.words = text, words

    @torch.no_grad()
    def __call__(self, captions: list, rng=None) -> tuple:
        ids = self.words.encode(captions, rng, strange=0.05 if rng else 0.0, full=False)[:, :FILL]
        ids[:, -1] = self.words.compact[END]
        lengths = (ids == self.words.compact[END]).int().argmax(1) + 1
        return self.text(ids).last_hidden_state, lengths


@torch.no_grad()
def sample(weights, context, empty, seeds, steps: int = 25, guidance: float = 3.0):
    """uint8 tiles [N, 16, 16, 3] by Euler steps; context is ([N, T, 128], lengths [N]), empty the same for ""."""
    noise = [torch.randn(CHANNELS, TILES, TILES, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents, sigmas = torch.stack(noise), shifted(torch.linspace(1, 0, steps + 1))
    for here, there in zip(sigmas[:-1], sigmas[1:]):
        at = here.expand(len(latents))
        full, none = velocity(weights, latents, at, *context), velocity(weights, latents, at, *empty)
        latents = latents + (there - here) * (none + guidance * (full - none))
    return to_tiles(latents).numpy()


def prompt_sheet(weights, encoded, prompts, seeds: int = 2):
    """A grid of the prompts (columns) by seeds (rows); encoded turns a list of captions into (context, lengths)."""
    everything = [prompt for _ in range(seeds) for prompt in prompts]
    numbers = [seed for seed in range(seeds) for _ in prompts]
    return sheet(sample(weights, encoded(everything), encoded([""] * len(everything)), numbers), len(prompts))
