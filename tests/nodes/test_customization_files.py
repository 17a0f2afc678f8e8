"""What the three customisation methods learned, on the host: Train's own way, saved files, and the stock loader.

With small random checkpoints of every family's real key layout.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from personalize.tests.support import saved
from personalize.tests.trainers.recipes.test_customization import RECIPES
from personalize.trainers.data.concept import Concept
from personalize.trainers.models.diffusion import Encoding
from personalize.trainers.runs import train
from personalize.trainers.runs.run import Run

pytestmark = pytest.mark.comfy
LARGE = {
    "textual inversion": 0.1,
    "dreambooth-lora": 1e-2,
    "custom diffusion": 1e-3,
}


@pytest.fixture(scope="module", params=("SD 1.x", "SD 2.x epsilon", "SDXL"))
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture(scope="module", params=LARGE)
def trained(graph, tmp_path_factory, request):
    """The models after a short training with large steps, its result, and the method."""
    from personalize.nodes.host import session, weights

    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    concept = Concept(images=(picture,), resolution=64, placeholder_token="<thing>")
    recipe = dataclasses.replace(RECIPES[request.param], learning_rate=LARGE[request.param])
    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        run = Run(concept=concept, recipe=recipe)
        return models, train.train(run, models, tmp_path_factory.mktemp("run")), request.param


def ours(models):
    """Our U-Net's output for what `saved.unet` gives the host's."""
    g = torch.Generator().manual_seed(1)
    widths = [encoder.embedding.weight.shape[1] for encoder in models.text_encoders]
    context = torch.randn(2, 77, sum(widths), generator=g)
    projection = models.text_encoders[-1].projection
    y = None if projection is None else torch.randn(2, len(projection) + 6 * 256, generator=g)
    latents = torch.randn(2, 4, 16, 16, generator=g)
    with torch.no_grad():
        if y is None:
            return models.predict(latents, torch.tensor([3, 801]), Encoding(parts=(context,)))
        caught = models.unet.add_embedding.register_forward_pre_hook(lambda module, args: (y,))
        pooled = Encoding(parts=(context,), pooled=y[:, : len(projection)])
        output = models.predict(latents, torch.tensor([3, 801]), pooled)
        caught.remove()
        return output


def test_what_was_trained_is_what_the_host_computes(graph, trained, model_folders):
    """Applied, saved and loaded by the stock loader, and from the one complete file; the base stays as it was."""
    from personalize.nodes.apply import apply

    models, result, method = trained
    before, words_before = saved.unet(graph[0]), saved.words(graph[1])
    target = ours(models)
    effect = (target - before).abs().max()
    output = saved.save(result).result
    lora, embedding = (model_folders[kind] / "mine.safetensors" for kind in ("loras", "embeddings"))
    assert embedding.exists() and output[1] == "embedding:mine"
    assert lora.exists() == bool(output[0]) == (method != "textual inversion")
    applied = {"apply": apply(*graph[:2], result)[0]}
    applied["complete"] = saved.load(graph, "mine.safetensors")[0]
    if method == "textual inversion":
        assert result.lora == {} and effect < 1e-4
    else:
        (model, _), used = saved.stock(graph, load_file(lora))
        applied["stock"] = model
        assert method == "custom diffusion" or used == {*load_file(lora)}  # of differences the host keeps no such list
        assert effect > 0.01
    for name, model in applied.items():
        difference = (saved.unet(model) - target).abs().max()
        print(f"{method}, {name}: difference {difference:.1e}, effect {effect:.1e}")
        assert difference < max(0.02 * effect, 1e-4)
    assert torch.equal(saved.unet(graph[0]), before) and torch.equal(saved.words(graph[1]), words_before)


def test_the_word_is_what_was_trained(graph, trained, model_folders):
    """In the returned CLIP and in the embedding's file."""
    from personalize.nodes.apply import apply

    models, result, _ = trained
    rows = [encoder.embedding.rows.detach() for encoder in models.text_encoders]
    saved.save(result)
    stored = load_file(model_folders["embeddings"] / "mine.safetensors")
    names = ("clip_l", "clip_g") if len(rows) == 2 else ("<thing>",)
    assert saved.same(stored, dict(zip(names, rows, strict=True)))
    clip = apply(*graph[:2], result)[1]
    with torch.no_grad():
        expected = models.encode_prompts(["a photo of a <thing>"]).hidden_states[0]
    difference = (saved.words(clip, "a photo of a <thing>")[0] - expected).abs().max()
    assert difference < 1e-4
    assert (expected - saved.words(graph[1], "a photo of a dog")[0]).abs().max() > 100 * difference
