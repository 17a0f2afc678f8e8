"""Transformers that train on the host's own modules: a private copy of a graph's MODEL, its text encoders and sampler.

The host loads the copy, in any precision or format that it reads, and moves it where something else needs the memory.
Prompts are encoded once, without gradient. Nothing of the graph is trained or changed.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import count

import torch
from torch import Tensor

from ...trainers.device import is_out_of_memory
from ...trainers.models.flow import FlowModels
from . import internals, sampler
from .models import GraphModels
from .session import check_interrupted

KEY = "personalize levels"
UNDISTILLED = {"guidance": 1.0}  # for a model distilled to guidance: what it predicts without


class HostNetwork:
    """A private copy of a MODEL at work, with the graph's CLIP and VAE; fulfils `flow.Network`."""

    def __init__(self, model, clip, vae, notify: Callable[[str], None]):
        self.patcher, self.clip, self.vae, self.notify = private_copy(model), clip, vae, notify
        self.encoded: dict[str, list] = {}  # what CLIPTextEncode returns
        self.conditions: dict[tuple, dict] = {}  # by prompt and shape of the latents
        self.frames = self.patcher.model.latent_format.latent_dimensions == 3  # of a video: here always one
        self.levels = torch.ones(0)  # of nothing yet
        self.patcher.add_wrapper_with_key(internals.WrappersMP.APPLY_MODEL, KEY, self._sampling)

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode prompts with the graph's text encoders."""
        for i, prompt in enumerate(prompts):
            check_interrupted()
            if len(prompts) > 1:
                self.notify(f"encoding prompts, {i + 1} of {len(prompts)}")
            with torch.inference_mode():  # the text encoders were made in it
                encoded = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
            self.encoded[prompt] = [[_ordinary(hidden), _ordinary(options)] for hidden, options in encoded]

    def velocity(self, noisy_latents: Tensor, sigmas: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the prediction of `e - x`, `[n, c, h, w]`; rows of one prompt go through the network together."""
        self._load()
        outputs: dict[int, Tensor] = {}
        for prompt, rows in by_prompt(prompts):
            x, levels = noisy_latents[rows], sigmas[rows]
            self.levels = levels
            denoised = self.patcher.model.apply_model(self._with_frame(x), levels, **self._conditions(prompt, x))
            velocity = (x - self._without_frame(denoised)) / levels.view(-1, 1, 1, 1)
            outputs |= zip(rows, velocity, strict=True)
        return torch.stack([outputs[i] for i in range(len(prompts))])

    def place(self, dtype: torch.dtype) -> None:
        """Load the weights onto the device, to compute in this precision."""
        # Not by `set_model_compute_dtype` again, which would load all weights once more: they are cast where they are
        # used, to what the network computes in.
        self.patcher.add_object_patch("manual_cast_dtype", dtype)
        self._load()
        self.patcher.model.manual_cast_dtype = dtype

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], *, size: tuple[int, int], steps: int, guidance: float
    ) -> Tensor:
        """Return images `[n, 3, *size]` in 0..1 on the CPU: those of a KSampler with Euler and the simple schedule."""
        self.encode([prompt for prompt in ("", *prompts) if prompt not in self.encoded])
        images: dict[int, Tensor] = {}
        for prompt, rows in by_prompt(prompts):
            empty = sampler.empty_latents(self.patcher, *size)
            noise = torch.cat([internals.prepare_noise(empty, seeds[i]) for i in rows])
            latents = internals.sample(
                self.patcher, noise, steps, guidance, "euler", "simple", self.encoded[prompt], self.encoded[""],
                torch.zeros_like(noise), disable_pbar=True, seed=seeds[rows[0]],
            )  # fmt: skip
            images |= zip(rows, self.pixels(latents), strict=True)
        return torch.stack([images[i] for i in range(len(prompts))])

    def latents(self, pixels: Tensor) -> Tensor:
        """Return the latents `[n, c, h, w]`, scaled as the network sees them, of pixels `[n, 3, H, W]` in 0..1."""
        with torch.inference_mode():
            encoded = [self.vae.encode(image.movedim(0, -1)[None]) for image in pixels]  # several are frames to some
            return self._without_frame(self.patcher.model.process_latent_in(torch.cat(encoded).float())).clone()

    def pixels(self, latents: Tensor) -> Tensor:
        """Return pixels `[n, 3, H, W]` in 0..1 of latents as the host's sampler returns them."""
        check_interrupted()
        with torch.inference_mode():
            decoded = self.vae.decode(latents.float().cpu())
        return decoded.reshape(-1, *decoded.shape[-3:]).movedim(-1, 1).float().cpu().clone()

    def _sampling(self, executor, x: Tensor, sigmas: Tensor, *args, **kwargs):
        """Wrap the network where the host's sampler calls it."""
        self.levels = sigmas
        return executor(x, sigmas, *args, **kwargs)

    def _load(self) -> None:
        internals.load_models_gpu([self.patcher], force_full_load=True)

    def _conditions(self, prompt: str, x: Tensor) -> dict:
        """Return the network's further arguments for latents of one prompt, as the host's sampler makes them."""
        key = prompt, x.shape
        if key not in self.conditions:
            hidden, options = self.encoded[prompt][0]
            options = options | (
                UNDISTILLED if self.patcher.model.model_config.unet_config.get("guidance_embed") else {}
            )
            given = internals.convert_cond([[hidden, options]])
            extra_conds = self.patcher.get_model_object("extra_conds")
            noise = self._with_frame(x.detach())
            (encoded,) = internals.encode_model_conds(extra_conds, given, noise, x.device, "positive")
            made = encoded["model_conds"].items()
            parts = {name: cond.process_cond(batch_size=len(x), area=None).concat([]) for name, cond in made}
            self.conditions[key] = {name: _on(part, x.device) for name, part in parts.items()}
        return self.conditions[key]

    def _with_frame(self, latents: Tensor) -> Tensor:
        return latents[:, :, None] if self.frames else latents

    def _without_frame(self, latents: Tensor) -> Tensor:
        return latents[:, :, 0] if latents.ndim == 5 else latents


def by_prompt(prompts: Sequence[str]) -> Iterable[tuple[str, list[int]]]:
    """Return each prompt with the places at which it stands."""
    return [(prompt, [i for i, other in enumerate(prompts) if other == prompt]) for prompt in dict.fromkeys(prompts)]


def private_copy(model):
    """Return a patcher of freshly loaded weights with the graph's patches merged, as ordinary frozen tensors.

    Call it outside inference mode.

    Raises:
        ValueError: the host does not know the MODEL's file, or adds weights at every use.
    """
    if model.weight_wrapper_patches:
        raise ValueError(
            "A LoRA is added to this model at every use, which a training cannot continue from: switch full_precision "
            "off, or take the MODEL from before a T-LoRA."
        )
    try:
        copy = model.clone(disable_dynamic=True, force_deepcopy=True)
    except RuntimeError as error:
        raise ValueError(
            "This model was not loaded by one of ComfyUI's own loaders, which a training needs to load it once more: "
            "use Load Diffusion Model or Load Checkpoint."
        ) from error
    copy.set_model_compute_dtype(copy.model.get_dtype_inference())  # so that weights are cast to any, see `place`
    internals.load_models_gpu([copy], force_full_load=True)
    # They are merged now; their backups would bring the weights back under names that a LoRA changes.
    copy.patches = {}
    internals.part(copy, "backup").clear()
    copy.model.requires_grad_(False).eval()
    return copy


def read_models(graph: GraphModels, notify: Callable[[str], None]) -> FlowModels:
    """Return a graph's transformer as models that can be trained.

    Args:
        notify: given sentences about the progress.
    """
    network = HostNetwork(graph.model, graph.clip, graph.vae, notify)
    _check_text(network, graph)
    encoded = count(1)

    def encode(pixels: Tensor) -> tuple[Tensor, None]:
        check_interrupted()
        notify(f"encoding images, {next(encoded) * len(pixels)} so far")
        return network.latents(pixels), None

    inner = network.patcher.model
    return FlowModels(
        family=graph.family,
        text_encoders=(),
        unet=inner.diffusion_model,
        alphas_cumprod=graph.alphas_cumprod,
        sigmas=network.patcher.get_model_object("model_sampling").sigmas.cpu().clone(),
        prediction_type=graph.prediction,
        channels=inner.latent_format.latent_channels,
        pixels_per_latent=inner.latent_format.spacial_downscale_ratio,
        encode_images=encode,
        decode_latents=lambda latents: network.pixels(inner.process_latent_out(latents)),
        network=network,
    )


def _check_text(network: HostNetwork, graph: GraphModels) -> None:
    """Raise `ValueError` unless the network can read what the text encoders say: one small pass."""
    latents = torch.zeros(
        1, network.patcher.model.latent_format.latent_channels, 8, 8, device=network.patcher.load_device
    )
    network.encode([""])
    try:
        with torch.no_grad():
            network.velocity(latents, torch.full((1,), 0.5, device=latents.device), [""])
    except (LookupError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"This CLIP does not belong to a {graph.family.name} model: use the text encoder that is made for it."
        ) from error


def _ordinary(value):
    """Return tensors, and those in a dictionary, as copies that autograd accepts: they were made in inference mode."""
    if isinstance(value, dict):
        return {name: _ordinary(each) for name, each in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _on(value, device: torch.device):
    return value.to(device) if isinstance(value, Tensor) else value
