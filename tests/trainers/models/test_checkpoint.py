"""Checkpoints without the host: does a file in a family's real layout become the same models as inside ComfyUI?"""

import inspect
import json
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

KINDS = ("SD 1.x", "SD 2.x epsilon", "SD 2.x v", "SDXL", "SDXL v with zero terminal SNR")
FAMILIES = ("SD 1.x", "SD 2.x", "SDXL")


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """What a random checkpoint becomes here, with its text encoders rounded as the host keeps them, and there."""
    from personalize.nodes.host import session, weights
    from personalize.tests.support import random_sd
    from personalize.trainers.models.checkpoint import load_models

    path = random_sd.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random.safetensors", request.param)
    ours = load_models(path, random_sd.layout(request.param)[0], random_sd.HEADS).to("cpu", torch.float32)
    for encoder in ours.text_encoders:
        encoder.half().float()
    with session.training_session():
        return ours, weights.read_models(weights.GraphModels.of(*random_sd.load(path, request.param)), torch.float32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """MODEL, CLIP and VAE of a random SD 1.x."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def kl_vae():
    """A random autoencoder of Stable Diffusion's own shape, loaded by the host."""
    import comfy.sd
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    return comfy.sd.VAE(sd={key: value.clone() for key, value in vae.state_dict().items()})


def test_a_file_is_the_family_that_the_host_sees(both):
    ours, theirs = both
    assert ours.family == theirs.family and ours.prediction_type == theirs.prediction_type
    assert ours.resolution == theirs.resolution
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert [e.layer for e in ours.text_encoders] == [e.layer for e in theirs.text_encoders]


@torch.no_grad()
def test_prompts_of_a_file_are_encoded_as_by_the_host(both):
    """Ids with their padding, the hidden states of each encoder at every position, and the pooled output."""
    ours, theirs = both
    prompts = ["a photo of a dog", ""]
    assert torch.equal(ours.tokenize(prompts), theirs.tokenize(prompts))
    mine, hosts = ours.encode_prompts(prompts), theirs.encode_prompts(prompts)
    assert len(mine.parts) == len(hosts.parts)
    for part, hosts_part in zip(mine.parts, hosts.parts):
        assert torch.allclose(part, hosts_part, atol=1e-4)
    assert (mine.pooled is None) == (hosts.pooled is None)
    assert mine.pooled is None or torch.allclose(mine.pooled, hosts.pooled, atol=1e-4)


@torch.no_grad()
def test_latents_of_a_file_are_drawn_as_by_the_host(both):
    """The U-Net's prediction, and the autoencoder both ways in the family's scale."""
    ours, theirs = both
    latents, t, pixels = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.rand(1, 3, 64, 64)
    states = theirs.encode_prompts(["a photo of a dog"])
    assert torch.allclose(ours.predict(latents, t, states), theirs.predict(latents, t, states), atol=1e-4)
    assert torch.allclose(ours.encode_images(pixels)[0], theirs.encode_images(pixels)[0], atol=1e-4)
    assert torch.allclose(ours.decode_latents(latents), theirs.decode_latents(latents), atol=1e-3)


def test_kl_autoencoder_equals_the_hosts(graph, kl_vae):
    """Mean, deviation and decoding of the real autoencoder's layout, from a file and through the host."""
    from personalize.nodes.host import session, weights
    from personalize.trainers.models.autoencoder import build_vae

    model, clip, _ = graph
    pixels, latents = torch.rand(2, 3, 64, 64), torch.randn(1, 4, 8, 8)
    encode, decode = build_vae(dict(kl_vae.first_stage_model.state_dict()), 0.18215)
    with session.training_session():
        theirs = weights.read_models(weights.GraphModels.of(model, clip, kl_vae), torch.float32)
    with torch.no_grad():
        (mean, std), (host_mean, host_std) = encode(pixels), theirs.encode_images(pixels)
        assert torch.allclose(mean, host_mean, atol=1e-5) and torch.allclose(std, host_std, atol=1e-5)
        assert torch.allclose(decode(latents), theirs.decode_latents(latents), atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(mean, kl_vae.encode(pixels.movedim(1, -1)) * 0.18215, atol=1e-5)
    assert std.min() > 0 and not torch.allclose(std, torch.ones_like(std))


def test_a_image_goes_through_the_encoder_once_and_in_parts_that_fit(graph, kl_vae, monkeypatch):
    from personalize.nodes.host import session, weights

    seen, pixels = [], torch.rand(3, 3, 64, 64)
    with session.training_session():
        encode = weights.read_models(weights.GraphModels.of(*graph[:2], kl_vae), torch.float32).encode_images
    counting = kl_vae.first_stage_model.encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    try:
        whole = encode(pixels)
        monkeypatch.setattr(kl_vae, "memory_used_encode", lambda shape, dtype: 2.0**50)  # the host's own estimate
        parts = encode(pixels)
    finally:
        counting.remove()
    assert seen == [3, 1, 1, 1]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(whole, parts, strict=True))


def test_reading_initialises_nothing_at_random(tmp_path):
    """Not a number is drawn, and nothing is left without memory."""
    from personalize.tests.support import random_sd
    from personalize.trainers.models.checkpoint import load_models

    file = random_sd.write_checkpoint(tmp_path / "random.safetensors", "SDXL")
    before = torch.get_rng_state()
    models = load_models(file, random_sd.layout("SDXL")[0], random_sd.HEADS)
    assert torch.equal(torch.get_rng_state(), before)
    for module in (models.unet, *models.text_encoders):
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _write(path, change, kind="SD 1.x"):
    """A random checkpoint after `change` of its state dict."""
    from safetensors.torch import load_file, save_file

    from personalize.tests.support import random_sd

    state = load_file(random_sd.write_checkpoint(path, kind))
    change(state)
    save_file(state, path)


def _without(*prefixes):
    def change(state):
        for key in [key for key in state if key.startswith(prefixes)]:
            del state[key]

    return change


def _as_refiner(state):
    """The refiner has one text encoder, where SDXL has its first."""
    second = "conditioner.embedders.1."
    for key in [key for key in state if key.startswith("conditioner.")]:
        value = state.pop(key)
        if key.startswith(second):
            state[f"conditioner.embedders.0.{key.removeprefix(second)}"] = value


def _for_inpainting(state):
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)


def _as_lora(state):
    state.clear()
    state["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"] = torch.zeros(4, 32)


def _as_sd3(state):
    state.clear()
    state["model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight"] = torch.zeros(4, 4)
    state["text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"] = torch.zeros(4)


def _without_a_block(state):
    _without("model.diffusion_model.input_blocks.8.")(state)


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (_as_lora, "SD 1.x", "it is a LoRA"),
        (_as_sd3, "SD 1.x", "it has no U-Net of SD 1.x, SD 2.x or SDXL"),
        (_for_inpainting, "SD 1.x", "its U-Net reads 9 channels instead of 4"),
        (_as_refiner, "SDXL", "it lacks the text encoders .*refiner"),
        (_without("conditioner.embedders.1.model.text_projection"), "SDXL", "it lacks .* text_projection"),
        (_without("first_stage_model."), "SD 2.x v", "it lacks the autoencoder"),
        (_without_a_block, "SDXL", "its U-Net is not SDXL's"),
        (lambda state: state.update({"edm_mean": torch.zeros(4)}), "SDXL", "its noise schedule is EDM's"),
    ],
)
def test_a_file_that_cannot_be_trained_says_why(tmp_path, change, kind, reason):
    from personalize.tests.support import random_sd
    from personalize.trainers.models.checkpoint import load_models

    _write(tmp_path / "odd.safetensors", change, kind)
    with pytest.raises(ValueError, match=f"^odd.safetensors cannot be trained: {reason}"):
        load_models(tmp_path / "odd.safetensors", random_sd.layout(kind)[0], random_sd.HEADS)


def test_a_file_in_another_format_says_so(tmp_path):
    from personalize.trainers.models.checkpoint import load_models

    (tmp_path / "old.ckpt").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="^old.ckpt cannot be trained: it is not a safetensors file"):
        load_models(tmp_path / "old.ckpt")


def test_text_encoders_of_old_files_are_read(tmp_path):
    """Some SD 1.x files leave out "text_model." in their names."""
    from personalize.tests.support import random_sd
    from personalize.trainers.models.checkpoint import load_models

    def shorten(state):
        for key in [key for key in state if ".text_model." in key]:
            state[key.replace(".text_model.", ".")] = state.pop(key)
        del state["cond_stage_model.transformer.text_projection.weight"]  # no such file has it

    new = random_sd.write_checkpoint(tmp_path / "new.safetensors")
    _write(tmp_path / "old.safetensors", shorten)
    old, new = (
        load_models(path, random_sd.UNET, random_sd.HEADS).text_encoders[0].state_dict()
        for path in (tmp_path / "old.safetensors", new)
    )
    assert all(torch.equal(old[key], new[key]) for key in new)


@pytest.mark.parametrize(
    ("kind", "count", "size"),
    [("SD 1.x", 686, 859_520_964), ("SD 2.x", 686, 865_910_724), ("SDXL", 1680, 2_567_463_684)],
)
def test_every_key_of_the_real_unet_has_a_place(kind, count, size):
    """The U-Net's weights at full size, without allocating them: all mapped, none left over."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from personalize.trainers.models.checkpoint import LAYOUTS
    from personalize.trainers.models.diffusion import build_unet

    unet = next(layout.unet for layout in LAYOUTS if layout.family.name == kind)
    depths = unet["transformer_depth"]
    per_level = unet["num_res_blocks"][0]
    back = [depth for level in range(0, len(depths), per_level) for depth in [depths[level]] * (per_level + 1)]
    layout = unet | {"image_size": 32, "use_spatial_transformer": True, "legacy": False}
    if "adm_in_channels" in unet:
        layout["num_classes"] = "sequential"
    theirs = UNetModel(
        **layout | {"transformer_depth_output": back}, device="meta", operations=comfy.ops.disable_weight_init
    ).state_dict()
    ours = build_unet(theirs, unet).state_dict()
    assert len(theirs) == len(ours) == count
    assert sum(v.numel() for v in ours.values()) == sum(v.numel() for v in theirs.values()) == size


def _real_text_encoders(kind):
    """The family's text encoders in the host, at full size without memory, as a file keeps them."""
    import comfy.clip_model
    import comfy.ops
    import comfy.sd1_clip
    import comfy.supported_models as known

    files = {"clip_l": "sd1_clip_config", "clip_h": "text_encoders/sd2_clip_config", "clip_g": "clip_config_bigg"}
    folder = Path(inspect.getfile(comfy.sd1_clip.SDClipModel)).parent
    state = {}
    for name in {"SD 1.x": ("clip_l",), "SD 2.x": ("clip_h",), "SDXL": ("clip_l", "clip_g")}[kind]:
        config = json.loads((folder / f"{files[name]}.json").read_text())
        module = comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", comfy.ops.disable_weight_init)
        state |= {f"{name}.transformer.{key}": value for key, value in module.state_dict().items()}
    model = {"SD 1.x": known.SD15, "SD 2.x": known.SD20, "SDXL": known.SDXL}[kind]
    return model.process_clip_state_dict_for_saving(None, state)


# Layers of 16 tensors, two norms' worth at the end, and two embeddings; OpenCLIP's join three projections into one.
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("SD 1.x", [(196, 12, 123_060_480)]),
        ("SD 2.x", [(388, 16, 352_984_064)]),
        ("SDXL", [(196, 12, 123_060_480), (516, 20, 693_021_440)]),
    ],
)
def test_every_key_of_the_real_text_encoders_has_a_place(kind, sizes):
    from personalize.trainers.models.checkpoint import LAYOUTS, text_encoder

    layout = next(layout for layout in LAYOUTS if layout.family.name == kind)
    state, used = _real_text_encoders(kind), 0
    for prefix, (count, heads, size) in zip(layout.text_encoders, sizes, strict=True):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        used += len(part)
        with torch.device("meta"):
            encoder = text_encoder(part, layout.family, None, open_clip=prefix.endswith("model."))
        parameters = dict(encoder.named_parameters())
        assert len(parameters) == count and sum(p.numel() for p in parameters.values()) == size
        assert encoder.text_model.config.num_attention_heads == heads
        assert (encoder.projection is not None) == (kind == "SDXL" and heads == 20)
    assert used == len(state)
