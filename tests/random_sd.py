"""A random SD 1.x in small widths and the real file layout, loaded by the host's own loader. No test in here."""

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

WIDTH = 64
HEADS = 4
CLIP = {
    "num_hidden_layers": 3,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "vocab_size": 49408,
    "layer_norm_eps": 1e-5,
}
# Like SD 1.x: attention on every level but the last, convolutions as projections, a fixed number of heads.
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}


class RandomClip(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, **options):
        super().__init__(device, dtype=dtype, return_projected_pooled=False, textmodel_json_config=CLIP, **options)


class RandomSD1Clip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, **options):
        super().__init__(device, dtype, clip_name="l", clip_model=RandomClip, **options)


class RandomSD1(comfy.supported_models.SD15):
    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": WIDTH, "model_channels": 32}
    unet_extra_config = {"num_heads": 8, "num_head_channels": -1}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, RandomSD1Clip)


def write_checkpoint(path, seed=0):
    """A single-file checkpoint whose weights are random but well scaled."""
    parts = {
        "model.diffusion_model.": UNetModel(**UNET, operations=comfy.ops.disable_weight_init),
        "cond_stage_model.transformer.": RandomClip().transformer,
        "first_stage_model.": TAESD(latent_channels=4),
    }
    generator = torch.Generator().manual_seed(seed)
    state = {
        prefix + name: _random(name, parameter, generator)
        for prefix, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    state["first_stage_model.vae_scale"] = torch.tensor(0.18215)
    save_file(state, path)
    return path


def _random(name, parameter, generator):
    """Matrices scaled by their fan-in and norms near the identity keep activations near one."""
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim >= 2:
        return values / parameter[0].numel() ** 0.5
    return values * 0.02 + float(name.endswith("weight"))  # every weight vector belongs to a norm


def load(path):
    """MODEL, CLIP and VAE, as CheckpointLoaderSimple hands them over: made in inference mode."""
    if RandomSD1 not in comfy.supported_models.models:
        comfy.supported_models.models.append(RandomSD1)
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path))[:3]
