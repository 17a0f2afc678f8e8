"""The models that train, rebuilt as diffusers and transformers modules from plain state dicts.

This and text_encoder.py are the only files with those libraries' attribute names. Nothing is trained or read from
files here (see checkpoint.py), and the host is not known: the graph's own modules are copied, not used.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .families import Family
from .text_encoder import Subject, TextEncoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# Pixels [B, 3, H, W] in 0..1 to the latents' mean and standard deviation [B, 4, H / 8, W / 8], scaled as the U-Net
# sees them; the deviation is None where the autoencoder has none.
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor | None]]
# Latents as the U-Net sees them to pixels [B, 3, H, W] in 0..1.
DecodeLatents = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Encoded prompts, as the U-Net reads them."""

    parts: tuple[Tensor, ...]  # hidden states [n, 77, d] of each text encoder
    pooled: Tensor | None = None  # [n, p], where the family reads it
    mask: Tensor | None = None  # [n, 77, 1], see Subject

    @property
    def hidden_states(self) -> Tensor:
        """Hidden states `[n, 77, d]`, the encoders joined along the last axis."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=-1)

    def __getitem__(self, rows: slice) -> "Encoding":
        return self.map(lambda tensor: tensor[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Encoding":
        """Return the encoding with `function` applied to every tensor."""
        pooled, mask = (None if tensor is None else function(tensor) for tensor in (self.pooled, self.mask))
        return Encoding(parts=tuple(map(function, self.parts)), pooled=pooled, mask=mask)

    @classmethod
    def joined(cls, encodings: Sequence["Encoding"]) -> "Encoding":
        """Join several encodings into one."""
        parts = zip(*(encoding.parts for encoding in encodings), strict=True)
        optional = ([getattr(e, name) for e in encodings] for name in ("pooled", "mask"))
        pooled, mask = (None if rows[0] is None else torch.cat(rows) for rows in optional)
        return cls(parts=tuple(map(torch.cat, parts)), pooled=pooled, mask=mask)


@dataclass(kw_only=True)
class Models:
    """A diffusion model's weights and mathematics. Frozen and in eval mode until a stage declares what trains."""

    family: Family
    text_encoders: tuple[TextEncoder, ...]
    unet: "UNet2DConditionModel"
    alphas_cumprod: Tensor  # [T], on the CPU
    prediction_type: str  # "epsilon", "v_prediction" or "flow", see flow.py
    encode_images: EncodeImages
    decode_latents: DecodeLatents
    known_adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # learned earlier, by placeholder
    subject: Subject | None = None
    base_weights: dict[str, Tensor] = field(default_factory=dict)  # the U-Net's weights that train, as they began
    precision: torch.dtype = field(init=False)  # that a U-Net whose own weights train computes in
    pixels_per_latent: int = 8  # on a side
    schedule: tuple[Tensor, Tensor] | None = None  # `alphas_cumprod`, and the same on the device

    def __post_init__(self):
        self.precision = self.unet_dtype

    def follow(self, placeholder: str) -> Subject:
        """Give every encoding from now on the mask of `placeholder`, which all text encoders must have."""
        self.subject = subject = Subject(ids=tuple(self.text_encoders[-1].tokenizer.placeholders[placeholder]))
        for encoder in self.text_encoders:
            encoder.subject = subject
        return subject

    def to(self, device: torch.device | str, unet_dtype: torch.dtype) -> "Models":
        """Move to `device`. The frozen U-Net may be half precision; the text encoders, which train, stay float32."""
        self.precision = unet_dtype
        nn.Module.to(self.unet, device=device, dtype=unet_dtype)  # diffusers' own `to` warns about half precision
        if torch.device(device).type == "cuda":
            from .frozen import use_channels_last  # as slow to import as diffusers

            use_channels_last(self.unet)
        for encoder in self.text_encoders:
            encoder.to(device=device, dtype=torch.float32)
            if encoder.fixed_outputs is not None:
                encoder.fixed_outputs = encoder.fixed_outputs.to(device)
        return self

    @contextlib.contextmanager
    def unet_aside(self) -> Iterator[None]:
        """Move the U-Net to the CPU while the block lasts, to free its memory on the device."""
        device = self.device
        nn.Module.to(self.unet, "cpu")
        try:
            yield
        finally:
            nn.Module.to(self.unet, device)

    def save_memory(self, checkpointing: bool) -> None:
        """Turn gradient checkpointing on or off."""
        (self.unet.enable_gradient_checkpointing if checkpointing else self.unet.disable_gradient_checkpointing)()
        self.unet.train(checkpointing)  # older diffusers checkpoints in training mode only; there is no dropout
        for encoder in self.text_encoders:
            encoder.save_memory(checkpointing)

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return self.text_encoders[0].checkpointing

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def unet_dtype(self) -> torch.dtype:
        """The U-Net's precision; diffusers' own `dtype` walks through all its modules, twice in every step."""
        return next(self.unet.parameters()).dtype

    @property
    def resolution(self) -> int:
        """Pixels on a side that the model was trained at."""
        return self.family.resolutions[self.prediction_type]

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return ids `[len(prompts), number of text encoders, 77]`: encoders pad differently, so each has its own."""
        return torch.stack([encoder.tokenizer(prompts) for encoder in self.text_encoders], dim=1)

    def encode_ids(self, input_ids: Tensor) -> Encoding:
        """Encode ids `[n, E, 77]` of E text encoders."""
        outputs = [encoder(input_ids[:, i]) for i, encoder in enumerate(self.text_encoders)]
        mask = self.subject.mask if self.subject else None
        return Encoding(parts=tuple(hidden for hidden, _ in outputs), pooled=outputs[-1][1], mask=mask)

    def encode_prompts(self, prompts: list[str]) -> Encoding:
        """Tokenize and encode prompts."""
        return self.encode_ids(self.tokenize(prompts).to(self.device))

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        """Return the U-Net's output, epsilon or v, `[n, 4, h, w]` in the U-Net's precision."""
        half = self._half()
        inputs = self.unet_inputs(noisy_latents, timesteps, encoding, half)
        if half is None:
            return self.unet(**inputs).sample
        # Autocast would compute norms in float32 and cast what trains at every use; gradient checkpointing looks the
        # parameters up a second time, when a call with others is over.
        whole = (
            {} if self.unet.training else {n: p.to(half) for n, p in self.unet.named_parameters() if p.dtype != half}
        )
        with self._without_autocast():
            return torch.func.functional_call(self.unet, whole, kwargs=inputs).sample

    def _without_autocast(self) -> contextlib.AbstractContextManager:
        kind = self.device.type
        return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)

    def _half(self) -> torch.dtype | None:
        """Return the half precision that the whole U-Net computes in, even where trained weights are float32."""
        dtype = self.precision if self.base_weights else self.unet_dtype
        return None if dtype == torch.float32 or (self.base_weights and self.unet.training) else dtype

    def unet_inputs(
        self, noisy_latents: Tensor, timesteps: Tensor, encoding: Encoding, dtype: torch.dtype | None = None
    ) -> dict:
        """Return the U-Net's arguments, in its precision or a given one; its adapters follow this encoding's mask.

        A family that reads the image's size gets that of these latents, uncropped, as from the host when it generates
        an image of that size.
        """
        if self.subject:
            self.subject.mask = encoding.mask
        dtype = dtype or self.unet_dtype
        inputs: dict = {"sample": noisy_latents.to(dtype), "timestep": timesteps}
        inputs["encoder_hidden_states"] = encoding.hidden_states.to(dtype)
        if encoding.pooled is not None:
            height, width = (8 * side for side in noisy_latents.shape[-2:])
            sizes = (height, width, 0, 0, height, width)
            columns = [noisy_latents.new_full((len(noisy_latents),), side, dtype=torch.float32) for side in sizes]
            inputs["added_cond_kwargs"] = {
                "text_embeds": encoding.pooled.to(dtype),
                "time_ids": torch.stack(columns, dim=1),  # made there: a list of numbers would have to be brought
            }
        return inputs

    def _signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if (
            self.schedule is None
            or self.schedule[0] is not self.alphas_cumprod
            or self.schedule[1].device != like.device
        ):
            self.schedule = self.alphas_cumprod, self.alphas_cumprod.to(like.device)
        alphas = self.schedule[1][timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return `sqrt(a_t) x + sqrt(1 - a_t) e` with the cumulative alpha `a_t`, `[n, 4, h, w]`."""
        signal, sigma = self._signal_and_noise(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the prediction: the noise e, or `v = sqrt(a_t) e - sqrt(1 - a_t) x`."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_noise(timesteps, latents)
        return signal * noise - sigma * latents


def build_unet(ldm_state: dict[str, Tensor], ldm_config: dict) -> nn.Module:
    """Build a frozen diffusers U-Net from weights in LDM's key names, without a prefix."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from .frozen import use_frozen_layers  # as slow to import as diffusers

    config = diffusers_unet_config(ldm_config)
    state = convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": v for k, v in ldm_state.items()}, config)
    with torch.device("meta"):  # no time and no memory for weights that are replaced at once
        unet = UNet2DConditionModel(**config)
    unet.load_state_dict(state, strict=True, assign=True)
    return use_frozen_layers(unet.requires_grad_(False).eval())


def diffusers_unet_config(ldm: dict) -> dict:
    """Return `UNet2DConditionModel`'s arguments for an LDM configuration, as the host detects it from a checkpoint.

    Raises:
        ValueError: a layout that diffusers cannot express, such as SSD-1B's.
    """
    levels, base = len(ldm["channel_mult"]), ldm["model_channels"]
    layers = ldm["num_res_blocks"][0]
    depths = [set(ldm["transformer_depth"][i * layers : (i + 1) * layers]) for i in range(levels)]
    if len(set(ldm["num_res_blocks"])) != 1 or any(len(d) != 1 for d in depths) or ldm["transformer_depth_middle"] < 1:
        raise ValueError("This U-Net has an irregular layout (SSD-1B and its relatives), which cannot be trained here.")
    depth = [d.pop() for d in depths]
    channels = [base * multiple for multiple in ldm["channel_mult"]]
    head_size = ldm.get("num_head_channels", -1)
    return dict(
        sample_size=64,
        in_channels=ldm["in_channels"],
        out_channels=ldm["out_channels"],
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth),
        up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)),
        transformer_layers_per_block=tuple(d or 1 for d in depth[:-1])
        + (depth[-1] or ldm["transformer_depth_middle"],),
        # diffusers calls the number of heads `attention_head_dim`
        attention_head_dim=tuple(ldm["num_heads"] if head_size == -1 else c // head_size for c in channels),
        cross_attention_dim=ldm["context_dim"],
        use_linear_projection=ldm["use_linear_in_transformer"],
        **_size_embedding(ldm.get("adm_in_channels")),
    )


def _size_embedding(width: int | None) -> dict:
    """Return the arguments for SDXL's U-Net, which also reads the pooled text and six numbers of the image's size."""
    if width is None:
        return {}
    return dict(
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=width
    )
