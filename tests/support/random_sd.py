"""Random SD 1.x and 2.x in small widths and the real file layout, loaded by the host's own loader. No test in here."""

import functools

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
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


# Like SDXL: no attention on the first level, more blocks deeper down, pooled text and sizes beside the timestep.
WIDE = 96
UNET_XL = {
    **UNET,
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "context_dim": WIDTH + WIDE,
    "num_heads": -1,
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": WIDE + 6 * 256,
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
    width, final_norm = WIDTH, True

    def __init__(self, device="cpu", dtype=None, layer="hidden", layer_idx=-2, **options):
        config = {**CLIP, "hidden_act": "gelu", "hidden_size": self.width, "intermediate_size": 4 * self.width}
        super().__init__(
            device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config=config,
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            layer_norm_hidden_state=self.final_norm,
            return_projected_pooled=True,
            **options,
        )


class RandomClipG(RandomOpenClip):
    width, final_norm = WIDE, False


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


class RandomSDXLWords(comfy.sdxl_clip.SDXLClipGTokenizer):
    """Embedding files of the small width are read, too."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.embedding_size = WIDE


class RandomSDXLTokenizer(comfy.sdxl_clip.SDXLTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {})
        self.clip_l.embedding_size = WIDTH
        self.clip_g = RandomSDXLWords(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})


class RandomSDXLClip(comfy.sdxl_clip.SDXLClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        torch.nn.Module.__init__(self)
        options = {"device": device, "dtype": dtype, "model_options": model_options or {}}
        self.clip_l = RandomClip(layer="hidden", layer_idx=-2, layer_norm_hidden_state=False, **options)
        self.clip_g = RandomClipG(**options)
        self.dtypes = {dtype}

    def load_sd(self, state):
        width = state["text_model.final_layer_norm.weight"].shape[0]
        return (self.clip_g if width == WIDE else self.clip_l).load_sd(state)


class RandomSDXL(comfy.supported_models.SDXL):
    unet_config = {
        **comfy.supported_models.SDXL.unet_config,
        "model_channels": 32,
        "transformer_depth": UNET_XL["transformer_depth"],
        "context_dim": WIDTH + WIDE,
        "adm_in_channels": UNET_XL["adm_in_channels"],
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 16}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(RandomSDXLTokenizer, RandomSDXLClip)


MODELS = (RandomSD1, RandomSD2, RandomSDXL)
# The U-Net, the autoencoder's scale, and the text encoders by their names in the host.
LAYOUTS = {
    "SD 1.x": (UNET, 0.18215, {"clip_l": RandomClip}),
    "SD 2.x": (UNET2, 0.18215, {"clip_h": RandomOpenClip}),
    "SDXL": (UNET_XL, 0.13025, {"clip_l": RandomClip, "clip_g": RandomClipG}),
}


def layout(kind):
    return LAYOUTS[next(name for name in LAYOUTS if kind.startswith(name))]


def write_checkpoint(path, kind="SD 1.x", seed=0):
    """A single-file checkpoint of the family's real layout whose weights are random but well scaled.

    Args:
        kind: "SD 1.x", "SD 2.x epsilon", "SD 2.x v", "SDXL", "SDXL v"; "with zero terminal SNR" may follow a v.
    """
    save_file(file_state(kind, seed), path)
    return path


@functools.cache
def file_state(kind, seed):
    """What such a file holds, {name: tensor}; to make it takes longer than to write it."""
    unet, scale, encoders = layout(kind)
    parts = {
        "model.diffusion_model.": UNetModel(**unet, operations=comfy.ops.disable_weight_init),
        **{f"{name}.transformer.": encoder().transformer for name, encoder in encoders.items()},
        "first_stage_model.": TAESD(latent_channels=4),
    }
    generator = torch.Generator().manual_seed(seed)
    state = {
        prefix + name: value
        for prefix, module in parts.items()
        for name, value in random_state(module, generator).items()
    }
    state["first_stage_model.vae_scale"] = torch.tensor(scale)
    return _in_its_layout(state, kind)


def _in_its_layout(state, kind):
    """The text encoders under the names that the family's files have, and the signs of v prediction."""
    text = {key: value for key, value in state.items() if key.startswith("clip_")}
    others = {key: value for key, value in state.items() if key not in text}
    predicts_v = "v" in kind.split()
    if kind.startswith("SD 1.x"):
        return others | {key.replace("clip_l.", "cond_stage_model."): value for key, value in text.items()}
    if kind.startswith("SD 2.x"):
        if predicts_v:  # the host tells it by a wide bias in the last block
            others["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"] *= 10
        return others | comfy.supported_models.SD20.process_clip_state_dict_for_saving(None, text)
    others |= {"v_pred": torch.zeros(1)} if predicts_v else {}
    others |= {"ztsnr": torch.zeros(1)} if "zero" in kind else {}
    saved = comfy.supported_models.SDXL.process_clip_state_dict_for_saving(None, text)
    return others | {key: value.contiguous() for key, value in saved.items()}


def random_state(module, generator):
    """Random weights for each of a module's parameters, under their names."""
    return {name: random_weights(name, parameter, generator) for name, parameter in module.named_parameters()}


def random_weights(name, parameter, generator):
    """Matrices scaled by their fan-in and norms near the identity keep activations near one."""
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim >= 2:
        return values / parameter[0].numel() ** 0.5
    return values * 0.02 + float(name.endswith("weight"))  # every weight vector belongs to a norm


def register():
    """Teaches ComfyUI the small widths."""
    for known in MODELS:
        if all(model.__name__ != known.__name__ for model in comfy.supported_models.models):
            comfy.supported_models.models.append(known)


def load(path, kind="SD 1.x"):
    """MODEL, CLIP and VAE, as CheckpointLoaderSimple hands them over: made in inference mode."""
    register()
    with torch.inference_mode():
        model, *others = comfy.sd.load_checkpoint_guess_config(str(path))[:3]
    if kind.startswith("SD 2.x") and "zero" in kind:  # no SD 2.x file says so; users say it with this node
        model = ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]
    return model, *others


def graph(folder, kind="SD 1.x"):
    """MODEL, CLIP and VAE of a random checkpoint."""
    return load(write_checkpoint(folder / "random.safetensors", kind), kind)
