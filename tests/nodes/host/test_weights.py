"""Between the host and the trainers: are the weights we read, and the CLIP we return, exactly the host's?

Against ComfyUI's own forward passes, on random SD 1.x and 2.x models in small widths.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import types

import pytest
import torch

from personalize.tests.support import small

pytestmark = pytest.mark.comfy

# random_sd's, without its imports
KINDS = (
    "SD 1.x",
    "SD 2.x epsilon",
    "SD 2.x v",
    "SD 2.x v with zero terminal SNR",
    "SDXL",
    "SDXL v with zero terminal SNR",
)
PROMPTS = ["", "a photo of a dog", "A (very:1) RED dog's house, 2 cats & naïve café!! " * 3, "don't stop   believing"]


@pytest.fixture(scope="module", params=["SD 1.x", "SD 2.x v with zero terminal SNR", "SDXL"])
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


def encoders_of(clip):
    """The host's names of the text encoders."""
    return [name for name in ("clip_l", "clip_g", "clip_h") if hasattr(clip.cond_stage_model, name)]


def host_ids(clip, prompt, encoder=-1):
    """The first chunk's pairs of token and weight, as the host reads them."""
    return getattr(clip.tokenizer, encoders_of(clip)[encoder]).tokenize_with_weights(prompt)[0]


@pytest.fixture(scope="module")
def trained(graph, tmp_path_factory):
    """A short TextBoost training with large steps: the models after it, the run's result."""
    from personalize.nodes.host import weights
    from personalize.nodes.host.session import training_session
    from personalize.trainers.data.concept import Concept
    from personalize.trainers.recipes.textboost import TextBoost
    from personalize.trainers.runs import run as run_module
    from personalize.trainers.runs import train as training

    recipe = TextBoost(
        steps=4, batch_size=2, views=8, lora_learning_rate=2e-2, embedding_learning_rate=0.1, clamp_norms=False,
        captions=small.CAPTIONS,
    )  # fmt: skip
    concept = Concept(images=(torch.rand(3, 64, 64),), resolution=64, initializer_token="red dog")
    with training_session():
        models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        folder = tmp_path_factory.mktemp("run")
        result = training.train(run_module.Run(concept=concept, recipe=recipe), models, folder)
    return models, result


def encode(clip, prompt):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(prompt)).clone()


@pytest.mark.parametrize(("graph", "resolution"), [*zip(KINDS, [512, 512, 768, 768, 1024, 1024])], indirect=["graph"])
def test_unet_equals_the_hosts(graph, resolution):
    """With the pooled text and the image's size, where the family has them, as the host's sampler hands them over."""
    from personalize.nodes.host.models import resolution_of
    from personalize.tests.support.saved import unet_of_the_host
    from personalize.trainers.models.diffusion import Encoding

    model, clip, vae = graph
    models = read(graph)
    latents, timesteps = torch.randn(2, 4, 16, 24), torch.tensor([3, 801])
    width, pooled = model.model.model_config.unet_config["context_dim"], torch.randn(1, 96)
    context = torch.randn(2, 77, width)
    theirs = unet_of_the_host(model, latents, timesteps, context, pooled if models.family.pooled else None)
    with torch.no_grad():
        encoding = Encoding(parts=(context,), pooled=pooled.expand(2, -1) if models.family.pooled else None)
        ours = models.predict(latents, timesteps, encoding)
    assert theirs.abs().max() > 0.1
    print(f"difference {(ours - theirs).abs().max():.1e}")
    assert (ours - theirs).abs().max() < 1e-4
    assert resolution_of(model) == models.resolution == resolution


@pytest.mark.parametrize("graph", KINDS, indirect=True)
def test_noise_and_target_equal_the_hosts(graph, request):
    """The host turns our target, taken for the model's output, back into the image."""
    kind = request.node.callspec.params["graph"]
    sampling, models = graph[0].get_model_object("model_sampling"), read(graph)
    assert models.prediction_type == ("v_prediction" if " v" in kind else "epsilon")
    assert (models.alphas_cumprod[-1] < 1e-7) == ("zero" in kind)
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    for t in (0, 500, 999):
        sigma, timestep = sampling.sigmas[t : t + 1], torch.tensor([t])
        assert sampling.timestep(sigma).item() == t
        noisy = sampling.noise_scaling(sigma, noise.clone(), latents)
        ours = models.add_noise(latents, noise, timestep)
        assert (ours - sampling.calculate_input(sigma, noisy)).abs().max() < 1e-5
        target = models.target(latents, noise, timestep)
        assert (sampling.calculate_denoised(sigma, target, noisy) - latents).abs().max() < 1e-4


def read(graph):
    from personalize.nodes.host import weights
    from personalize.nodes.host.session import training_session

    with training_session():
        return weights.read_models(weights.GraphModels.of(*graph), torch.float32)


@pytest.mark.parametrize("layer", [None, -1, -2, -3, -9])  # the host ignores one that is too deep
def test_text_encoder_equals_the_hosts(graph, layer):
    model, clip, vae = graph
    clip = clip.clone()
    clip.clip_layer(layer)
    models = read((model, clip, vae))
    for prompt in ["", "a photo of a dog", "a red cat on the beach, painting"]:
        with torch.no_grad():
            ours = models.encode_prompts([prompt])
        difference = (ours.hidden_states - encode(clip, prompt)).abs().max()
        print(f"difference {difference:.1e}")
        assert difference < 1e-4
        if models.family.pooled:
            difference = (ours.pooled - pooled(clip, prompt)).abs().max()
            print(f"pooled {difference:.1e}")
            assert difference < 1e-4


def test_ids_equal_the_hosts(graph):
    from personalize.trainers.models.tokenizer import Tokenizer, bundled_words

    models = read(graph)
    for i, encoder in enumerate(models.text_encoders):
        padding = encoder.tokenizer.pad_token_id
        for prompt in [
            "",
            "a photo of a dog",
            "A RED dog's house, 2 cats & café!!",
            "don't stop   believing",
            "corgi-dog",
        ]:
            theirs = [[int(token) for token, _ in host_ids(graph[1], prompt, i)]]
            assert models.tokenize([prompt])[:, i].tolist() == theirs
            assert Tokenizer(bundled_words(), pad_token_id=padding)([prompt]).tolist() == theirs


def test_latents_are_what_the_unet_sees(graph):
    model, _, vae = graph
    models = read(graph)
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = models.encode_images(pixels)
    with torch.inference_mode():
        theirs = model.model.process_latent_in(vae.encode(pixels.movedim(1, -1)))
    assert std is None  # TAESD has no deviation
    assert torch.equal(mean, theirs)


def test_a_lora_before_training_is_respected(graph):
    model, clip, vae = graph
    key = f"{encoders_of(clip)[0]}.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    patched = clip.clone()
    patched.add_patches({key: ("diff", (torch.randn(256, 64) * 0.05,))}, 0.7)
    block = "1.1" if encoders_of(clip)[-1] != "clip_g" else "4.1"  # SDXL's first level has no attention
    unet_key = f"diffusion_model.input_blocks.{block}.transformer_blocks.0.attn2.to_k.weight"
    shape = model.model.state_dict()[unet_key].shape
    patched_model = model.clone()
    patched_model.add_patches({unet_key: ("diff", (torch.ones(shape),))}, 0.5)
    models = read((patched_model, patched, vae))
    with torch.no_grad():
        ours = models.encode_prompts(["a dog"]).hidden_states
    assert (ours - encode(patched, "a dog")).abs().max() < 5e-3  # the host rounds patched weights to float16
    assert (ours - encode(clip, "a dog")).abs().max() > 0.05
    base, ours = (next(w for w in m.unet.state_dict().values() if w.shape == shape) for m in (read(graph), models))
    assert torch.allclose(ours - base, torch.full_like(base, 0.5))


def test_returned_clip_equals_the_trained_encoder(graph, trained):
    from personalize.nodes.apply import apply

    models, result = trained
    clip = apply(graph[0], graph[1], result)[1]
    for prompt in ["a photo of <concept>", "<concept>", "<collage> <zoom-out> a <concept>, <hflip>", "a green cat"]:
        with torch.no_grad():
            ours = models.encode_prompts([prompt]).hidden_states
        theirs, before = encode(clip, prompt), encode(graph[1], prompt.replace("<concept>", "red dog"))
        difference, effect = (ours - theirs).abs().max(), (ours - before).abs().max()
        print(f"{prompt!r}: difference {difference:.1e}, effect {effect:.1e}")
        assert difference < 5e-3
        assert difference < 0.01 * effect


def pooled(clip, prompt):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[1].clone()


def test_base_is_untouched(graph, trained):
    from personalize.nodes.apply import apply

    before = encode(graph[1], "a photo of a dog"), encode(graph[1], "<concept>")
    model, clip = apply(graph[0], graph[1], trained[1])
    encode(clip, "a photo of <concept>")
    assert torch.equal(encode(graph[1], "a photo of a dog"), before[0])
    assert torch.equal(encode(graph[1], "<concept>"), before[1])
    assert model is not graph[0]


def test_start_token_and_empty_prompt_stay(graph, trained):
    from personalize.nodes.apply import apply

    clip = apply(graph[0], graph[1], trained[1])[1]
    assert (encode(clip, "") - encode(graph[1], "")).abs().max() < 1e-5
    assert (pooled(clip, "") - pooled(graph[1], "")).abs().max() < 1e-5
    assert (pooled(clip, "a dog") - pooled(graph[1], "a dog")).abs().max() > 0.05
    moved = encode(clip, "a dog") - encode(graph[1], "a dog")
    assert moved[:, 0].abs().max() < 1e-5
    assert moved[:, 1:].abs().max() > 0.05
    skipping, base = clip.clone(), graph[1].clone()
    for c in (skipping, base):
        c.clip_layer(-2)
    assert (encode(skipping, "") - encode(base, "")).abs().max() < 1e-5


def test_placeholder_in_every_spelling(graph, trained):
    """Weights, commas, several concepts: each gives the tokens that the plain words would, with the learned vectors."""
    from personalize.nodes.apply import apply
    from personalize.nodes.host import clip_attachment

    clip = apply(graph[0], graph[1], trained[1])[1]
    cat = torch.randn(1, trained[1].tokens["<concept>"][-1].shape[1])
    clip = clip_attachment.attach(
        clip,
        dataclasses.replace(
            clip_attachment.of(clip), tokens=clip_attachment.of(clip).tokens | {"<cat>": {encoders_of(clip)[-1]: cat}}
        ),
    )
    vectors = trained[1].tokens["<concept>"][-1]

    def words(prompt):
        return host_ids(clip, prompt)

    for prompt, plain in [
        ("a <concept> on grass", "a red dog on grass"),
        ("<concept>, red", "red dog, red"),
        ("a (<concept>:1.3) and", "a (red dog:1.3) and"),
        ("a (big <concept>)", "a (big red dog)"),
        ("the <concept>'s house", "the red dog's house"),
    ]:
        ours, theirs = words(prompt), words(plain)
        at = [i for i, (token, _) in enumerate(ours) if torch.is_tensor(token)]
        assert torch.equal(torch.stack([ours[i][0] for i in at]), vectors)
        assert [w for _, w in ours] == [w for _, w in theirs]
        assert [t for t, _ in ours if not torch.is_tensor(t)] == [t for i, (t, _) in enumerate(theirs) if i not in at]
    both = [token for token, _ in words("<concept> and <cat>") if torch.is_tensor(token)]
    assert torch.equal(both[-1], cat[0]) and len(both) == 3


def test_placeholders_are_words_in_every_spelling(graph, monkeypatch, caplog):
    """Those that lie within each other's letters, within other words, in names of files, and nearly right ones."""
    from personalize.nodes.host import clip_attachment, session

    name = encoders_of(graph[1])[-1]
    width = getattr(graph[1].cond_stage_model, name).transformer.get_input_embeddings().weight.shape[1]
    values = {word: torch.full((1, width), float(i)) for i, word in enumerate(("007", "67", "<concept>", "sks"))}
    attachment = clip_attachment.ClipAttachment(tokens={word: {name: v} for word, v in values.items()})
    clip = clip_attachment.attach(graph[1], attachment)

    def words(prompt, among=clip):
        chunks = getattr(among.tokenizer, name).tokenize_with_weights(prompt)
        pairs = [pair for chunk in chunks for pair in chunk]
        return [(f"word {token[0]:.0f}" if torch.is_tensor(token) else token, weight) for token, weight in pairs]

    def plain(prompt):
        return words(prompt, graph[1])

    stands = {f"word {i}": word for i, word in enumerate(values)}
    for prompt, expected in [
        ("2007 x007 0071 asks", plain("2007 x007 0071 asks")),
        ("a 007 and 67", ["007", "67"]),
        ("embedding:<concept> on grass", ["<concept>"]),
        ("embedding: <concept>", ["<concept>"]),
        ("a (embedding:<concept>:1.3)", ["<concept>"]),
        ("an embedding:sks", ["sks"]),
        ("an embedding:my-sks and <concept>", ["<concept>"]),
        ("<concept><concept>", ["<concept>", "<concept>"]),
    ]:
        if isinstance(expected[0], str):
            assert [stands[token] for token, _ in words(prompt) if token in stands] == expected, prompt
        else:
            assert words(prompt) == expected, prompt
    assert ("word 2", 1.3) in words("a (embedding:<concept>:1.3)")

    said = []
    context = types.SimpleNamespace(node_id="7")
    monkeypatch.setattr(clip_attachment.internals, "get_executing_context", lambda: context, raising=False)
    monkeypatch.setattr(session, "notices", lambda node: lambda sentence: said.append((node, sentence)))
    words("a <Concept>, a <concept> and 2 < 3")
    sentence = "The prompt has <Concept>, which this CLIP has not learned: write <concept>, the nearest that it knows."
    assert said == [("7", sentence)] and sentence in caplog.text


def test_every_operation_uses_the_learned_ids(trained):
    """The prompt of each augmentation holds exactly the ids of its learned token."""
    from personalize.trainers.data import augmentation
    from personalize.trainers.recipes.textboost import PHRASES, TOKENS

    tokenizer = trained[0].text_encoders[0].tokenizer
    generator = torch.Generator().manual_seed(0)
    for operation, (token, _) in TOKENS.items():
        for _ in range(4):
            prompt = augmentation.describe("a <concept>", (operation,), PHRASES["tokens"], generator)
            new = [i for i in tokenizer.words(prompt) if i >= tokenizer.vocab_size]
            expected = {*tokenizer.placeholders["<concept>"], *tokenizer.placeholders[token]}
            assert set(new) == expected and len(new) == len(expected)
            rest = [i for i in tokenizer.words(prompt) if i < tokenizer.vocab_size]
            assert rest in (tokenizer.encode_words("a"), tokenizer.encode_words("a ,"))


def test_host_loads_every_key_of_the_saved_lora(graph, trained):
    import comfy.lora
    import comfy.lora_convert
    from safetensors.torch import load_file

    state = load_file(trained[1].folder / "lora.safetensors")
    key_map = comfy.lora.model_lora_keys_clip(graph[1].cond_stage_model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(state), key_map, log_missing=True)
    used = {key for adapter in loaded.values() for key in adapter.loaded_keys}
    layers = 2 if encoders_of(graph[1]) == ["clip_h"] else 3  # SD 2.x does not read the last one
    assert used == set(state) and len(loaded) == layers * 3 + 1  # q, k, v, and what diffusers looks for


def test_saved_embedding_equals_the_placeholder(graph, trained, tmp_path):
    from safetensors.torch import save_file

    vectors, names = trained[1].tokens["<concept>"], encoders_of(graph[1])
    keys = ["<concept>"] if len(names) == 1 else names
    save_file(dict(zip(keys, vectors, strict=True)), tmp_path / "mine.safetensors")
    import copy

    clip = graph[1].clone()
    clip.tokenizer = copy.deepcopy(graph[1].tokenizer)
    for i, name in enumerate(names):
        getattr(clip.tokenizer, name).embedding_directory = [str(tmp_path)]
        tokens = [t for t, _ in host_ids(clip, "a photo of embedding:mine", i) if torch.is_tensor(t)]
        assert torch.equal(torch.stack(tokens), vectors[i])


def test_training_continues_from_a_learned_concept(graph, trained):
    from personalize.nodes.apply import apply

    model, clip = apply(graph[0], graph[1], trained[1])
    models = read((model, clip, graph[2]))
    from personalize.trainers.training import trainables

    for encoder, learned in zip(models.text_encoders, trained[1].tokens["<concept>"], strict=True):
        assert torch.equal(encoder.known_tokens["<concept>"], learned)
        assert torch.equal(trainables.add_tokens(encoder, [("<concept>", "cat")]).rows.data, learned)
    with torch.no_grad():
        assert (models.encode_prompts([""]).hidden_states - encode(graph[1], "")).abs().max() < 1e-5


@pytest.mark.parametrize("graph", KINDS[:1], indirect=True)
def test_other_families_are_refused_by_name(graph):
    import comfy.supported_models

    from personalize.nodes.host.models import family_of

    model, clip, vae = graph
    other = model.clone()

    class Model:
        model_config = comfy.supported_models.SDXL({"context_dim": 2048})

    other.model = Model()
    with pytest.raises(ValueError, match="SDXL"):
        family_of(other, clip)


def test_models_that_moved_can_be_read_and_used_again(tmp_path):
    """A training takes them off their device; their weights are then as whole as the host's own moves leave them."""
    import comfy.model_management as mm

    from personalize.nodes.host import weights
    from personalize.nodes.host.session import training_session
    from personalize.tests.support import random_sd

    model, clip, vae = random_sd.graph(tmp_path)
    for patcher in (model, clip.patcher, vae.patcher):
        patcher.offload_device = torch.device("cpu", 0)  # for torch another device than "cpu": its tensors are copied
    before = weights.fingerprint(weights.GraphModels.of(model, clip, vae))
    with torch.inference_mode():
        mm.load_models_gpu([model, clip.patcher, vae.patcher])
    with training_session():
        weights.read_models(weights.GraphModels.of(model, clip, vae), torch.float32)
    assert weights.fingerprint(weights.GraphModels.of(model, clip, vae)) == before
    assert encode(clip, "a photo of a dog").isfinite().all()


def live_bytes():
    """Bytes of all tensors over 1 MB that anything still holds."""
    gc.unfreeze()  # what tests/conftest.py has set aside
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    gc.freeze()  # as before
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"
    }
    return sum(size for size in storages.values() if size > 2**20)


def process_state():
    """Whatever a training could leave behind in a process, as values to compare."""
    import comfy.model_management as mm

    backends = torch.backends
    return {
        "random": torch.get_rng_state().tolist(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": (torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "attention": (backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "host": (mm.in_training, mm.interrupt_processing),
    }


@pytest.mark.parametrize(
    ("graph", "ending"),
    [*((KINDS[0], ending) for ending in ("done", "cancel", "exception", "out of memory")), (KINDS[3], "done")],
    indirect=["graph"],
)
def test_an_ended_training_leaves_nothing_behind(graph, tmp_path, monkeypatch, ending):
    """However a training ends: tensors, gradient mode, random state, backend flags are as before."""
    import comfy.model_management as mm
    import folder_paths

    from personalize.nodes import train
    from personalize.nodes.host.session import unload_all
    from personalize.trainers.data.concept import Concept
    from personalize.trainers.recipes.textboost import TextBoost
    from personalize.trainers.runs.run import Run
    from personalize.trainers.training.objective import Objective

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    recipe = TextBoost(steps=3, batch_size=2, views=8, captions=small.CAPTIONS)
    run = Run(concept=Concept(images=(torch.rand(3, 64, 64),), resolution=64), recipe=recipe)

    def end_it(self, step, *others):
        if step == 2 and ending == "cancel":
            mm.interrupt_current_processing()
        elif step == 2 and ending == "exception":
            raise ValueError("a callback failed")

    calls, predict = itertools.count(), Objective.predict

    def out_of_memory(self, batch, noise, timesteps):
        if ending == "out of memory" and next(calls) >= 2:
            raise torch.cuda.OutOfMemoryError("out of memory, here on purpose")
        return predict(self, batch, noise, timesteps)

    monkeypatch.setattr(comfy_progress(), "update_absolute", end_it)
    monkeypatch.setattr(Objective, "predict", out_of_memory)
    unload_all()
    ends = {"cancel": mm.InterruptProcessingException, "exception": ValueError, "out of memory": MemoryError}
    before, state = live_bytes(), process_state()
    with pytest.raises(ends[ending]) if ending in ends else contextlib.nullcontext():
        hidden = types.SimpleNamespace(unique_id="1", extra_pnginfo=None)
        train.find_or_train(*graph, run, lambda sentence: None, hidden=hidden, checkpoint_every=0)
    assert live_bytes() == before
    assert process_state() == state
    (folder,) = (tmp_path / "personalize" / "runs").iterdir()
    about = json.loads((folder / "run.json").read_text())
    assert about["complete"] == (ending == "done")
    if ending != "out of memory":  # which begins again at the last checkpoint, here at none
        assert len((folder / "steps.jsonl").read_text().splitlines()) == (3 if ending == "done" else 2)
        assert (folder / "lora.safetensors").exists() and (folder / "checkpoints").exists() != (ending == "done")


def comfy_progress():
    import comfy.utils

    return comfy.utils.ProgressBar
