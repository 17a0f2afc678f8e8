"""Random SD 1.x and 2.x in small widths and the real file layout, loaded by the host's own loader. No test in here."""

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
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
# Like SD 2.x: linear projections and heads of a fixed size, here 16; twelve output blocks, because the host recognises
# v prediction by the last one.
UNET2 = {
    **UNET,
    "channel_mult": [1, 2, 2, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "num_heads": -1,
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
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


class RandomOpenClip(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, layer="hidden", layer_idx=-2, **options):
        super().__init__(
            device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config={**CLIP, "hidden_act": "gelu"},
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            return_projected_pooled=True,
            **options,
        )


class RandomSD2Clip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, **options):
        super().__init__(device, dtype, clip_name="h", clip_model=RandomOpenClip, **options)


class RandomSD2Words(comfy.text_encoders.sd2_clip.SD2ClipHTokenizer):
    """Embedding files of the small width are read, too."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.embedding_size = WIDTH


class RandomSD2Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, clip_name="h", tokenizer=RandomSD2Words)


class RandomSD2(comfy.supported_models.SD20):
    unet_config = {**comfy.supported_models.SD20.unet_config, "context_dim": WIDTH, "model_channels": 32}
    unet_extra_config = {"num_heads": -1, "num_head_channels": 16, "attn_precision": torch.float32}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(RandomSD2Tokenizer, RandomSD2Clip)


def write_checkpoint(path, kind="SD 1.x", seed=0):
    """A single-file checkpoint whose weights are random but well scaled: "SD 1.x", or "SD 2.x" and what it predicts."""
    first = kind == "SD 1.x"
    parts = {
        "model.diffusion_model.": UNetModel(**(UNET if first else UNET2), operations=comfy.ops.disable_weight_init),
        "cond_stage_model.transformer." if first else "clip_h.transformer.": _clip(first).transformer,
        "first_stage_model.": TAESD(latent_channels=4),
    }
    generator = torch.Generator().manual_seed(seed)
    state = {
        prefix + name: _random(name, parameter, generator)
        for prefix, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    state["first_stage_model.vae_scale"] = torch.tensor(0.18215)
    save_file(state if first else _as_sd2(state, kind), path)
    return path


def _clip(first):
    return RandomClip() if first else RandomOpenClip()


def _as_sd2(state, kind):
    """OpenCLIP's names, and the sign by which the host tells v prediction: a wide bias in the last block."""
    text = {key: value for key, value in state.items() if key.startswith("clip_h.")}
    others = {key: value for key, value in state.items() if key not in text}
    if "v" in kind.split():
        others["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"] *= 10
    return others | comfy.supported_models.SD20.process_clip_state_dict_for_saving(None, text)


def _random(name, parameter, generator):
    """Matrices scaled by their fan-in and norms near the identity keep activations near one."""
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim >= 2:
        return values / parameter[0].numel() ** 0.5
    return values * 0.02 + float(name.endswith("weight"))  # every weight vector belongs to a norm


def load(path, kind="SD 1.x"):
    """MODEL, CLIP and VAE, as CheckpointLoaderSimple hands them over: made in inference mode."""
    for known in (RandomSD1, RandomSD2):
        if known not in comfy.supported_models.models:
            comfy.supported_models.models.append(known)
    with torch.inference_mode():
        model, *others = comfy.sd.load_checkpoint_guess_config(str(path))[:3]
    if "zero" in kind:  # no SD 2.x file says so; users say it with this node
        model = ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]
    return model, *others


def graph(folder, kind="SD 1.x"):
    """MODEL, CLIP and VAE of a random checkpoint."""
    return load(write_checkpoint(folder / "random.safetensors", kind), kind)
