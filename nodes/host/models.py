"""Identifies a graph's diffusion model: its family, text encoders and prediction type; refuses what does not fit."""

from dataclasses import dataclass

from torch import Tensor

from ...trainers.models import families
from ...trainers.models.families import FAMILIES, FLOW_FAMILIES, SD1, SD2, SDXL, Family
from ...trainers.models.flow import alphas_of
from . import internals

KINDS = {"SD15": SD1, "SD20": SD2, "SDXL": SDXL}  # by the host's classes
# Families that train on the host's own modules; `None` for relatives that read or predict something else.
FLOWS: dict[str, Family | None] = {
    "ZImage": families.ZIMAGE,
    "ZImagePixelSpace": None,
    "Lumina2": families.LUMINA2,
    "QwenImage": families.QWEN_IMAGE,
    "Krea2": families.KREA2,
    "Flux": families.FLUX1,
    "FluxInpaint": None,
    "Flux2": families.FLUX2,
    "SD3": families.SD3,
    "Chroma": families.CHROMA,
    "ChromaRadiance": None,
}

# The host derives them from SDXL, but their U-Nets are pruned unevenly.
UNEVEN = ("SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B")
NAMES = {
    "SD15": SD1.name,
    "SD20": SD2.name,
    "SDXL": SDXL.name,
    "SSD1B": "SSD-1B",
    "Segmind_Vega": "Segmind Vega",
}  # where the name of the host's class says less


def family_of(model, clip=None) -> Family:
    """Return the family of a MODEL and its CLIP.

    Raises:
        ValueError: the MODEL cannot be trained, or the CLIP is of another family.
    """
    config = model.model.model_config
    family = _family(config)
    if clip is not None and family in FAMILIES:
        _check_clip(clip, family, config.unet_config["context_dim"])
    return family


def _family(config) -> Family:
    """Return the family; refuse variants with more inputs than noisy latents (inpainting, depth, unCLIP), too."""
    unet, name = config.unet_config, type(config).__name__
    if flow := _flow_family(config):
        return flow
    known = (
        None
        if name in UNEVEN
        else next((f for kind, f in KINDS.items() if isinstance(config, getattr(internals, kind))), None)
    )
    if known and unet.get("in_channels") == 4 and (unet.get("adm_in_channels") is not None) == known.pooled:
        return known
    kind = NAMES.get(name, name)
    if known and unet.get("in_channels") != 4:
        kind += f" with {unet.get('in_channels')} input channels"
    *first, last = (family.name for family in (*FAMILIES, *FLOW_FAMILIES))
    ours = f"{', '.join(first)} and {last}"
    raise ValueError(f"This model is {kind}, but only plain {ours} models can be trained: load one of those.")


def _flow_family(config) -> Family | None:
    """Return the family of a transformer that trains by flow matching; `None` for others and for its relatives."""
    names = [kind.__name__ for kind in type(config).__mro__]
    family = next((FLOWS[name] for name in names if name in FLOWS), None)
    inputs, outputs = (config.unet_config.get(f"{way}_channels") for way in ("in", "out"))
    more_inputs = family in (families.FLUX1, families.SD3) and inputs != outputs  # as for inpainting or depth
    return None if more_inputs else family


def encoder_names(clip) -> list[str]:
    """Return the host's names of a CLIP's text encoders, in the order in which the U-Net reads them."""
    return [name for name in ("clip_l", "clip_g", "clip_h", "t5xxl") if hasattr(clip.cond_stage_model, name)]


def _check_clip(clip, family: Family, context_width: int) -> None:
    stage = clip.cond_stage_model
    encoders = encoder_names(clip)
    if encoders != [*family.text_encoders]:
        found = ", ".join(encoders) or type(stage).__name__
        raise ValueError(
            f"This CLIP ({found}) does not belong to an {family.name} model: take MODEL and CLIP from the same loader."
        )
    width = sum(getattr(stage, key).transformer.get_input_embeddings().weight.shape[1] for key in encoders)
    if width != context_width:
        raise ValueError(
            f"The CLIP's width is {width} but the MODEL expects {context_width}: take both from the same loader."
        )


def prediction_of(model) -> str:
    """Return what a MODEL predicts, "epsilon", "v_prediction" or "flow", as patched in the graph.

    Raises:
        ValueError: it predicts something else, or its noise levels are not those of its family.
    """
    sampling = model.get_model_object("model_sampling")
    if family_of(model) in FLOW_FAMILIES:
        if type(sampling).calculate_denoised is internals.CONST.calculate_denoised:
            return "flow"
        raise ValueError(
            "This model's sampling was changed to one without flow matching: take the MODEL from before the "
            "ModelSampling node."
        )
    kinds = {internals.EPS.calculate_denoised: "epsilon", internals.V_PREDICTION.calculate_denoised: "v_prediction"}
    kind = kinds.get(type(sampling).calculate_denoised)
    if kind is None or not isinstance(sampling, internals.ModelSamplingDiscrete):
        raise ValueError(
            "This model's sampling (such as LCM, EDM or x0) cannot be trained: take the MODEL from before the "
            "ModelSampling node, or load a model that predicts noise or v."
        )
    return kind


def resolution_of(model) -> int:
    """Return the resolution, in pixels per side, that a MODEL was trained at."""
    return family_of(model).resolutions[prediction_of(model)]


@dataclass(frozen=True)
class GraphModels:
    """A graph's MODEL, CLIP and VAE, inspected once: they belong together and can be trained."""

    model: object
    clip: object
    vae: object
    family: Family
    prediction: str  # "epsilon", "v_prediction" or "flow", as patched in the graph
    alphas_cumprod: Tensor  # [T]

    @property
    def flow(self) -> bool:
        """Whether it trains by flow matching, on the host's own modules."""
        return self.prediction == "flow"

    @classmethod
    def of(cls, model, clip, vae) -> "GraphModels":
        """Inspect the three.

        Raises:
            ValueError: they do not belong together, or cannot be trained.
        """
        family = check_fit(model, clip, vae)
        sigmas, prediction = model.get_model_object("model_sampling").sigmas.cpu(), prediction_of(model)
        alphas = alphas_of(sigmas) if prediction == "flow" else (1 / (sigmas.double() ** 2 + 1)).float()
        return cls(model, clip, vae, family, prediction, alphas.clone())


def check_fit(model, clip, vae) -> Family:
    """Return the family of a MODEL, its CLIP and its VAE.

    Raises:
        ValueError: they do not belong together, or cannot be trained.
    """
    family = family_of(model, clip)
    channels = model.model.latent_format.latent_channels
    if vae.latent_channels != channels:
        raise ValueError(
            f"This VAE has {vae.latent_channels} latent channels, the MODEL has {channels}: use the MODEL's own VAE."
        )
    return family
