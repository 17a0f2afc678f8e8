"""Reads the effective weights of a graph's MODEL, CLIP and VAE: copies to train, or a digest.

Nothing of the graph is ever trained or changed: every tensor returned from here is a copy.
"""

from collections.abc import Callable
from itertools import count

import comfy.model_management as mm
import torch
from torch import Tensor

from ...trainers.device import SingleDevice
from ...trainers.digest import digest_of, sampled
from ...trainers.models.diffusion import Models, build_unet
from ...trainers.models.families import Family
from ...trainers.models.text_encoder import TextEncoder, build_text_encoder
from ...trainers.models.tokenizer import Tokenizer
from . import clip_attachment, internals, native
from .models import GraphModels
from .session import check_interrupted, training_device


def effective_state_dict(patcher, prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the weights below `prefix` as they act in the graph, with every LoRA and patch, as copies on the CPU.

    The host's state dict is no substitute (it may hold another clone's weights, or lazy ones), nor are its key patches
    (they fail on quantized models). Call this outside inference mode.
    """
    state = {}
    for key, parameter in patcher.model.named_parameters():
        if not key.startswith(prefix):
            continue
        if _is_patched(patcher, key):
            weight = _patched(patcher, key, _unpatched(patcher, key, parameter)).to(dtype)
        else:
            weight = _unpatched(patcher, key, parameter, dtype)
        state[key.removeprefix(prefix)] = weight
    return state


def _is_patched(patcher, key: str) -> bool:
    return key in patcher.patches or key in patcher.weight_wrapper_patches


def _patched(patcher, key: str, weight: Tensor) -> Tensor:
    """Apply the graph's patches and wrappers to `weight`, which may be changed in place."""
    patches, wrappers = (internals.part(patcher, name) for name in ("patches", "weight_wrapper_patches"))
    if key in patches:
        weight = internals.calculate_weight(patches[key], weight, key)
    for wrapper in wrappers.get(key, []):
        weight = wrapper(weight)
    return weight


def _unpatched(patcher, key: str, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a copy of the weight before patches, wherever the host keeps it at the moment."""
    convert = internals.get_key_weight(patcher.model, key)[2]
    backup, hooked = internals.part(patcher, "backup").get(key), getattr(patcher, "hook_backup", {}).get(key)
    weight = hooked[0] if hooked is not None else backup.weight if backup is not None else parameter
    if convert is not None:
        weight = convert(weight, inplace=False)
    if hasattr(weight, "dequantize") and type(weight).__name__ == "QuantizedTensor":
        weight = weight.dequantize()
    if not weight.is_floating_point():
        raise ValueError(
            "The weights of this model are in a format that only its own loader reads (such as GGUF): load the model "
            "as safetensors in fp16, bf16 or fp8."
        )
    return weight.detach().to(device="cpu", dtype=dtype, copy=True)


def checkpoint(graph: GraphModels) -> dict[str, Tensor]:
    """Return a graph's models as one checkpoint's tensors, in the names of Stable Diffusion's own files.

    Every patch is merged, also those that the host's own saving leaves out because they act at use. The numbers have
    the U-Net's precision, float16 for those of less than two bytes.
    """
    model, clip, vae = graph.model, graph.clip, graph.vae
    stored = next(model.model.diffusion_model.parameters()).dtype
    dtype = stored if stored in (torch.float32, torch.bfloat16) else torch.float16
    with torch.inference_mode(False):
        unet = effective_state_dict(model, "diffusion_model.", dtype)
        others = [effective_state_dict(each.patcher, "", dtype) for each in (clip, vae)]
    state = internals.part(model.model, "state_dict_for_saving")(unet, *others)
    if graph.prediction == "v_prediction":
        state["v_pred"] = torch.tensor([])
    if getattr(model.get_model_object("model_sampling"), "zsnr", False):
        state["ztsnr"] = torch.tensor([])
    return {name: tensor.contiguous() for name, tensor in state.items()}


def fingerprint(graph: GraphModels) -> str:
    """Return a digest of what a training starts from: samples of the weights as they act in the graph."""
    model, clip, vae = graph.model, graph.clip, graph.vae
    words = [graph.family.name, graph.prediction, str(clip.layer_idx), training_device().type]
    tensors = [graph.alphas_cumprod]
    # Only the parts of the text encoders that are used: the host leaves their projections uninitialized.
    encoders = [(clip.patcher, f"{name}.transformer.text_model.") for name in graph.family.text_encoders]
    encoders = encoders or [(clip.patcher, "")]
    for patcher, prefix in ((model, "diffusion_model."), *encoders, (vae.patcher, "")):
        tensors += [_sampled(patcher, k, p) for k, p in patcher.model.named_parameters() if k.startswith(prefix)]
    earlier = clip_attachment.of(clip)
    for token, vectors in earlier.tokens.items():
        words.append(token)
        tensors += vectors.values()
    for word, adapters in earlier.adapters.items():
        words += [word, *adapters.tensors]
        tensors += adapters.whole().values()
    return digest_of([*tensors, *earlier.fixed_outputs.values()], words)


def _sampled(patcher, key: str, parameter: Tensor) -> Tensor:
    if _is_patched(patcher, key):
        return sampled(_patched(patcher, key, _unpatched(patcher, key, parameter)))
    backup = patcher.backup.get(key)
    return sampled(parameter if backup is None else backup.weight)


def read_models(
    graph: GraphModels, dtype: torch.dtype, notify: Callable[[str], None] = lambda sentence: None
) -> Models:
    """Return trainable copies of a graph's models, in the U-Net's training precision.

    Args:
        notify: given sentences about the progress.
    """
    model, clip, vae, family = graph.model, graph.clip, graph.vae, graph.family
    if graph.flow:
        return native.read_models(graph, notify)
    return Models(
        family=family,
        text_encoders=tuple(_text_encoder(clip, name, family) for name in family.text_encoders),
        unet=build_unet(effective_state_dict(model, "diffusion_model.", dtype), model.model.model_config.unet_config),
        alphas_cumprod=graph.alphas_cumprod,
        prediction_type=graph.prediction,
        encode_images=_encoder(model, vae, notify),
        decode_latents=_decoder(model, vae),
        known_adapters={word: adapters.whole() for word, adapters in clip_attachment.of(clip).adapters.items()},
    )


def device_of(graph: GraphModels, device: torch.device, dtype: torch.dtype) -> SingleDevice:
    """Return the device as a training of these models uses it.

    A transformer of the host's looks at values while it runs, which a CUDA graph cannot.
    """
    return SingleDevice(device=device, dtype=dtype, graph=not graph.flow)


def tokenizer_of(clip, name: str) -> Tokenizer:
    """Return the graph's own tokenizer, without the placeholder tokens of earlier trainings."""
    words = getattr(clip.tokenizer, name)
    encode = words.tokenizer
    return Tokenizer(lambda text: encode(text, add_special_tokens=False)["input_ids"], pad_token_id=words.pad_token)


def _text_encoder(clip, name: str, family: Family) -> TextEncoder:
    encoder = getattr(clip.cond_stage_model, name)
    state = effective_state_dict(clip.patcher, f"{name}.transformer.")
    attention = encoder.transformer.text_model.encoder.layers[0]
    module = build_text_encoder(
        state, heads=attention.self_attn.heads, activation=_activation(attention.mlp.activation)
    )
    pooled = family.pooled and name == family.text_encoders[-1]  # the others' projections are uninitialized
    trained = TextEncoder(
        module,
        tokenizer_of(clip, name),
        _layer(clip, encoder, family),
        final_norm=family.final_norm,
        projection=state["text_projection.weight"] if pooled else None,
    )
    earlier = clip_attachment.of(clip)
    trained.known_tokens = {token: vectors[name] for token, vectors in earlier.tokens.items()}
    trained.fixed_outputs = earlier.fixed_outputs.get(name)
    return trained


def _layer(clip, encoder, family: Family) -> int | None:
    """Return the index of the hidden state to read: the graph's choice (CLIPSetLastLayer), else the family's."""
    if clip.layer_idx is None or abs(clip.layer_idx) > encoder.num_layers:  # the host ignores a deeper one
        return family.layer
    return clip.layer_idx


def _activation(function: Callable) -> str:
    """Return the name of an activation function, recognized by its value, since the host keeps functions only."""
    x = torch.tensor([1.0])
    return "gelu" if torch.allclose(function(x), torch.nn.functional.gelu(x), atol=1e-4) else "quick_gelu"


def _encoder(model, vae, notify: Callable[[str], None]):
    """Return a function from pixels to the latents' mean and deviation, which runs the host's own VAE."""
    encoded = count(1)

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        check_interrupted()
        notify(f"encoding images, {next(encoded) * len(pixels)} so far")
        with torch.inference_mode():
            mean, std = _posterior(vae, pixels)
        mean = model.model.process_latent_in(mean.float()).clone()
        return mean, None if std is None else (std.float() * model.model.latent_format.scale_factor).clone()

    return encode


def _posterior(vae, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return mean and standard deviation, in batches of the size that the host estimates to fit.

    They are on the autoencoder's device, and nothing waits for it. The deviation is `None` for autoencoders without
    one, such as TAESD. The host's own `encode` returns only the mean.
    """
    stage = vae.first_stage_model
    if not hasattr(stage, "quant_conv"):
        return vae.encode(pixels.movedim(1, -1)), None
    need = vae.memory_used_encode(pixels.shape, vae.vae_dtype)  # of one image
    mm.load_models_gpu([vae.patcher], memory_required=need)
    batch_size = max(1, int(vae.patcher.get_free_memory(vae.device) / need))
    inputs = [vae.process_input(part).to(device=vae.device, dtype=vae.vae_dtype) for part in pixels.split(batch_size)]
    moments = torch.cat([stage.quant_conv(stage.encoder(part)).float() for part in inputs])
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


def _decoder(model, vae):
    def decode(latents: Tensor) -> Tensor:
        check_interrupted()
        with torch.inference_mode():
            pixels = vae.decode(model.model.process_latent_out(latents.float().cpu()))
        return pixels.movedim(-1, 1).float().clone()

    return decode
