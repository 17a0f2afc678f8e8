"""T-LoRA on transformers: do training, previews and the returned MODEL have the ranks of each noise level?

Tiny random transformers in their files' layouts.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from personalize.nodes.host import full_precision, session, weights
from personalize.tests.support import random_native, saved
from personalize.trainers.data.concept import Concept
from personalize.trainers.formats import kohya
from personalize.trainers.models import gradient_check
from personalize.trainers.models.timestep_lora import RankSchedule, TimestepLoRA, add_timestep_lora
from personalize.trainers.recipes.t_lora import TLoRA
from personalize.trainers.runs import restore, train
from personalize.trainers.runs.run import Run
from personalize.trainers.training import trainables

pytestmark = pytest.mark.comfy
PROMPT = "a photo of sks dog"
TIMESTEPS = (20, 400, 950)
SCHEDULE = RankSchedule(rank=8, min_rank=1)
RECIPE = TLoRA(steps=2, views=2, lora_rank=8, min_rank=1, learning_rate=3e-2)
CONCEPT = Concept(
    images=(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5)),),
    resolution=64,
    placeholder_token="sks",
)


@pytest.fixture(autouse=True)
def gradients():
    """As in a training session."""
    with session.operations_with_gradients():
        yield


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """MODEL, CLIP, VAE of a random Z-Image."""
    folder = tmp_path_factory.mktemp("random")
    return random_native.load(random_native.write_checkpoint(folder / "zimage.safetensors"))


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    """The models after a short training with large steps, and its result."""
    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        return models, train.train(Run(concept=CONCEPT, recipe=RECIPE), models, tmp_path_factory.mktemp("run"))


def with_t_lora(models, prompt=PROMPT):
    """Parameters of a T-LoRA that adds something, once their gradient is checked."""
    layers = trainables.attention_layers(models)
    added = add_timestep_lora(models, layers, SCHEDULE, torch.Generator().manual_seed(0))
    params = gradient_check.reached(models, added, prompt)
    for part in params:
        part.data += 0.05 * torch.randn(part.shape, generator=torch.Generator().manual_seed(1))
    return params


def latents(models, count=1):
    return torch.randn(2, models.channels, 8, 8, generator=torch.Generator().manual_seed(2))[:count]


@torch.no_grad()
def ours(models, timestep):
    """The velocity of the first of two samples, whose noise levels differ."""
    both = torch.tensor([timestep, 500])
    return models.predict(latents(models, 2), both, models.encode_prompts([PROMPT] * 2))[:1]


def hosts(models, model, timestep):
    """The velocity of a MODEL, called as the host's samplers call it."""
    import comfy.model_management as mm

    models.tokenize([PROMPT])
    network, x, sigma = models.network, latents(models), models.sigmas[[timestep]]
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    conditions = network._conditions(PROMPT, x)
    with torch.inference_mode():
        mm.load_models_gpu([model])
        clean = model.model.apply_model(network._with_frame(x), sigma, **conditions, transformer_options=options)
    return (x - network._without_frame(clean).clone()) / sigma


def assert_same_at_every_level(models, model, base):
    for t in TIMESTEPS:
        target, effect = ours(models, t), (ours(models, t) - hosts(models, base, t)).abs().max()
        difference = (hosts(models, model, t) - target).abs().max()
        print(f"timestep {t}: difference {difference:.1e}, effect {effect:.1e}")
        assert effect > 1e-3 and difference < 0.02 * effect


LAYERS = {
    "Z-Image": 2 * 6,
    "Lumina Image 2": 2 * 6,
    "Qwen-Image": 8 * 2,
    "Krea 2": 5 * 2,
    "Flux.1": 4 * 2 + 2 * 2,
    "Flux.2": 4 + 2,
    "SD 3": 2 * 4 - 1,  # the last block has no output for the text
    "Chroma": 4 * 2 + 2 * 2,
}


@pytest.mark.parametrize("family", LAYERS)
def test_attention_of_every_family_learns_and_the_host_computes_the_same(tmp_path, family):
    """The gradient is right, the MODEL has the ranks of each noise level, and every key belongs to a weight."""
    from personalize.nodes.host import internals

    models = random_native.models(tmp_path, family)
    assert with_t_lora(models)
    base, lora = models.network.patcher.parent, kohya.lora(models)
    keys = internals.model_lora_keys_unet(base.model, {})
    assert len(lora) == 3 * LAYERS[family] and {key.partition(".")[0] for key in lora} <= keys.keys()
    model = base.clone()
    full_precision.add(model, lora, keys, 1.0, SCHEDULE)
    assert_same_at_every_level(models, model, base)


def test_a_base_in_float8(tmp_path):
    """The LoRA computes in its input's precision; the base through its own forward pass."""
    from personalize.nodes.host import internals

    path = random_native.write_transformer(tmp_path / "qwen.safetensors", "Qwen-Image", scaled_fp8=True)
    base = random_native.load_transformer(path)
    models = random_native.models_of(base, "Qwen-Image")
    assert with_t_lora(models)
    model = base.clone()
    full_precision.add(model, kohya.lora(models), internals.model_lora_keys_unet(base.model, {}), 1.0, SCHEDULE)
    assert_same_at_every_level(models, model, base)


def test_one_step_is_the_formula(tmp_path):
    """Gradients of A, S and B from that of the whole matrix, for two noise levels in one batch."""
    models = random_native.models(tmp_path, "Z-Image")
    params = with_t_lora(models)
    layers = [layer for layer in models.unet.modules() if isinstance(layer, TimestepLoRA)]
    caught = {}
    for layer in layers:
        layer.register_forward_hook(lambda m, args, y: caught.update({m: (args[0].detach(), y)}) or y.retain_grad())
    timesteps = torch.tensor([100, 900])
    encoding = models.encode_prompts([PROMPT] * 2)
    models.predict(latents(models, 2), timesteps, encoding).square().mean().backward()
    assert len(params) == 3 * len(layers) == 3 * len(caught)
    for layer, (x, y) in caught.items():
        down, scale, up = (part.detach() for part in (layer.lora_down, layer.lora_scale, layer.lora_up))
        expected = [torch.zeros_like(part) for part in (down, scale, up)]
        for row, t in enumerate(timesteps):
            ranks = int((1 - models.sigmas[t].item()) * 7) + 1
            mask = torch.diag(torch.tensor([1.0] * ranks + [0.0] * (8 - ranks)))
            initial = layer.initial_up @ mask @ layer.initial_down
            whole = layer.base_layer.weight + up @ torch.diag(scale) @ mask @ down - initial
            torch.testing.assert_close(
                y[row], torch.nn.functional.linear(x[row], whole, layer.base_layer.bias), atol=1e-4, rtol=1e-4
            )
            of_matrix = y.grad[row].T @ x[row]
            expected[0] += (up @ torch.diag(scale) @ mask).T @ of_matrix
            expected[1] += (up.T @ of_matrix @ down.T @ mask).diagonal()
            expected[2] += of_matrix @ (torch.diag(scale) @ mask @ down).T
        for part, gradient in zip((layer.lora_down, layer.lora_scale, layer.lora_up), expected, strict=True):
            torch.testing.assert_close(part.grad, gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-3)


def test_gradient_checkpointing_runs_each_sample_again_with_its_own_ranks(tmp_path):
    """Samples of two prompts go through the network one after the other, both before the backward pass."""
    models = random_native.models(tmp_path, "Z-Image")
    params = with_t_lora(models)
    found = []
    for checkpointing in (False, True):
        models.save_memory(checkpointing)
        encoding = models.encode_prompts([PROMPT, "another"])
        prediction = models.predict(latents(models, 2), torch.tensor([100, 900]), encoding)
        found.append(torch.autograd.grad(prediction.square().mean(), params))
        models.save_memory(False)
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_the_model_keeps_the_schedule_applied_and_loaded_again(graph, trained, model_folders):
    """At full rank it would be another; the base stays as it was."""
    from personalize.nodes.apply import apply

    models, result = trained
    base = {t: hosts(models, graph[0], t) for t in TIMESTEPS}
    saved.save(result)
    loaded = saved.load(graph, "mine.safetensors")
    assert result.rank_schedule == loaded[2].rank_schedule == SCHEDULE and not result.tokens
    for model in (apply(*graph[:2], result)[0], loaded[0]):
        assert_same_at_every_level(models, model, graph[0])
    always = dataclasses.replace(result, rank_schedule=RankSchedule(rank=8, min_rank=8))
    whole = hosts(models, apply(*graph[:2], always)[0], 950)
    assert (whole - ours(models, 950)).abs().max() > 0.2 * (whole - base[950]).abs().max()
    assert all(torch.equal(hosts(models, graph[0], t), base[t]) for t in TIMESTEPS)


def test_previews_are_images_of_the_returned_model(graph, trained):
    from comfy.sample import prepare_noise

    from personalize.nodes.apply import apply
    from personalize.nodes.host import internals

    models, result = trained
    (preview,) = models.network.generate([PROMPT], [3], size=(64, 64), steps=4, guidance=2.0)

    def image(given):
        model, clip = apply(*graph[:2], given)
        noise = prepare_noise(torch.zeros(1, 16, 8, 8), 3)
        with torch.inference_mode():
            texts = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
            drawn = internals.sample(
                model, noise, 4, 2.0, "euler", "simple", *texts, torch.zeros_like(noise), disable_pbar=True, seed=3
            )
        return models.network.pixels(drawn)[0]

    always = dataclasses.replace(result, rank_schedule=RankSchedule(rank=8, min_rank=8))
    same, whole = ((image(given) - preview).abs().max() for given in (result, always))
    print(f"difference {same:.1e}, at full rank {whole:.1e}")
    assert same < 0.02 * whole


def test_the_stock_loader_uses_every_key_at_full_rank(graph, trained, model_folders):
    from personalize.nodes.apply import apply

    models, result = trained
    saved.save(result)
    file = load_file(model_folders["loras"] / "mine.safetensors")
    (model, _), used = saved.stock(graph, file)
    assert used == {*file}
    always = dataclasses.replace(result, rank_schedule=RankSchedule(rank=8, min_rank=8))
    expected = hosts(models, apply(*graph[:2], always)[0], 950)
    assert (hosts(models, model, 950) - expected).abs().max() < 0.02 * (expected - ours(models, 950)).abs().max()


def test_a_result_put_into_fresh_models_computes_the_same_bits(graph, trained):
    models, result = trained
    with session.training_session():
        fresh = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        restore.put(result, fresh)
    assert all(torch.equal(ours(fresh, t), ours(models, t)) for t in TIMESTEPS)
