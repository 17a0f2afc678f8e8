"""TextBoost's 2026 revision: what stands before the word stays exactly, and the host computes what was trained.

Against the formula written out, against transformers' own text model and against ComfyUI's forward passes and sampler,
on random models of every family.
"""

import dataclasses

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.models.families import SD2
from personalize.trainers.models.text_encoder import Subject
from personalize.trainers.recipes.textboost_2026 import PRESETS
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run
from personalize.trainers.training import causal_adapters, trainables

KINDS = ("SD 1.x", "SD 2.x epsilon", "SDXL")
LARGE = {"steps": 4, "batch_size": 2, "views": 8, "adapter_learning_rate": 0.05, "embedding_learning_rate": 0.1}
RECIPES = {name: dataclasses.replace(recipe, **LARGE) for name, recipe in PRESETS.items()}
IMAGE = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
CONCEPT = Concept(images=(IMAGE,), placeholder_token="<dog>", initializer_token="red dog", resolution=64)


@pytest.mark.parametrize("padding", [49407, 0])
def test_the_mask_reaches_from_the_word_to_the_end_token(padding):
    start, end, dog, second = 49406, 49407, 49408, 49409
    prompts = [
        [start, 320, dog, second, 530, end, padding, padding],
        [start, dog, end, padding, padding, padding, padding, padding],
        [start, 320, 1929, 530, end, padding, padding, padding],  # no such word
        [start, end, padding, padding, padding, padding, padding, padding],
        [start, 320, dog, 0, 0, dog, second, end],  # 0 is a word of the vocabulary, too
        [start, 320, dog, second, 530, 0, 0, 0],  # cut off: no end token
    ]
    expected = [[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1] + [0] * 5, [0] * 8, [0] * 8, [0, 0] + [1] * 6, [0, 0] + [1] * 6]
    mask = Subject(ids=(dog, second)).find(torch.tensor(prompts))
    assert mask[..., 0].tolist() == expected


@pytest.mark.parametrize("family", [small.SD1, SD2])
def test_an_adapted_layer_is_the_formula(family):
    """`W x + b + m * up(down(x))` in float64, and CLIP's own layer where m is 0."""
    models = small.models(family=family)
    trainables.add_tokens(models.text_encoders[0], [("<dog>", "red dog")])
    before = models.text_encoders[0].text_model.encoder.layers[0].mlp.fc2
    adapters = causal_adapters.add_adapters(models, "<dog>", slice(None), 2, torch.Generator().manual_seed(0), False)
    layer = models.text_encoders[0].text_model.encoder.layers[0].mlp.fc2
    assert len(adapters) == 2 * len(models.text_encoders[0].layers_read)
    down, up = adapters[:2]
    assert down.shape == (2, 64) and up.shape == (32, 2) and not up.any()
    with torch.no_grad():
        up.normal_()
        models.encode_prompts(["a <dog> dog"])
        layer.double()  # with `before`, which it holds: in float32 rounding alone can reach the bound below
        x = torch.randn(1, 77, 64, dtype=torch.float64)
        m = models.subject.mask.double()
        assert m.sum() == 4  # two vectors, the class word and the end token
        weight, bias = before.weight.double(), before.bias.double()
        expected = x.double() @ weight.T + bias + m * (x.double() @ down.double().T @ up.double().T)
        assert (layer(x) - expected).abs().max() < 1e-5
        assert torch.equal(layer(x)[:, :2], before(x)[:, :2])


@pytest.mark.parametrize("preset", RECIPES)
@pytest.mark.parametrize("family", [small.SD1, SD2])
def test_before_the_word_nothing_changes(preset, family, tmp_path):
    """Bit for bit; a prompt without the word does not know of the training.

    An adapter acts from the word to the end token; the layers above carry that on to the padding, where there are any.
    With adapters in the U-Net the last layer that is read has none.
    """
    models = small.models(family=family)
    prompts = ["a photo of a dog in the snow", "", "two cats"]
    with torch.no_grad():
        before = models.encode_prompts(prompts).hidden_states
    training.train(Run(concept=CONCEPT, recipe=RECIPES[preset]), models, tmp_path)
    with torch.no_grad():
        after = models.encode_prompts(prompts).hidden_states
        with_word = models.encode_prompts(["a photo of a <dog> in the snow"]).hidden_states
        for encoder in models.text_encoders:
            for layer in encoder.modules():
                if isinstance(layer, causal_adapters.LowRank):
                    layer.up.zero_()
        vector_alone = models.encode_prompts(["a photo of a <dog> in the snow"]).hidden_states
    assert torch.equal(after, before)
    assert torch.equal(with_word[:, :5], before[:1, :5])  # start token, "a photo of a"
    changed = (with_word != vector_alone).any(dim=-1)[0]
    above = max(len(encoder.layers_read) for encoder in models.text_encoders) > 1
    here = 11 if preset == "2026 CPA" else 5  # two vectors, "in the snow" and the end token
    reach = 77 if above else here
    assert changed.tolist() == [False] * 5 + [True] * (reach - 5) + [False] * (77 - reach)


@pytest.mark.parametrize("preset", RECIPES)
def test_the_presets_are_the_revisions(preset):
    """Uniform timesteps, mean 499.5 (weighted by their signal-to-noise ratio it is 584); vectors of 0.43 at most."""
    models, recipe = small.models(family=SD2), PRESETS[preset]
    stage = next(recipe.stages(models, CONCEPT, torch.Generator().manual_seed(0), Context()))
    assert stage.timesteps(20_000).float().mean().item() == pytest.approx(499.5, abs=8)
    (rows,) = stage.params[0]["params"]
    with torch.no_grad():
        rows.mul_(0.1 / rows.norm(dim=-1, keepdim=True))
        rows[0] *= 20
    stage.after_step()
    assert rows.norm(dim=-1).tolist() == pytest.approx([0.43, 0.1])
    heavy = dataclasses.replace(recipe, augmentations="all", snr_weighted=True, norm_limit=0.0)
    stage = next(heavy.stages(small.models(family=SD2), CONCEPT, torch.Generator().manual_seed(0), Context()))
    assert stage.timesteps(20_000).float().mean().item() == pytest.approx(584, abs=8)


def test_the_last_layer_has_no_adapter_below_those_of_the_cross_attention():
    """With `--expand` the authors' code skips layer 22, the last that is read of SD 2.1's text encoder."""
    for cross_attention, layers in ((False, ["0", "1"]), (True, ["0"])):
        models = small.models()
        trainables.add_tokens(models.text_encoders[0], [("<dog>", "red dog")])
        causal_adapters.add_adapters(models, "<dog>", slice(None), 1, torch.Generator(), cross_attention)
        names = {name.split(".")[4] for name in causal_adapters.tensors(models) if name.startswith("text_encoders")}
        assert sorted(names) == layers


@pytest.mark.parametrize("preset", RECIPES)
def test_the_number_of_parameters_is_the_papers(preset):
    """0.12 M on SD 2.1's text encoder, 0.15 M with the cross-attentions."""
    layers, inner, width, attentions = 22 if preset == "2026++" else 23, 4096, 1024, 16
    adapters = layers * (inner + width) + (attentions * 2 * width if preset == "2026++" else 0)
    assert round(adapters / 1e6, 2) == (0.15 if preset == "2026++" else 0.12)
    models = small.models(family=SD2)
    trainables.add_tokens(models.text_encoders[0], [("<dog>", "red dog")])
    plus = preset == "2026++"
    added = causal_adapters.add_adapters(models, "<dog>", slice(None), 1, torch.Generator(), plus)
    read, blocks = (
        len(models.text_encoders[0].layers_read),
        len(causal_adapters._cross_attentions(models.unet)) if plus else 0,
    )
    assert sum(p.numel() for p in added) == (read - plus) * (64 + 32) + blocks * 2 * 32


def test_what_was_learned_survives_its_folder_and_is_where_the_next_training_begins(tmp_path):
    models = small.models()
    result = training.train(Run(concept=CONCEPT, recipe=RECIPES["2026++"]), models, tmp_path)
    from personalize.trainers.runs.folder import RunFolder

    again = RunFolder(tmp_path).result()
    assert again.adapters.keys() == result.adapters.keys() == causal_adapters.tensors(models).keys()
    assert all(torch.equal(again.adapters[key], value) for key, value in result.adapters.items())
    assert not again.lora and not again.fixed_outputs
    fresh = small.models()
    fresh.known_adapters = {"<dog>": again.adapters}
    trainables.add_tokens(fresh.text_encoders[0], [("<dog>", "red dog")])
    causal_adapters.add_adapters(fresh, "<dog>", slice(None), 1, torch.Generator(), True)
    assert all(torch.equal(value, again.adapters[key]) for key, value in causal_adapters.tensors(fresh).items())


# -- on the host


@pytest.fixture(scope="module", params=KINDS)
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


def train(graph, folder, preset="2026++", **changes):
    """Models after a short training with large steps, and the run's result."""
    from personalize.nodes.host import session, weights

    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        run = Run(concept=dataclasses.replace(CONCEPT, **changes), recipe=RECIPES[preset])
        return models, training.train(run, models, folder)


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    return train(graph, tmp_path_factory.mktemp("run"))


def encode(clip, prompt):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def states(clip, prompt):
    return encode(clip, prompt)[0][0].clone()


def pooled(clip, prompt):
    return encode(clip, prompt)[0][1]["pooled_output"].clone()


@pytest.mark.comfy
def test_returned_clip_equals_the_trained_encoder(graph, trained):
    from personalize.nodes.apply import apply

    models, result = trained
    clip = apply(*graph[:2], result)[1]
    for prompt in ["a photo of <dog>", "<dog> in the snow", "a cat and a <dog> dog", "two cats"]:
        with torch.no_grad():
            ours = models.encode_prompts([prompt])
        effect = (ours.hidden_states - states(graph[1], prompt.replace("<dog>", "red dog"))).abs().max()
        difference = (ours.hidden_states - states(clip, prompt)).abs().max()
        print(f"{prompt!r}: difference {difference:.1e}, effect {effect:.1e}")
        assert difference < 1e-4
        assert effect > 0.5 or "<dog>" not in prompt
        if models.family.pooled:
            assert (ours.pooled - pooled(clip, prompt)).abs().max() < 1e-4


@pytest.mark.comfy
def test_in_the_graph_nothing_changes_before_the_word(graph, trained):
    """Bit for bit; also for weighted words, and in the other chunks of a long prompt."""
    from personalize.nodes.apply import apply

    clip, base = apply(*graph[:2], trained[1])[1], graph[1]
    for prompt in ["", "two cats", "two (cats:1.3)", "a cat, " * 60]:
        assert torch.equal(states(clip, prompt), states(base, prompt))
        assert torch.equal(pooled(clip, prompt), pooled(base, prompt))
    ours, theirs = states(clip, "a (photo:1.2) of a <dog>"), states(base, "a (photo:1.2) of a red dog")
    assert torch.equal(ours[:, :5], theirs[:, :5]) and (ours - theirs)[:, 5:8].abs().amax(-1).min() > 0.1
    long, plain = "a cat, " * 30 + "<dog> " + "a cat, " * 60, "a cat, " * 30 + "red dog " + "a cat, " * 60
    ours, theirs = states(clip, long), states(base, plain)
    changed = (ours != theirs).any(dim=-1)[0].view(-1, 77)
    assert len(changed) == 4 and changed.any(dim=1).tolist() == [False, True, False, False]


@pytest.mark.comfy
def test_a_weighted_word_is_weighted_against_the_empty_prompt(graph, trained):
    """The host's rule, `(z - empty) * weight + empty`, with the base's own empty prompt."""
    from personalize.nodes.apply import apply

    clip = apply(*graph[:2], trained[1])[1]
    plain, weighted, empty = states(clip, "a <dog>"), states(clip, "a (<dog>:1.5)"), states(graph[1], "")
    expected = (plain - empty) * 1.5 + empty
    assert torch.allclose(weighted[:, 2:4], expected[:, 2:4], atol=1e-5)
    assert torch.equal(weighted[:, :2], plain[:, :2])


def denoised(model, positive, negative, shape=(1, 4, 8, 8), cfg=3.0):
    """What the host's own sampler makes of pure noise in one step."""
    import comfy.sample

    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    latent = torch.zeros(shape)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 1, cfg, "euler", "simple", positive, negative, latent, denoise=1.0, disable_pbar=True
        ).clone()


@pytest.mark.comfy
@pytest.mark.parametrize("prompt", ["a photo of <dog>", "two cats"])
def test_the_hosts_sampler_draws_what_the_trained_unet_does(graph, trained, prompt):
    from personalize.nodes.apply import apply

    models, result = trained
    model, clip = apply(*graph[:2], result)
    theirs = denoised(model, encode(clip, prompt), encode(clip, ""))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = model.get_model_object("model_sampling").sigmas[-1]
    x = noise * torch.sqrt(1 + sigma**2)
    with torch.no_grad():
        encoding, t = models.encode_prompts([prompt, ""]), torch.tensor([999, 999])
        scaled = (x / torch.sqrt(1 + sigma**2)).expand(2, -1, -1, -1)
        positive, negative = models.predict(scaled, t, encoding).float().chunk(2)
        plain = dataclasses.replace(encoding, mask=torch.zeros_like(encoding.mask))
        unadapted = models.predict(scaled, t, plain).float().chunk(2)[0]
    ours = graph[0].model.process_latent_out(x - sigma * (negative + 3.0 * (positive - negative)))
    effect = (positive - unadapted).abs().max()
    print(f"difference {(ours - theirs).abs().max() / ours.abs().max():.1e} of the largest, effect {effect:.1e}")
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
    assert effect > 1e-2 if "<dog>" in prompt else effect == 0


@pytest.mark.comfy
def test_a_prompt_joined_to_another_keeps_its_own_adapters(graph, trained):
    """ConditioningConcat: what a longer context adds does not know where the word acts; it is read as it is."""
    import nodes
    from personalize.nodes.apply import apply

    model, clip = apply(*graph[:2], trained[1])
    first, second = encode(clip, "a <dog>"), encode(graph[1], "in the snow")
    joined = nodes.ConditioningConcat().concat(first, second)[0]
    assert joined[0][0].shape[1] == 154
    silent = [[joined[0][0], {key: v for key, v in joined[0][1].items() if not key.startswith("personalize")}]]
    adapted, plain = (denoised(model, positive, encode(clip, "")) for positive in (joined, silent))
    assert adapted.isfinite().all() and (adapted - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.comfy
def test_base_model_and_other_words_stay(graph, trained, tmp_path):
    """A second word beside the first: each prompt is as if only its own word had been learned."""
    from personalize.nodes.apply import apply

    before = denoised(graph[0], encode(graph[1], "a dog"), encode(graph[1], ""))
    first = apply(*graph[:2], trained[1])
    cat = train((*first, graph[2]), tmp_path, placeholder_token="<cat>", initializer_token="blue cat")[1]
    both, alone = apply(*first, cat), apply(*graph[:2], cat)

    def drawn(pair, prompt):
        return denoised(pair[0], encode(pair[1], prompt), encode(pair[1], ""))

    assert torch.equal(drawn(both, "a <dog>"), drawn(first, "a <dog>"))
    assert torch.equal(drawn(both, "a <cat>"), drawn(alone, "a <cat>"))
    assert not torch.equal(drawn(both, "a <cat> and a <dog>"), drawn(first, "a <cat> and a <dog>"))
    assert torch.equal(drawn(graph, "a dog"), before) and torch.equal(drawn(both, "a dog"), before)


@pytest.mark.comfy
def test_strengths(graph, trained):
    from personalize.nodes.apply import apply

    result = trained[1]
    off = apply(*graph[:2], result, strength_unet=0.0, strength_text_encoder=0.0)
    words = dataclasses.replace(result, adapters={})
    bare = apply(*graph[:2], words)
    assert torch.equal(states(off[1], "a <dog>"), states(bare[1], "a <dog>"))
    assert torch.equal(
        denoised(off[0], encode(off[1], "a <dog>"), encode(off[1], "")),
        denoised(bare[0], encode(bare[1], "a <dog>"), encode(bare[1], "")),
    )


@pytest.mark.comfy
def test_the_words_next_training_begins_with_its_adapters(graph, trained):
    """As they act in the graph: with the strengths that Apply gave them."""
    from personalize.nodes.apply import apply
    from personalize.nodes.host import session, weights

    fingerprints = set()
    for strength in (1.0, 0.5):
        model, clip = apply(*graph[:2], trained[1], strength_unet=2 * strength, strength_text_encoder=strength)
        with session.training_session():
            known = weights.read_models(weights.GraphModels.of(model, clip, graph[2]), torch.float32).known_adapters[
                "<dog>"
            ]
            fingerprints.add(weights.fingerprint(weights.GraphModels.of(model, clip, graph[2])))
        for key, learned in trained[1].adapters.items():
            factor = strength * (2 if key.startswith("unet") else 1) if key.endswith(".up") else 1.0
            assert torch.equal(known[key], learned * factor)
    assert len(fingerprints) == 2


@pytest.mark.comfy
def test_another_training_of_the_word_takes_its_adapters_place(graph, trained):
    from personalize.nodes.apply import apply
    from personalize.nodes.host import clip_attachment

    first = apply(*graph[:2], trained[1])
    words = dataclasses.replace(trained[1], adapters={})
    again, plain = apply(*first, words), apply(*graph[:2], words)
    assert torch.equal(states(again[1], "a <dog>"), states(plain[1], "a <dog>"))
    assert not [patch for patch in again[1].patcher.object_patches if "fc2" in patch]
    assert "personalize <dog>" in encode(first[1], "a <dog>")[0][1]
    assert "personalize <dog>" not in encode(again[1], "a <dog>")[0][1]
    assert clip_attachment.of(first[1]).adapters["<dog>"].tensors  # the CLIP it was made from still has them


@pytest.mark.comfy
def test_adapters_of_another_family_are_refused(graph, trained):
    from personalize.nodes.apply import apply

    adapters = {key.replace("layers.0", "layers.9"): value for key, value in trained[1].adapters.items()}
    with pytest.raises(ValueError, match="family"):
        apply(*graph[:2], dataclasses.replace(trained[1], adapters=adapters))
    adapters = {key: torch.zeros(1, 7) if ".down" in key else value for key, value in trained[1].adapters.items()}
    with pytest.raises(ValueError, match="family"):
        apply(*graph[:2], dataclasses.replace(trained[1], adapters=adapters))
