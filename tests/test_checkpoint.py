"""Checkpoints without the host: does a file in SD 1.x's real layout become the same models as inside ComfyUI?"""

import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from personalize.tests import random_sd

    path = random_sd.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sd1.safetensors")
    return path, random_sd.load(path)


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


def test_models_from_a_file_equal_the_hosts(files):
    from personalize.nodes import host, weights
    from personalize.tests import random_sd
    from personalize.trainers.checkpoint import load_models

    path, graph = files
    ours = load_models(path, random_sd.UNET, random_sd.HEADS).to("cpu", torch.float32)
    with host.training_session():
        theirs = weights.read_models(*graph, torch.float32)
    latents, t, pixels = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        states = theirs.encode_prompts(["a photo of a dog"])
        words = ours.encode_prompts(["a photo of a dog"]).hidden_states
        assert torch.allclose(words, states.hidden_states, atol=1e-2)  # the host keeps float16
        assert torch.allclose(ours.predict(latents, t, states), theirs.predict(latents, t, states), atol=1e-4)
        assert torch.allclose(ours.encode_images(pixels)[0], theirs.encode_images(pixels)[0], atol=1e-4)
        decoded = ours.decode_latents(latents), theirs.decode_latents(latents)
    assert torch.allclose(*decoded, atol=1e-3)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, atol=1e-6)


def test_kl_autoencoder_equals_the_hosts(files, kl_vae):
    """Mean, deviation and decoding of the real autoencoder's layout, from a file and through the host."""
    from personalize.nodes import host, weights
    from personalize.trainers.checkpoint import build_vae

    model, clip, _ = files[1]
    pixels, latents = torch.rand(2, 3, 64, 64), torch.randn(1, 4, 8, 8)
    encode, decode = build_vae(dict(kl_vae.first_stage_model.state_dict()))
    with host.training_session():
        theirs = weights.read_models(model, clip, kl_vae, torch.float32)
    with torch.no_grad():
        (mean, std), (host_mean, host_std) = encode(pixels), theirs.encode_images(pixels)
        assert torch.allclose(mean, host_mean, atol=1e-5) and torch.allclose(std, host_std, atol=1e-5)
        assert torch.allclose(decode(latents), theirs.decode_latents(latents), atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(mean, kl_vae.encode(pixels.movedim(1, -1)) * 0.18215, atol=1e-5)
    assert std.min() > 0 and not torch.allclose(std, torch.ones_like(std))


def test_a_file_that_is_no_checkpoint_says_so(tmp_path):
    from safetensors.torch import save_file

    from personalize.trainers.checkpoint import load_models

    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="odd.safetensors is no SD 1.x checkpoint"):
        load_models(tmp_path / "odd.safetensors")


SD2 = {"num_heads": -1, "num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}


@pytest.mark.parametrize(("family", "size"), [({}, 859_520_964), (SD2, 865_910_724)], ids=["SD 1.5", "SD 2.1"])
def test_every_key_of_the_real_shape_has_a_place(family, size):
    """The 686 U-Net weights at full size, without allocating them: all mapped, none left over."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from personalize.trainers.checkpoint import SD1_UNET
    from personalize.trainers.models import build_unet

    depth_out = [1] * 9 + [0] * 3
    unet = SD1_UNET | family
    layout = unet | {"image_size": 32, "use_spatial_transformer": True, "legacy": False}
    theirs = UNetModel(
        **layout | {"transformer_depth_output": depth_out},
        device="meta",
        operations=comfy.ops.disable_weight_init,
    ).state_dict()
    ours = build_unet(theirs, unet).state_dict()
    assert len(theirs) == len(ours) == 686
    assert sum(v.numel() for v in ours.values()) == sum(v.numel() for v in theirs.values()) == size
