"""Teaches a running ComfyUI the demo's tiny architectures: the stock loader then gives their MODEL, CLIP and VAE.

Only the demo host and the tests call register(); a user's ComfyUI never does. One is SD1.x in everything but size:
model_channels 64, two levels, a text encoder of width 128. The other is Z-Image's transformer, 256 wide, on the same
text encoder and latents. ComfyUI finds a model's class by these sizes, so a checkpoint that ComfyUI itself saves loads
as well. Needs ComfyUI's modules and nothing else of this repository: load the file by its path.
"""

import comfy.latent_formats
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base

CLIP_CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "vocab_size": 49408,
    "layer_norm_eps": 1e-5,
}


class TinyClip(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            return_projected_pooled=False,
            textmodel_json_config=dict(CLIP_CONFIG),
            model_options=model_options or {},
        )


class TinySD1Clip(comfy.sd1_clip.SD1ClipModel):
    encoder = TinyClip

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, clip_name="l", clip_model=self.encoder
        )


class PersonalizeTiny(comfy.supported_models.SD15):
    """Same family as SD1.x: noise prediction, its latent format, its key names."""

    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": 128, "model_channels": 64}
    # Heads cannot be read off the weights.
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinySD1Clip)


class TinyTokensClip(TinyClip):
    """Hidden states of a prompt's own tokens, up to its end: the transformer reads every one that it is given."""

    def forward(self, tokens):
        hidden, *others = super().forward(tokens)
        end = CLIP_CONFIG["eos_token_id"]
        return hidden[:, : max(row.index(end) if end in row else len(row) for row in tokens) + 1], *others


class TinyTokensSD1Clip(TinySD1Clip):
    encoder = TinyTokensClip


class PersonalizeTinyTransformer(comfy.supported_models.ZImage):
    """Z-Image's layout, predictions and key names; the demo's text encoder and latents."""

    unet_config = {"image_model": "lumina2", "dim": 256, "cap_feat_dim": 128}
    unet_extra_config = {
        "in_channels": 4,
        "n_refiner_layers": 1,
        "n_heads": 8,
        "n_kv_heads": 8,
        "axes_dims": [8, 12, 12],
        "axes_lens": [128, 64, 64],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 2.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }
    sampling_settings = {"multiplier": 1.0, "shift": 1.5}
    latent_format = comfy.latent_formats.SD15

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinyTokensSD1Clip)


def register():
    """Adds the architectures to ComfyUI's list, once however often it is called."""
    known = comfy.supported_models.models
    for kind in (PersonalizeTiny, PersonalizeTinyTransformer):
        if all(model.__name__ != kind.__name__ for model in known):
            known.insert(0, kind)  # the first that matches is taken, and "lumina2" alone matches Lumina Image 2
