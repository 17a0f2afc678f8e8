"""The demo's transformer: its plain functions and the stored weights against ComfyUI's own network and loader."""

import pytest
import torch
from safetensors.torch import load_file

from personalize.demo import build, export, transformer
from personalize.demo.text import Vocabulary

PROMPTS = ["", "a photo of a black cat with a red hat in the snow"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """MODEL, CLIP and VAE of the stock checkpoint loader."""
    import comfy.sd

    from personalize.demo import architecture

    architecture.register()
    path = build.build_checkpoint(tmp_path_factory.mktemp("demo") / "tiny.safetensors", transformer=True)
    return comfy.sd.load_checkpoint_guess_config(str(path))[:3]


@pytest.mark.comfy
def test_the_host_reads_what_was_trained(loaded, comfyui):
    """The text's hidden states of as many tokens as the prompt has, and the velocity, for two lengths in one batch."""
    model, clip, _ = loaded
    words = Vocabulary(str(comfyui / "comfy" / "sd1_tokenizer"))
    context, lengths = transformer.Captions(export.load_exported(build.WEIGHTS, words)[1], words)(PROMPTS)
    weights = build.unpacked(load_file(build.WEIGHTS / "transformer.safetensors"))
    generator = torch.Generator().manual_seed(0)
    noisy, sigmas = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([0.3, 0.8])
    ours = transformer.velocity(weights, noisy, sigmas, context, lengths, dtype=torch.float32)
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    for i, prompt in enumerate(PROMPTS):
        hidden = clip.encode_from_tokens(clip.tokenize(prompt))
        assert hidden.shape[1] == lengths[i]
        torch.testing.assert_close(hidden[0], context[i, : lengths[i]], atol=1e-5, rtol=0)
        x, level = noisy[i : i + 1], sigmas[i : i + 1]
        denoised = model.model.apply_model(x, level, c_crossattn=hidden, num_tokens=hidden.shape[1])
        torch.testing.assert_close((x - denoised) / level, ours[i : i + 1], atol=1e-3, rtol=0)
        assert ours[i].std() > 0.5


@pytest.mark.comfy
def test_every_weight_of_the_file_is_read(loaded):
    """And none is missing: the names are those of ComfyUI's network."""
    names = loaded[0].model.diffusion_model.state_dict().keys()
    assert names == {*transformer.shapes()}


def test_the_untrained_network_predicts_nothing():
    weights = transformer.untrained_transformer()
    noisy, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 128)
    made = transformer.velocity(weights, noisy, torch.tensor([0.5]), context, torch.tensor([5]), dtype=torch.float32)
    assert made.shape == noisy.shape and not made.any()
