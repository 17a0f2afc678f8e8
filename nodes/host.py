"""What only the host can do: its folders, families, memory, messages and interrupts (weights are weights.py's)."""

import contextlib
import gc
import hashlib
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management as mm
import comfy.model_sampling
import comfy.supported_models
import folder_paths
import torch
from server import PromptServer

from ..trainers.backbones import Backbones
from ..trainers.families import FAMILIES, SD1, SD2, SDXL, Family
from ..trainers.sentences import quoted, reason

KINDS = {
    comfy.supported_models.SD15: SD1,
    comfy.supported_models.SD20: SD2,
    comfy.supported_models.SDXL: SDXL,
}
# The host derives them from SDXL, but their U-Nets are cut down unevenly.
UNEVEN = ("SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B")
NAMES = {
    "SD15": SD1.name,
    "SD20": SD2.name,
    "SDXL": SDXL.name,
    "SSD1B": "SSD-1B",
    "Segmind_Vega": "Segmind Vega",
}  # where the host's class says less


# The CLIPs that judge. In memory while a training lasts, so that its word, its monitors and scores share one.
backbones = Backbones(
    folders=lambda: [
        folder for kind in ("clip_vision", "personalize") for folder in folder_paths.get_folder_paths(kind)
    ]
)


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "personalize" / "runs"


def cache_folder() -> Path:
    """What is costly to compute again, for any run."""
    return Path(folder_paths.get_output_directory()) / "personalize" / "cache"


def notices(node_id: str) -> Callable[[str], None]:
    """A function that shows a sentence on a node; where no editor listens, it does nothing."""
    server = getattr(PromptServer, "instance", None)
    return lambda sentence: server.send_progress_text(sentence, node_id) if server else None


def inside_input(name: str) -> str:
    """The path of a file or folder below ComfyUI's input folder.

    Raises:
        ValueError: it lies elsewhere, however it is spelled.
    """
    return _inside("input", folder_paths.get_input_directory(), name)


def inside_output(name: str) -> str:
    """The same of ComfyUI's output folder."""
    return _inside("output", folder_paths.get_output_directory(), name)


def text_in_input(name: str, what: str, line: str) -> str:
    """The text of a file below ComfyUI's input folder; "" for an empty name.

    Args:
        what: the file holds, and `line` one of them, as messages call them.

    Raises:
        ValueError: a file that lies elsewhere, cannot be read, or is empty.
    """
    if not (name := name.strip()):
        return ""
    try:
        text = Path(inside_input(name)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} file {quoted(name)} cannot be read as text: save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(
            f"The {what} file {quoted(name)} cannot be read ({reason(error)}): write the name of a text file as it is "
            "below input/."
        ) from error
    if not text.strip():
        raise ValueError(f"The {what} file {quoted(name)} is empty: write one {line} per line.")
    return text


def digest_of_text(name: str) -> str:
    """Another word when the text of such a file is another, or cannot be read."""
    try:
        return hashlib.sha256(text_in_input(name, "text", "line").encode()).hexdigest()
    except ValueError as error:
        return str(error)


def _inside(kind: str, folder: str, name: str) -> str:
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name)) if "\0" not in name else ""
    try:
        inside = os.path.commonpath([root, path]) == root
    except ValueError:  # another drive
        inside = False
    if not inside:
        raise ValueError(
            f"{quoted(name)} is not inside ComfyUI's {kind} folder: write its name as it is below {kind}/."
        )
    return path


def check_interrupted() -> None:
    """Raise the host's interrupt exception if the user pressed cancel."""
    mm.throw_exception_if_processing_interrupted()


def training_device() -> torch.device:
    return mm.get_torch_device()


def free_memory(device: torch.device) -> int:
    """Bytes that the host reports free on `device`."""
    return mm.get_free_memory(device)


@contextlib.contextmanager
def training_session() -> Iterator[torch.device]:
    """Gradients on, the graph's models out of the way, and afterwards everything as it was.

    Keep what is trained inside a function called from this block, so that its memory is free when the block ends.
    """
    device = training_device()
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.inference_mode(False), torch.enable_grad(), rng:
        mm.unload_all_models()
        mm.soft_empty_cache()
        try:
            yield device
        except BaseException as error:
            # The frames of a failed training hold its tensors; the host keeps the exception for a while.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            backbones.clear()
            gc.collect()
            mm.soft_empty_cache()


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The precision to compute in: bfloat16 where it is native, else float16 on a GPU, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def family_of(model, clip=None) -> Family:
    """The family of a MODEL and the CLIP beside it.

    Raises:
        ValueError: one that cannot be trained, by its name, or a CLIP of another family than the MODEL.
    """
    config = model.model.model_config
    family = _family(config)
    if clip is not None:
        _check_clip(clip, family, config.unet_config["context_dim"])
    return family


def _family(config) -> Family:
    """Relatives that see more than noisy latents (inpainting, depth, unCLIP) are refused like strangers."""
    unet, name = config.unet_config, type(config).__name__
    known = None if name in UNEVEN else next((f for kind, f in KINDS.items() if isinstance(config, kind)), None)
    if known and unet.get("in_channels") == 4 and (unet.get("adm_in_channels") is not None) == known.pooled:
        return known
    kind = NAMES.get(name, name)
    if known and unet.get("in_channels") != 4:
        kind += f" with {unet.get('in_channels')} input channels"
    *first, last = (family.name for family in FAMILIES)
    ours = f"{', '.join(first)} and {last}"
    raise ValueError(f"This model is {kind}, but so far only plain {ours} models can be trained: load one of those.")


def encoder_names(clip) -> list[str]:
    """The host's names of a CLIP's text encoders, in the order in which the U-Net reads them."""
    return [name for name in ("clip_l", "clip_g", "clip_h", "t5xxl") if hasattr(clip.cond_stage_model, name)]


def _check_clip(clip, family: Family, context_width: int) -> None:
    stage = clip.cond_stage_model
    encoders = encoder_names(clip)
    if encoders != [*family.text_encoders]:
        found = ", ".join(encoders) or type(stage).__name__
        raise ValueError(
            f"This CLIP ({found}) does not belong to an {family.name} model: take MODEL and CLIP from one loader."
        )
    width = sum(getattr(stage, key).transformer.get_input_embeddings().weight.shape[1] for key in encoders)
    if width != context_width:
        raise ValueError(
            f"The CLIP's width is {width} but the MODEL expects {context_width}: take both from one loader."
        )


def prediction_of(model) -> str:
    """What a MODEL predicts, as it is patched in the graph.

    Raises:
        ValueError: neither noise nor v, or noise levels other than Stable Diffusion's discrete ones.
    """
    sampling, host = model.get_model_object("model_sampling"), comfy.model_sampling
    kinds = {host.EPS.calculate_denoised: "epsilon", host.V_PREDICTION.calculate_denoised: "v_prediction"}
    kind = kinds.get(type(sampling).calculate_denoised)
    if kind is None or not isinstance(sampling, host.ModelSamplingDiscrete):
        raise ValueError(
            "This model's sampling (such as LCM, EDM or x0) cannot be trained: take the MODEL from before the "
            "ModelSampling node, or load a model that predicts noise or v."
        )
    return kind


def resolution_of(model) -> int:
    """Pixels on a side that a MODEL was trained at."""
    return family_of(model).resolutions[prediction_of(model)]


def check_fit(model, clip, vae) -> Family:
    """The family of what a graph hands over.

    Raises:
        ValueError: the three do not belong together, or cannot be trained.
    """
    family = family_of(model, clip)
    if vae.latent_channels != 4:
        raise ValueError(
            f"This VAE has {vae.latent_channels} latent channels, the MODEL has 4: use the MODEL's own VAE."
        )
    return family
