"""Teaches a running ComfyUI the demo's tiny architecture: the stock loader then gives its MODEL, CLIP and VAE.

Only the demo host and the tests call register(); a user's ComfyUI never does. It is SD1.x in everything but size:
model_channels 64, two levels, a text encoder of width 128. ComfyUI finds a model's class by these two sizes, so a
checkpoint that ComfyUI itself saves loads as well. Needs ComfyUI's modules and nothing else of this repository: load
the file by its path.
"""

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
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, clip_name="l", clip_model=TinyClip
        )


class PersonalizeTiny(comfy.supported_models.SD15):
    """Same family as SD1.x: noise prediction, its latent format, its key names."""

    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": 128, "model_channels": 64}
    # Heads cannot be read off the weights.
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinySD1Clip)


def register():
    """Adds the architecture to ComfyUI's list, once however often it is called."""
    known = comfy.supported_models.models
    if all(model.__name__ != PersonalizeTiny.__name__ for model in known):
        known.append(PersonalizeTiny)
