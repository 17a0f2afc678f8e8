"""Random transformers of the families that train on the host's own modules: few values, the real key layout.

No test in here.
"""

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models as supported
import comfy.supported_models_base
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_image
import comfy.text_encoders.z_image
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

from .random_sd import random_state

WIDTH = 32  # of the text encoders
QWEN = {
    "vocab_size": 151936,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class RandomQwen3(comfy.text_encoders.z_image.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None, **options):
        super().__init__(
            device=device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config=QWEN,
            special_tokens={"pad": 151643},
            layer_norm_hidden_state=False,
            model_class=comfy.text_encoders.llama.Qwen3_4B,
            enable_attention_masks=True,
            return_attention_masks=True,
            model_options=model_options or {},
        )


class RandomZImageClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, dtype=dtype, name="qwen3_4b", clip_model=RandomQwen3, model_options=model_options or {}
        )


class RandomZImage(supported.ZImage):
    # 256 is the narrowest that its modulation allows; the demo's has other text.
    unet_config = {"image_model": "lumina2", "dim": 256, "cap_feat_dim": WIDTH}
    unet_extra_config = {
        "n_heads": 8,
        "n_kv_heads": 8,
        "axes_dims": [16, 8, 8],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 1.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.text_encoders.z_image.ZImageTokenizer, RandomZImageClip)


class RandomLumina2(supported.Lumina2):
    unet_config = {"image_model": "lumina2", "dim": 96}
    unet_extra_config = {
        "n_heads": 4,
        "n_kv_heads": 2,
        "axes_dims": [8, 8, 8],
        "axes_lens": [300, 512, 512],
        "rope_theta": 10000.0,
        "ffn_dim_multiplier": 1.0,
    }


class RandomQwenImage(supported.QwenImage):
    unet_config = {"image_model": "qwen_image", "num_layers": 2}
    unet_extra_config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "joint_attention_dim": WIDTH,
    }


class RandomKrea2(supported.Krea2):
    unet_config = {"image_model": "krea2", "features": 128}
    unet_extra_config = {"txtheads": 2, "txtkvheads": 2}


class RandomChroma(supported.Chroma):
    unet_config = {"image_model": "chroma", "hidden_size": 128}
    unet_extra_config = {"hidden_dim": 32, "out_dim": 128, "n_layers": 1}


FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": WIDTH,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
CHROMA = {
    **{name: value for name, value in FLUX.items() if name != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "vec_in_dim": None,
    **RandomChroma.unet_extra_config,
}
FLUX2 = {
    **FLUX,
    "image_model": "flux2",
    "depth": 1,  # its text is padded to 512 tokens
    "depth_single_blocks": 1,
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
NEXT_DIT = {"patch_size": 2, "in_channels": 16, "n_layers": 2, "qk_norm": True}
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 24,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": WIDTH, "out_features": 128},
    },
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
# A family's name -> the host's class and its transformer's arguments.
LAYOUTS = {
    "Z-Image": (
        RandomZImage,
        {"image_model": "lumina2", **NEXT_DIT, "dim": 256, "cap_feat_dim": WIDTH, **RandomZImage.unet_extra_config},
    ),
    "Lumina Image 2": (
        RandomLumina2,
        {"image_model": "lumina2", **NEXT_DIT, "dim": 96, "cap_feat_dim": WIDTH, **RandomLumina2.unet_extra_config},
    ),
    "Qwen-Image": (
        RandomQwenImage,
        {"image_model": "qwen_image", "num_layers": 2, **RandomQwenImage.unet_extra_config},
    ),
    "Krea 2": (
        RandomKrea2,
        {
            "image_model": "krea2",
            "features": 128,
            "channels": 16,
            "patch": 2,
            "layers": 2,
            "heads": 1,
            "kvheads": 1,
            "txtlayers": 2,
            "txtdim": WIDTH,
            **RandomKrea2.unet_extra_config,
        },
    ),
    "Flux.1": (supported.Flux, FLUX),
    "Flux.2": (supported.Flux2, FLUX2),
    "SD 3": (supported.SD3, SD3),
    "Chroma": (RandomChroma, CHROMA),
}
PREFIX = "model.diffusion_model."


def register():
    """Teaches ComfyUI the small widths."""
    for kind, _ in LAYOUTS.values():
        if all(model.__name__ != kind.__name__ for model in supported.models):
            supported.models.insert(0, kind)


def transformer(family, generator):
    """Weights of a family's transformer, in the keys of its files without a prefix."""
    kind, layout = LAYOUTS[family]
    config = kind(dict(layout))
    config.set_inference_dtype(torch.float32, None)
    module = config.get_model({}, device="cpu").diffusion_model
    return random_state(module, generator)


def write_transformer(path, family, seed=0, scaled_fp8=False):
    """The file that UNETLoader reads."""
    state = transformer(family, torch.Generator().manual_seed(seed))
    state = quantized(state) if scaled_fp8 else state
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def quantized(state):
    """The same file with matrices in float8, each divided by a scale that stands next to it."""
    found = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if value.ndim == 2 and "blocks." in name:
            scale = value.abs().max() / 448
            found[name] = (value / scale).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".scale_weight")] = scale
        else:
            found[name] = value
    return found


def write_checkpoint(path, family="Z-Image", seed=0):
    """A file with the transformer, its text encoder and a small autoencoder of 16 channels."""
    generator = torch.Generator().manual_seed(seed)
    state = {PREFIX + name: value for name, value in transformer(family, generator).items()}
    encoder = RandomQwen3(dtype=torch.float32).transformer
    parts = {"text_encoders.qwen3_4b.transformer.": encoder, "vae.": TAESD(latent_channels=16)}
    for prefix, module in parts.items():
        state |= {prefix + name: value for name, value in random_state(module, generator).items()}
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def write_vae(models, family, seed=0):
    """Files of a small autoencoder of the kind and the channels that the family's has; its name for VAELoader.

    Args:
        models: the host's folder of models.
    """
    generator, name = torch.Generator().manual_seed(seed), f"random {family}.safetensors"
    if family in ("Qwen-Image", "Krea 2"):  # of videos
        kinds = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0}
        module = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True], **kinds)
    else:
        module = TAESD(latent_channels=128 if family == "Flux.2" else 16)
    state = random_state(module, generator)
    if family == "Flux.2":  # only under this name the loader takes it for one of 128 channels
        for part in ("encoder", "decoder"):
            keys = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"taesd_{part}")}
            save_file(keys, models / "vae_approx" / f"taef2_{part}.safetensors")
        return "taef2"
    save_file(state, models / "vae" / name)
    return name


def load_transformer(path, **options):
    """The MODEL of UNETLoader: made in inference mode."""
    register()
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), model_options=options)


def load(path):
    """MODEL, CLIP and VAE of CheckpointLoaderSimple."""
    register()
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path))[:3]


class RandomText:
    """A CLIP whose conditioning is random numbers of a prompt's own."""

    def __init__(self, family):
        self.family = family
        self.width = WIDTH * (2 if family == "Krea 2" else 1)  # of two layers there

    def tokenize(self, prompt):
        return prompt

    def encode_from_tokens_scheduled(self, prompt):
        generator = torch.Generator().manual_seed(len(prompt))
        hidden = torch.randn(1, 7, self.width, generator=generator)
        pooled = torch.randn(1, 24, generator=generator)
        mask = torch.ones(1, 7, dtype=torch.long)
        return [[hidden, {"pooled_output": pooled, "attention_mask": mask}]]


class RandomTextCLIP(RandomText, comfy.sd.CLIP):
    """A CLIP with random text that the host's nodes take, `made_of` another CLIP."""

    @classmethod
    def made_of(cls, clip, family):
        made = comfy.sd.CLIP.clone(clip)
        made.__class__ = cls
        RandomText.__init__(made, family)
        return made

    def clone(self, *args, **options):
        return self.made_of(self, self.family)


def models(folder, family, text=""):
    """A family's transformer as `FlowModels`, without an autoencoder; with random text, or that of another family."""
    model = load_transformer(write_transformer(folder / "transformer.safetensors", family))
    return models_of(model, family, RandomText(text or family))


def models_of(model, family, clip=None):
    """`FlowModels` of a MODEL; without a CLIP, with random text of its family's width."""
    from personalize.nodes.host import native
    from personalize.nodes.host.models import FLOWS, GraphModels, alphas_of

    alphas = alphas_of(model.get_model_object("model_sampling").sigmas)
    row = next(row for row in FLOWS.values() if row and row.name == family)
    graph = GraphModels(model, clip or RandomText(family), None, row, "flow", alphas)
    return native.read_models(graph, lambda sentence: None)
