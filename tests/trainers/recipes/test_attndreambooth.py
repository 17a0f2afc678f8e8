"""AttnDreamBooth: does each stage change exactly what it declares, go on after a kill, and come back on the host?"""

import dataclasses
import functools

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.runs.test_resume import Killed, learned
from personalize.trainers.data.concept import Concept
from personalize.trainers.models.diffusion import Encoding
from personalize.trainers.recipes.attndreambooth import FAST, PAPER, PRESETS, RUNS
from personalize.trainers.runs import train as training
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.run import Run

QUICK = {"steps_1": 2, "steps_2": 3, "steps_3": 2, "batch_size_1": 2, "batch_size_2": 2, "batch_size_3": 2, "views": 4}
QUICK |= {"learning_rate_1": 0.1, "learning_rate_2": 1e-3, "learning_rate_3": 1e-3, "lora_rank": 2}
CONCEPT = Concept(images=(torch.rand(3, 48, 32),), placeholder_token="<dog>", class_word="dog", resolution=32)


def recipe(**changes):
    return dataclasses.replace(PAPER, **QUICK, **changes)


def train(folder, models=None, dtype=torch.float32, stop_after=None, checkpoint_every=1, **changes):
    """The models after a short training with large steps, and its result."""

    def on_step(report):
        if stop_after and len((folder / "steps.jsonl").read_text().splitlines()) == stop_after:
            raise Killed

    models, run = models or small.models(), Run(concept=CONCEPT, recipe=recipe(**changes), dtype=dtype)
    callbacks = training.Callbacks(on_step=on_step)
    return models, training.train(run, models, folder, checkpoint_every=checkpoint_every, callbacks=callbacks)


def snapshot(models):
    tensors = {f"unet.{name}": p.detach().clone() for name, p in models.unet.named_parameters()}
    for i, encoder in enumerate(models.text_encoders):
        tensors |= {f"text.{i}.{name}": p.detach().clone() for name, p in encoder.named_parameters()}
        tensors[f"text.{i}.table"] = encoder.embedding.weight.clone()
    return tensors


@pytest.mark.parametrize(
    ("stages", "changes"), [("1", ""), ("1+2", "attn2."), ("all", "unet.")], ids=["1", "1 and 2", "all"]
)
def test_each_stage_changes_what_it_declares_and_nothing_else(tmp_path, stages, changes):
    before = snapshot(small.models())
    after = snapshot(train(tmp_path, run_stages=stages)[0])
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    weights = {name for name in before if name.startswith("unet.") and changes and changes in name}
    # A bias before a softmax or a norm may get no gradient to speak of: what changes lies within, and nearly all does.
    assert changed <= weights and len(changed) >= 0.95 * len(weights)
    assert {name for name in after if name not in before} == {
        "text.0.module.embeddings.token_embedding.rows"
        if "text.0.module.embeddings.token_embedding.rows" in after
        else "text.0.module.text_model.embeddings.token_embedding.rows"
    }


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("stages", RUNS)
def test_every_choice_of_stages_trains_just_those(tmp_path, stages, weights):
    models, numbers = small.models(), RUNS[stages]
    if numbers[0] != "1":
        models.text_encoders[0].known_tokens = {"<dog>": torch.ones(1, 32)}
    result = train(tmp_path, models=models, run_stages=stages, fine_tuning=weights)[1]
    steps = {"1": 2, "2": 3, "3": 2}
    assert [entry["stage"] for entry in result.history] == [
        f"attndreambooth {n}" for n in numbers for _ in range(steps[n])
    ]
    assert bool(result.lora) == (stages != "1")
    assert torch.equal(result.tokens["<dog>"][0], torch.ones(1, 32)) == (numbers[0] != "1")


@pytest.mark.parametrize("stages", ["1+2", "all"])
def test_as_lora_the_weights_themselves_stay(tmp_path, stages):
    before = snapshot(small.models())
    models, result = train(tmp_path, run_stages=stages, fine_tuning="lora")
    after = {name.replace(".base_layer", ""): value for name, value in snapshot(models).items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name in after)
    layers = {key.partition(".")[0] for key in result.lora}
    assert all("attn2" in layer for layer in layers) == (stages == "1+2")
    ups = [value for key, value in result.lora.items() if key.endswith("lora_up.weight")]
    assert all(up.abs().max() > 0 for up in ups)


def test_a_later_lora_goes_on_with_the_earlier_one(tmp_path):
    """Stage 3 begins where stage 2 ended: with no learning rate of its own it keeps what stage 2 made."""
    two = train(tmp_path / "two", run_stages="1+2", fine_tuning="lora")[1].lora
    models = small.models()
    run = Run(
        concept=CONCEPT, recipe=dataclasses.replace(recipe(fine_tuning="lora"), learning_rate_3=0.0, weight_decay=0.0)
    )
    still = Run(
        concept=CONCEPT, recipe=dataclasses.replace(recipe(fine_tuning="lora", run_stages="1+2"), weight_decay=0.0)
    )
    three = training.train(run, models, tmp_path / "three").lora
    two = training.train(still, small.models(), tmp_path / "still").lora
    assert all(torch.equal(three[key], value) for key, value in two.items()) and len(three) > len(two)


def test_the_difference_is_what_changed(tmp_path):
    """Rounded to half precision; its names and the number of its keys are those of the weights."""
    base = dict(small.models().unet.named_parameters())
    models, result = train(tmp_path)
    assert len(result.lora) == len(base)
    for name, parameter in models.unet.named_parameters():
        path, _, kind = name.rpartition(".")
        key = f"lora_unet_{path.replace('.', '_')}.{'diff' if kind == 'weight' else 'diff_b'}"
        assert torch.equal(result.lora[key], (parameter - base[name]).detach().half())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(weights)`: what a run learns that nothing disturbs."""

    @functools.cache
    def learned_whole(weights):
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(folder, fine_tuning=weights)
        return learned(folder)

    return learned_whole


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("stop_after", [1, 2, 4, 5, 6])
def test_a_kill_in_every_stage_changes_nothing(whole, tmp_path, weights, stop_after):
    """Within a stage, and between two: 2 + 3 + 2 steps."""
    folder = tmp_path / "broken" / "run"
    with pytest.raises(Killed):
        train(folder, fine_tuning=weights, stop_after=stop_after)
    partial = RunFolder(folder).result(partial=True)
    assert not partial.complete and len(partial.history) == stop_after
    train(folder, fine_tuning=weights)
    assert learned(folder) == whole(weights)


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("stop_after", [1, 3, 5, 6])
def test_a_process_killed_in_any_stage_goes_on_from_what_lies_on_disk(
    whole, tmp_path, monkeypatch, weights, stop_after
):
    """Nothing is written after the kill; checkpoints are of steps 2, 4 and 6, and of each stage's beginning."""
    monkeypatch.setattr(training.Trainer, "_break_off", lambda self, stages: None)
    folder = tmp_path / "killed" / "run"
    with pytest.raises(Killed):
        train(folder, fine_tuning=weights, stop_after=stop_after, checkpoint_every=2)
    on_disk = sum(stage.step for stage in RunFolder(folder).last_state())
    assert on_disk == {1: 0, 3: 2, 5: 4, 6: 6}[stop_after]
    train(folder, fine_tuning=weights, checkpoint_every=2)
    assert learned(folder) == whole(weights)


def test_stages_one_after_the_other_need_the_word(tmp_path):
    for stages, first in (("2", 2), ("3", 3), ("2+3", 2)):
        chosen = recipe(run_stages=stages)
        with pytest.raises(ValueError, match=f"^Stage {first} continues from a learned .* not know <dog>: run"):
            chosen.check(CONCEPT)
        chosen.check(CONCEPT, known=["<dog>"])
    recipe().check(CONCEPT)


def test_a_second_training_goes_on_from_the_first(tmp_path):
    """Stage 1, and then stage 2 with its word known: the word stays as it was learned."""
    first = train(tmp_path / "one", run_stages="1")[1]
    models = small.models()
    models.text_encoders[0].known_tokens = {"<dog>": first.tokens["<dog>"][0]}
    second = train(tmp_path / "two", models=models, run_stages="2")[1]
    assert torch.equal(second.tokens["<dog>"][0], first.tokens["<dog>"][0])


def test_half_precision_trains_in_full(tmp_path):
    """The frozen part of the U-Net stays bfloat16; what trains, and its steps, are float32."""
    models, result = train(tmp_path, dtype=torch.bfloat16, run_stages="1+2")
    dtypes = {name: p.dtype for name, p in models.unet.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".attn2." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".attn2." not in name} == {torch.bfloat16}
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in result.lora.values())


@pytest.mark.parametrize(
    ("vectors", "count"), [({}, 1), ({"vectors": 2}, 2), ({"vectors": 16}, 2), ({"vectors": 0}, 2)]
)
def test_one_vector_for_a_class_word_of_several_tokens(tmp_path, vectors, count):
    """As in the authors' code, from the first token; more by the setting, and never more than there are tokens."""
    models, concept = small.models(), dataclasses.replace(CONCEPT, class_word="stuffed animal")
    table = models.text_encoders[0].embedding.weight
    start = table[models.text_encoders[0].tokenizer.encode_words("stuffed animal")]
    still = dataclasses.replace(recipe(run_stages="1", **vectors), learning_rate_1=0.0, weight_decay=0.0)
    result = training.train(Run(concept=concept, recipe=still), models, tmp_path)
    assert len(start) == 2 and torch.equal(result.tokens["<dog>"][0], start[:count])


def test_presets_are_the_papers():
    assert PRESETS == {"paper": PAPER, "fast": FAST}
    numbers = [
        (getattr(PAPER, f"steps_{i}"), getattr(PAPER, f"learning_rate_{i}"), getattr(PAPER, f"batch_size_{i}"),
         getattr(PAPER, f"mean_weight_{i}"), getattr(PAPER, f"variance_weight_{i}"))
        for i in (1, 2, 3)
    ]  # fmt: skip
    assert numbers == [(60, 1e-3, 8, 0.1, 0.0), (100, 2e-5, 8, 2.0, 5.0), (500, 2e-6, 8, 2.0, 5.0)]
    assert (FAST.steps_3, FAST.learning_rate_3, FAST.batch_size_3) == (200, 1e-5, 4)
    assert (FAST.steps, PAPER.steps) == (360, 660)


# -- on the host


FAMILIES = ("SD 1.x", "SD 2.x epsilon", "SDXL")


@pytest.fixture(scope="module", params=FAMILIES)
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    """The models after a short training of whole weights with large steps, and its result."""
    from personalize.nodes.host import session, weights

    with session.training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        run = Run(concept=dataclasses.replace(CONCEPT, resolution=64), recipe=recipe())
        return models, training.train(run, models, tmp_path_factory.mktemp("run"))


@pytest.fixture
def inputs(graph):
    """The same noisy latents, timesteps and conditioning for the host and for us."""
    g, config = torch.Generator().manual_seed(0), graph[0].model.model_config.unet_config
    context = torch.randn(2, 77, config["context_dim"], generator=g)
    pooled = torch.randn(1, 96, generator=g) if config.get("adm_in_channels") else None
    return torch.randn(2, 4, 16, 16, generator=g), torch.tensor([3, 801]), context, pooled


def theirs(model, latents, t, context, pooled):
    from personalize.tests.support.saved import unet_of_the_host

    return unet_of_the_host(model, latents, t, context, pooled)


@pytest.mark.comfy
def test_every_weight_comes_back_on_the_host(graph, trained, inputs):
    """The returned MODEL is the trained U-Net, the base stays bit for bit, and the stock loader uses every key."""
    from personalize.nodes.apply import apply
    from personalize.tests.support.saved import stock

    models, result = trained
    before, (latents, t, context, pooled) = theirs(graph[0], *inputs), inputs
    with torch.no_grad():
        encoding = Encoding(parts=(context,), pooled=None if pooled is None else pooled.expand(2, -1))
        ours = models.predict(latents, t, encoding)
    effect = (ours - before).abs().max()
    for name, model in (("apply", apply(*graph[:2], result)[0]), ("stock", stock(graph, result.lora)[0][0])):
        difference = (theirs(model, *inputs) - ours).abs().max()
        print(f"{name}: difference {difference:.1e}, effect {effect:.1e}")
        assert effect > 0.1 and difference < 0.01 * effect
    assert torch.equal(theirs(graph[0], *inputs), before)
    assert len(result.lora) == len([*graph[0].model.diffusion_model.parameters()])


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("graph", "weights"), [*((family, "full") for family in FAMILIES), ("SDXL", "lora")], indirect=["graph"]
)
def test_three_trainings_chained_through_model_and_clip(graph, tmp_path, weights):
    """Each begins where the one before ended, but for the half precision of what goes through the graph."""
    from personalize.nodes.apply import apply
    from personalize.nodes.host import clip_attachment, session
    from personalize.nodes.host import weights as reading

    (model, clip, vae), concept = graph, dataclasses.replace(CONCEPT, resolution=64)
    word, ended, begun = None, None, None
    for stages in ("1", "2", "3"):
        chosen = recipe(run_stages=stages, fine_tuning=weights)
        chosen.check(concept, known=clip_attachment.of(clip).tokens)
        with session.training_session():
            models = reading.read_models(reading.GraphModels.of(model, clip, vae), torch.float32)
            first = merged(models.unet)
            if ended:
                moved = max((ended[name] - begun[name]).abs().max() for name in first)
                off = max((ended[name] - first[name]).abs().max() for name in first)
                assert off < 0.01 * moved if stages == "3" else off == moved == 0
            result = training.train(Run(concept=concept, recipe=chosen), models, tmp_path / stages)
        begun, ended = first, merged(models.unet)
        word = result.tokens["<dog>"] if word is None else word
        assert all(torch.equal(a, b) for a, b in zip(word, result.tokens["<dog>"], strict=True))
        model, clip = apply(model, clip, result)
    with session.training_session():
        last = merged(reading.read_models(reading.GraphModels.of(model, clip, vae), torch.float32).unet)
    moved = max((ended[name] - begun[name]).abs().max() for name in last)
    assert max((ended[name] - last[name]).abs().max() for name in last) < 0.01 * moved


def merged(unet):
    """Every weight of a U-Net as it acts, by name; a LoRA beside it is added."""
    found = {name: p.detach().clone() for name, p in unet.named_parameters() if "lora_" not in name}
    for path, layer in unet.named_modules():
        if hasattr(layer, "lora_A"):
            found[f"{path}.base_layer.weight"] += layer.get_delta_weight("default").detach()
    return {name.replace(".base_layer", ""): value for name, value in found.items()}


def sampled(model, clip):
    """What the stock KSampler makes of the learned word."""
    import nodes

    words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a photo of a <dog> dog", "")]
    with torch.inference_mode():
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        return nodes.KSampler().sample(model, 5, 3, 4.0, "euler", "normal", *words, latent, 1.0)[0]["samples"].clone()


@pytest.mark.comfy
def test_stock_sampler_and_savers_honour_it(graph, trained, tmp_path, request, monkeypatch):
    """KSampler draws otherwise with the returned MODEL, the same with what is saved of it, as ever with the base."""
    import comfy.sd
    import folder_paths
    from comfy_extras import nodes_model_merging

    from personalize.nodes.apply import apply
    from personalize.tests.support import random_sd

    model, clip = apply(*graph[:2], trained[1])
    base, expected = sampled(graph[0], clip), sampled(model, clip)
    effect = (expected - base).abs().max()
    assert effect > 0.01 and torch.equal(sampled(graph[0], clip), base)

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with torch.inference_mode():
        nodes_model_merging.ModelSave().save(model, "unet")
        nodes_model_merging.CheckpointSave().save(model, clip, graph[2], "all")
        unet = comfy.sd.load_diffusion_model(str(tmp_path / "unet_00001_.safetensors"))
    checkpoint = random_sd.load(tmp_path / "all_00001_.safetensors", request.node.callspec.params["graph"])[0]
    for name, again in (("unet", unet), ("checkpoint", checkpoint)):
        difference = (sampled(again, clip) - expected).abs().max()
        print(f"{name}: difference {difference:.1e}, effect {effect:.1e}")
        assert difference < 0.01 * effect
    assert torch.equal(sampled(graph[0], clip), base)
