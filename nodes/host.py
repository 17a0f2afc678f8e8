"""What only the host can do: read a graph's weights, leave inference mode, free memory, report, be interrupted.

Nothing of the graph is ever trained or changed: every tensor that leaves this file is a copy.
"""

import contextlib
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from server import PromptServer
from torch import Tensor

from ..trainers import run as runs
from ..trainers.models import SD1, Models, TextEncoder, build_text_encoder, build_unet
from ..trainers.sentences import quoted
from ..trainers.tokenizer import Tokenizer
from . import carry

NAMES = {
    "SD15": "SD 1.x",
    "SD20": "SD 2.x",
    "SSD1B": "SSD-1B",
    "Segmind_Vega": "Segmind Vega",
}  # where the host's class says less


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "personalize" / "runs"


def notices(node_id: str) -> Callable[[str], None]:
    """A function that shows a sentence on a node; where no editor listens, it does nothing."""
    server = getattr(PromptServer, "instance", None)
    return lambda sentence: server.send_progress_text(sentence, node_id) if server else None


def inside_input(name: str) -> str:
    """The path of a file or folder below ComfyUI's input folder.

    Raises:
        ValueError: it lies elsewhere, however it is spelled.
    """
    root = os.path.realpath(folder_paths.get_input_directory())
    path = os.path.realpath(os.path.join(root, name)) if "\0" not in name else ""
    try:
        inside = os.path.commonpath([root, path]) == root
    except ValueError:  # another drive
        inside = False
    if not inside:
        raise ValueError(f"{quoted(name)} is not inside ComfyUI's input folder: write its name as it is below input/.")
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
            gc.collect()
            mm.soft_empty_cache()


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The precision to compute in: bfloat16 where it is native, else float16 on a GPU, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def family_of(model, clip=None):
    """The family of a MODEL and the CLIP beside it.

    Raises:
        ValueError: one that cannot be trained, by its name, or a CLIP of another family than the MODEL.
    """
    config = model.model.model_config
    unet = config.unet_config
    ours = isinstance(config, comfy.supported_models.SD15)
    if not ours or unet.get("in_channels") != 4:
        name = NAMES.get(type(config).__name__, type(config).__name__)
        kind = f"{name} with {unet.get('in_channels')} input channels" if ours else name
        raise ValueError(
            f"This model is {kind}, but so far only plain SD 1.x models can be trained: load one of those."
        )
    if clip is None:
        return SD1
    stage = clip.cond_stage_model
    encoders = [key for key in ("clip_l", "clip_g", "clip_h", "t5xxl") if hasattr(stage, key)]
    if encoders != ["clip_l"]:
        found = ", ".join(encoders) or type(stage).__name__
        raise ValueError(
            f"This CLIP ({found}) does not belong to an SD 1.x model: take MODEL and CLIP from one loader."
        )
    width = stage.clip_l.transformer.get_input_embeddings().weight.shape[1]
    if width != unet["context_dim"]:
        raise ValueError(
            f"The CLIP's width is {width} but the MODEL expects {unet['context_dim']}: take both from one loader."
        )
    return SD1


def resolution_of(model) -> int:
    """Pixels on a side that a MODEL was trained at."""
    return family_of(model).resolution


def effective_state_dict(patcher, prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights below `prefix` as they act in the graph, with every LoRA and patch applied, as copies on the CPU.

    Neither the host's state dict (it may show another clone's weights, or lazy ones) nor its key patches (they fail
    on quantised models) give this. Call it outside inference mode.
    """
    state = {}
    for key, parameter in patcher.model.named_parameters():
        if not key.startswith(prefix):
            continue
        weight = _unpatched(patcher, key, parameter)
        state[key.removeprefix(prefix)] = _patched(patcher, key, weight).to(dtype)
    return state


def _patched(patcher, key: str, weight: Tensor) -> Tensor:
    """`weight`, which may be changed in place, with the patches and wrappers that the graph put on it."""
    if key in patcher.patches:
        weight = comfy.lora.calculate_weight(patcher.patches[key], weight, key)
    for wrapper in patcher.weight_wrapper_patches.get(key, []):
        weight = wrapper(weight)
    return weight


def _unpatched(patcher, key: str, parameter: Tensor) -> Tensor:
    """A float32 copy of the weight before patches, wherever the host keeps it at the moment."""
    convert = comfy.model_patcher.get_key_weight(patcher.model, key)[2]
    backup, hooked = patcher.backup.get(key), getattr(patcher, "hook_backup", {}).get(key)
    weight = hooked[0] if hooked is not None else backup.weight if backup is not None else parameter
    if convert is not None:
        weight = convert(weight, inplace=False)
    if hasattr(weight, "dequantize") and type(weight).__name__ == "QuantizedTensor":
        weight = weight.dequantize()
    return weight.detach().to(device="cpu", dtype=torch.float32, copy=True)


def check_fit(model, clip, vae):
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


def fingerprint(model, clip, vae) -> str:
    """A digest of what a training starts from, read from stretches of the weights as they act in the graph."""
    family, (alphas, prediction) = family_of(model, clip), _schedule(model)
    words, tensors = [family.name, prediction, str(clip.layer_idx), training_device().type], [alphas]
    # Of the text encoders only what is used: the host leaves their projections uninitialised.
    encoders = [(clip.patcher, f"{name}.transformer.text_model.") for name in family.text_encoders]
    for patcher, prefix in ((model, "diffusion_model."), *encoders, (vae.patcher, "")):
        tensors += [_sampled(patcher, k, p) for k, p in patcher.model.named_parameters() if k.startswith(prefix)]
    earlier = carry.of(clip)
    for token, vectors in earlier.tokens.items():
        words.append(token)
        tensors += vectors.values()
    return runs.digest_of([*tensors, *earlier.fixed_outputs.values()], words)


def _sampled(patcher, key: str, parameter: Tensor) -> Tensor:
    if key in patcher.patches or key in patcher.weight_wrapper_patches:
        return runs.sampled(_patched(patcher, key, _unpatched(patcher, key, parameter)))
    backup = patcher.backup.get(key)
    return runs.sampled(parameter if backup is None else backup.weight)


def _schedule(model) -> tuple[Tensor, str]:
    """Cumulative alphas, `[T]`, and what the model predicts."""
    sampling = model.get_model_object("model_sampling")
    v_prediction = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
    alphas = (1 / (sampling.sigmas.double().cpu() ** 2 + 1)).float().clone()
    return alphas, "v_prediction" if v_prediction else "epsilon"


def read_models(model, clip, vae, dtype: torch.dtype, say: Callable[[str], None] = lambda sentence: None) -> Models:
    """Trainable copies of what a graph hands over, in the U-Net's training precision."""
    family, (alphas, prediction) = check_fit(model, clip, vae), _schedule(model)
    return Models(
        family=family,
        text_encoders=tuple(_text_encoder(clip, name) for name in family.text_encoders),
        unet=build_unet(effective_state_dict(model, "diffusion_model.", dtype), model.model.model_config.unet_config),
        alphas_cumprod=alphas,
        prediction_type=prediction,
        encode_images=_encoder(model, vae, say),
        decode_latents=_decoder(model, vae),
    )


def tokenizer_of(clip, name: str) -> Tokenizer:
    """How the graph's own tokenizer spells words, without the placeholders of earlier trainings."""
    words = getattr(clip.tokenizer, name)
    encode = words.tokenizer
    return Tokenizer(lambda text: encode(text, add_special_tokens=False)["input_ids"], pad_token_id=words.pad_token)


def _text_encoder(clip, name: str) -> TextEncoder:
    encoder = getattr(clip.cond_stage_model, name)
    state = effective_state_dict(clip.patcher, f"{name}.transformer.")
    attention = encoder.transformer.text_model.encoder.layers[0]
    module = build_text_encoder(
        state, heads=attention.self_attn.heads, activation=_activation(attention.mlp.activation)
    )
    trained = TextEncoder(module, tokenizer_of(clip, name), layer=clip.layer_idx)
    earlier = carry.of(clip)
    trained.known_tokens = {token: vectors[name] for token, vectors in earlier.tokens.items()}
    trained.fixed_outputs = earlier.fixed_outputs.get(name)
    return trained


def _activation(function: Callable) -> str:
    """The host keeps activations as functions: tell them apart by what they do."""
    x = torch.tensor([1.0])
    return "gelu" if torch.allclose(function(x), torch.nn.functional.gelu(x), atol=1e-4) else "quick_gelu"


def _encoder(model, vae, say: Callable[[str], None]):
    """Pixels to the latents' mean and deviation. The VAE stays the host's; it runs in the host's inference mode."""
    encoded = count(1)

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        check_interrupted()
        say(f"encoding pictures, {next(encoded) * len(pixels)} so far")
        with torch.inference_mode():
            mean = vae.encode(pixels.movedim(1, -1))
            std = _deviation(vae, pixels)
        mean = model.model.process_latent_in(mean.float()).clone()
        return mean, None if std is None else (std.float() * model.model.latent_format.scale_factor).clone()

    return encode


def _deviation(vae, pixels: Tensor) -> Tensor | None:
    """The posterior's standard deviation; `None` for autoencoders without one, such as TAESD. The VAE is loaded."""
    stage = vae.first_stage_model
    if not hasattr(stage, "quant_conv"):
        return None
    inputs = vae.process_input(pixels).to(device=vae.device, dtype=vae.vae_dtype)
    log_variance = stage.quant_conv(stage.encoder(inputs)).float().chunk(2, dim=1)[1]
    return (0.5 * log_variance.clamp(-30, 20)).exp().cpu()


def _decoder(model, vae):
    def decode(latents: Tensor) -> Tensor:
        check_interrupted()
        with torch.inference_mode():
            pixels = vae.decode(model.model.process_latent_out(latents.float().cpu()))
        return pixels.movedim(-1, 1).float().clone()

    return decode
