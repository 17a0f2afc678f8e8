"""`Models` from a single-file SD 1.x, SD 2.x or SDXL checkpoint in safetensors, without the host.

For the command line, benchmarks and tests. Inside ComfyUI the weights come down the graph instead.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .autoencoder import build_vae
from .diffusion import Models, build_unet
from .families import SD1, SD2, SDXL, Family
from .text_encoder import TextEncoder, build_text_encoder
from .tokenizer import END, Tokenizer, bundled_words

UNET, VAE = "model.diffusion_model.", "first_stage_model."
HEAD_SIZE = 64  # of CLIP-L, OpenCLIP-H and OpenCLIP-bigG alike

SD1_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
    "use_linear_in_transformer": False,
}
SD2_UNET = {
    **SD1_UNET,
    "num_heads": -1,
    "num_head_channels": 64,
    "context_dim": 1024,
    "use_linear_in_transformer": True,
}
SDXL_UNET = {
    **SD2_UNET,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "adm_in_channels": 2816,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of a family's files."""

    family: Family
    unet: dict  # the U-Net's configuration in LDM's words
    text_encoders: tuple[str, ...]  # prefixes of their keys; OpenCLIP's names follow those that end with "model."


LAYOUTS = (
    Layout(family=SD1, unet=SD1_UNET, text_encoders=("cond_stage_model.transformer.",)),
    Layout(family=SD2, unet=SD2_UNET, text_encoders=("cond_stage_model.model.",)),
    Layout(
        family=SDXL,
        unet=SDXL_UNET,
        text_encoders=("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    ),
)


def load_models(path: str | Path, unet_config: dict | None = None, heads: int | None = None) -> Models:
    """Read a checkpoint; its family and prediction type follow from its keys.

    Args:
        unet_config: the U-Net's layout in LDM's words; by default the family's.
        heads: attention heads of every text encoder; by default one per 64 of its width.

    Raises:
        ValueError: the file is not an SD 1.x, SD 2.x or SDXL checkpoint that can be trained.
    """
    try:
        return _models(load_file(path), unet_config, heads)
    except SafetensorError as error:
        reason = f"it is not a safetensors file ({error})"
    except ValueError as error:
        reason = str(error).rstrip(".")
    raise ValueError(f"{Path(path).name} cannot be trained: {reason}.")


def _models(state: dict[str, Tensor], unet_config: dict | None, heads: int | None) -> Models:
    layout = find_layout(state)
    prediction_type, alphas_cumprod = schedule(state)
    encode_images, decode_latents = build_vae(_part(state, VAE), layout.family.latent_scale)
    return Models(
        family=layout.family,
        text_encoders=tuple(
            text_encoder(_part(state, prefix), layout.family, heads, open_clip=prefix.endswith("model."))
            for prefix in layout.text_encoders
        ),
        unet=_unet(_part(state, UNET), unet_config or layout.unet, layout.family),
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        encode_images=encode_images,
        decode_latents=decode_latents,
    )


def find_layout(state: dict[str, Tensor]) -> Layout:
    """Return the layout whose keys a file has.

    Raises:
        ValueError: it is none of these, or a relative that cannot be trained.
    """

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in state)

    if any("lora" in key for key in state):
        raise ValueError("it is a LoRA, not a whole model")
    first = state.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        raise ValueError("it has no U-Net of SD 1.x, SD 2.x or SDXL")
    if first.shape[1] != 4:
        raise ValueError(f"its U-Net reads {first.shape[1]} channels instead of 4, as for inpainting and editing")
    if "edm_mean" in state or "edm_vpred.sigma_max" in state:
        raise ValueError("its noise schedule is EDM's")
    layout = next((layout for layout in LAYOUTS if all(map(has, layout.text_encoders))), None)
    if layout is None:
        raise ValueError("it lacks the text encoders of SD 1.x, SD 2.x or SDXL, as SDXL's refiner does")
    if not has(VAE):
        raise ValueError("it lacks the autoencoder")
    return layout


def _unet(state: dict[str, Tensor], config: dict, family: Family) -> nn.Module:
    try:
        return build_unet(state, config)
    except (KeyError, RuntimeError):  # a key that diffusers' converter misses, or a shape that does not fit
        raise ValueError(f"its U-Net is not {family.name}'s") from None


def schedule(state: dict[str, Tensor]) -> tuple[str, Tensor]:
    """Return prediction type and cumulative alphas, from the keys and, for SD 2.x, one of the weights."""
    # No key distinguishes SD 2.x from SD 2.x-base. ComfyUI's criterion: training on v makes this bias ten times wider.
    bias = state.get(f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias")
    is_sd2 = any(key.startswith("cond_stage_model.model.") for key in state)
    wide = is_sd2 and bias is not None and bias.float().std(unbiased=False) > 0.09
    if not wide and "v_pred" not in state:
        return "epsilon", scaled_linear()
    return "v_prediction", zero_terminal_snr(scaled_linear()) if "ztsnr" in state else scaled_linear()


def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """Return Stable Diffusion's cumulative alphas `[steps]`: betas evenly spaced in their square root."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return _rounded(torch.cumprod(1 - betas, dim=0))


def _rounded(alphas_cumprod: Tensor) -> Tensor:
    """Round as in ComfyUI, which stores sigmas in float32: a run from a file then equals the graph's, bit for bit."""
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()
    return (1 / (sigmas.double() ** 2 + 1)).float()


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale cumulative alphas `[T]` to end in pure noise (arXiv 2305.08891, algorithm 1).

    The last one is ComfyUI's tiny number instead of 0, so that its sigma is finite.
    """
    roots = alphas_cumprod.double().sqrt()
    alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    alphas[-1] = 4.8973451890853435e-08
    return alphas.float()


def text_encoder(state: dict[str, Tensor], family: Family, heads: int | None, *, open_clip: bool) -> TextEncoder:
    """Build one of a family's text encoders from its part of a file, without the prefix."""
    state = from_open_clip(state) if open_clip else _nested(state)
    width = state["text_model.final_layer_norm.weight"].shape[0]
    module = build_text_encoder(
        state, heads=heads or width // HEAD_SIZE, activation="gelu" if open_clip else "quick_gelu"
    )
    projection = state.get("text_projection.weight") if family.pooled and open_clip else None
    if family.pooled and open_clip and projection is None:
        raise ValueError("it lacks its text encoder's text_projection")
    return TextEncoder(
        module,
        Tokenizer(bundled_words(), pad_token_id=0 if open_clip else END),
        family.layer,
        final_norm=family.final_norm,
        projection=None if projection is None else projection.float(),
    )


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert OpenCLIP's names and joined projections to transformers', by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    # It drops the last layer of what has SD 2's own prefix, because diffusers never reads it. The host keeps it.
    prefix, width = "open_clip.", state["ln_final.weight"].shape[0]
    config = SimpleNamespace(hidden_size=width, projection_dim=width)
    prefixed = {prefix + key: value for key, value in state.items()}
    return convert_open_clip_checkpoint(SimpleNamespace(config=config), prefixed, prefix=prefix)


def _nested(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the prefix `text_model.` that old SD 1.x files leave out."""
    if any(key.startswith("text_model.") for key in state):
        return state
    return {f"text_model.{key}": value for key, value in state.items()}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
