"""T-LoRA on the host: does the MODEL compute at each timestep what the trained U-Net computes, however it was loaded?

With a small random checkpoint of SD 1.x's real key layout.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from personalize.tests.support import saved
from personalize.tests.trainers.recipes.test_customization import RECIPES
from personalize.trainers.data.concept import Concept
from personalize.trainers.models.diffusion import Encoding
from personalize.trainers.models.timestep_lora import RankSchedule
from personalize.trainers.runs import train
from personalize.trainers.runs.run import Run

pytestmark = pytest.mark.comfy
TIMESTEPS = (3, 500, 981)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), "SD 1.x")


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    """The models after a short training with large steps, and its result."""
    from personalize.nodes.host import session, weights

    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    concept = Concept(images=(picture,), resolution=64, placeholder_token="<thing>")
    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        recipe = dataclasses.replace(RECIPES["t-lora"], min_rank=1, learning_rate=3e-2)
        return models, train.train(Run(concept=concept, recipe=recipe), models, tmp_path_factory.mktemp("run"))


def inputs(width):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 77, width, generator=g)


def ours(models, timestep):
    latents, context = inputs(models.text_encoders[0].embedding.weight.shape[1])
    with torch.no_grad():
        return models.predict(latents, torch.tensor([timestep] * 2), Encoding(parts=(context,)))


@torch.inference_mode()
def hosts(model, timestep):
    """The noise that the host's MODEL predicts, called as its samplers call it."""
    import comfy.model_management as mm

    mm.load_models_gpu([model])
    latents, context = inputs(model.model.model_config.unet_config["context_dim"])
    sigma = model.model.model_sampling.sigmas[[timestep] * 2]
    x = latents * (1 + sigma[:, None, None, None] ** 2).sqrt()  # which the host divides by again
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    clean = model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options)
    return ((x - clean) / sigma[:, None, None, None]).clone()


def test_the_host_computes_what_was_trained_at_every_timestep(graph, trained, model_folders):
    """Applied, and saved and loaded again; the base stays as it was."""
    from personalize.nodes.apply import apply

    models, result = trained
    base = {t: hosts(graph[0], t) for t in TIMESTEPS}
    saved.save(result)
    loaded = saved.load(graph, "mine.safetensors")
    assert result.rank_schedule == loaded[2].rank_schedule == RankSchedule(rank=8, min_rank=1)
    for model in (apply(*graph[:2], result)[0], loaded[0]):
        for t in TIMESTEPS:
            target, effect = ours(models, t), (ours(models, t) - base[t]).abs().max()
            difference = (hosts(model, t) - target).abs().max()
            print(f"timestep {t}: difference {difference:.1e}, effect {effect:.1e}")
            assert difference < 0.02 * effect
    for t in TIMESTEPS:
        assert torch.equal(hosts(graph[0], t), base[t])


def test_the_stock_loader_uses_every_key_at_full_rank(graph, trained, model_folders):
    from personalize.nodes.apply import apply

    _, result = trained
    saved.save(result)
    file = load_file(model_folders["loras"] / "mine.safetensors")
    (model, _), used = saved.stock(graph, file)
    assert used == {*file}
    always = dataclasses.replace(result, rank_schedule=RankSchedule(rank=8, min_rank=8))
    whole, falling = (apply(*graph[:2], each)[0] for each in (always, result))
    expected = hosts(whole, 981)
    effect = (expected - hosts(falling, 981)).abs().max()
    assert (hosts(model, 981) - expected).abs().max() < 0.05 * effect


def test_strength_scales_what_is_added(graph, trained):
    from personalize.nodes.apply import apply

    _, result = trained
    assert torch.equal(hosts(apply(*graph[:2], result, strength_unet=0.0)[0], 500), hosts(graph[0], 500))
