"""Show Attention: are the numbers the layers' own, do they belong to the words, and does heat lie where they are high?

The formulas against what they say, written out; the rest on ComfyUI's own U-Nets, random ones of every family.
"""

import matplotlib
import pytest
import torch

from personalize.trainers.models.checkpoint import scaled_linear
from personalize.trainers.reports import attention_maps as pictures
from personalize.trainers.training import cross_attention

KINDS = ("SD 1.x", "SD 2.x v", "SDXL")
PROMPT = "a photo of a <dog> dog, in the snow"
LONG = "a cat, " * 30 + PROMPT  # 90 tokens before it: it stands in the second chunk


def by_hand(q, k, heads):
    """`[heads, pixels, tokens]` of `[pixels, heads * d]`, in float64, head by head."""
    found = []
    for one, other in zip(q.double().chunk(heads, dim=-1), k.double().chunk(heads, dim=-1), strict=True):
        scores = (one @ other.T / one.shape[-1] ** 0.5).exp()
        found.append(scores / scores.sum(dim=-1, keepdim=True))
    return torch.stack(found)


# -- formulas and images


def test_probabilities_are_the_formula_and_give_what_the_layer_gives():
    q, k, v = torch.randn(2, 12, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    weights = cross_attention.probabilities(q, k, heads=4)
    expected = torch.stack([by_hand(*pair, 4) for pair in zip(q, k, strict=True)])
    assert weights.shape == (2, 4, 12, 9) and (weights - expected).abs().max() < 1e-6
    split = [x.view(2, -1, 4, 8).transpose(1, 2) for x in (q, k, v)]
    layer = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(2, 12, 32)
    assert (cross_attention.attended(weights, v) - layer).abs().max() < 1e-6
    half = cross_attention.probabilities(q.half(), k.half(), heads=4)
    assert half.dtype == torch.float32 and cross_attention.attended(half, v.half()).dtype == torch.float16


def test_a_words_map_is_the_mean_of_its_tokens_at_their_place():
    weights = torch.zeros(2, 3 * 5, 7)  # heads, 3 x 5 pixels, tokens
    weights[0, 1 * 5 + 4, 2] = 1.0  # row 1, column 4, seen by one of two heads
    weights[:, 2 * 5 + 0, 3] = 0.5
    maps = pictures.word_maps(weights, [[2], [3], [2, 3], [6]], 3, 5)
    expected = torch.zeros(4, 3, 5)
    expected[0, 1, 4], expected[1, 2, 0] = 0.5, 0.5
    expected[2, 1, 4], expected[2, 2, 0] = 0.25, 0.25
    assert torch.equal(maps, expected)


def test_layers_are_grouped_by_their_part_of_the_latents():
    """Of 9 x 13 latents a U-Net makes 5 x 7, 3 x 4 and 2 x 2."""
    sizes = [(9, 13), (5, 7), (3, 4), (2, 2), (3, 4), (5, 7), (9, 13)]
    layers = [torch.full((1, *size), float(i)) for i, size in enumerate(sizes)]
    groups = pictures.by_resolution(layers, 9)
    assert {name: (m.mean().item(), *m.shape[1:]) for name, m in groups.items()} == {
        "1/1": (3.0, 9, 13), "1/2": (3.0, 5, 7), "1/4": (3.0, 3, 4), "1/8": (3.0, 2, 2),
    }  # fmt: skip
    assert [*groups] == ["1/1", "1/2", "1/4", "1/8"]
    assert pictures.everywhere(layers, 72, 104).allclose(torch.full((1, 72, 104), 3.0))


def columns(sheet, height, width, row=0):
    """The tiles of a sheet's row, without their text."""
    parts = range((sheet.shape[1] + pictures.GAP) // (width + pictures.GAP))
    strip = 2 * (min(20, max(10, width // 16)) + 4)
    top = row * (strip + height + pictures.GAP) + strip
    lefts = [part * (width + pictures.GAP) for part in parts]
    return [sheet[top : top + height, left : left + width] for left in lefts]


def colour(value):
    return torch.tensor(matplotlib.colormaps[pictures.COLOURS](value)[:3])


def test_heat_lies_where_the_map_is_high():
    """Not square, and not the same when turned or mirrored."""
    picture = torch.rand(64, 96, 3)
    layer = torch.zeros(2, 4, 6)
    layer[0, 0, 5], layer[1, 3, 1] = 1.0, 1.0  # top right; bottom left
    sheet = pictures.sheet(picture, ["first", "second"], [pictures.Attention("", [layer], 8)])
    for row, (y, x) in enumerate([(slice(0, 12), slice(84, 96)), (slice(52, 64), slice(18, 28))]):
        tile, heat, both = columns(sheet, 64, 96, row)
        assert torch.equal(tile, picture) and torch.equal(heat, both)
        over = (heat - 0.35 * picture.mean(dim=-1, keepdim=True)) / 0.65
        hot, cold = (over - colour(1.0)).norm(dim=-1), (over - colour(0.0)).norm(dim=-1)
        assert hot[y, x].min() < 1e-3 and cold.lt(1e-3).float().mean() > 0.8
        hot[y, x] = 9
        assert hot.min() > 0.1  # nowhere else


def test_a_words_colours_mean_the_same_for_both_models():
    layer = torch.rand(1, 8, 8)
    layer[0, 0, 0], layer[0, 7, 7] = 0.0, 1.0
    picture = torch.zeros(64, 64, 3)
    trained, base = pictures.Attention("", [layer], 8), pictures.Attention("base", [layer / 2], 8)
    _, ours, _, theirs, _ = columns(pictures.sheet(picture, ["dog"], [trained, base]), 64, 64)
    assert (ours[-1, -1] / 0.65 - colour(1.0)).abs().max() < 1e-3
    assert (theirs[-1, -1] / 0.65 - colour(0.5)).abs().max() < 5e-3
    alone = columns(pictures.sheet(picture, ["dog"], [base]), 64, 64)[1]
    assert (alone[-1, -1] / 0.65 - colour(1.0)).abs().max() < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.013])
def test_an_even_map_is_no_fault(value):
    even = torch.full((1, 4, 4), value)
    assert pictures.sheet(torch.rand(32, 32, 3), ["a"], [pictures.Attention("", [even], 4)]).isfinite().all()
    assert torch.equal(pictures.normalised(even), torch.zeros(1, 4, 4))


def test_large_images_are_drawn_smaller():
    layer = torch.rand(1, 4, 8)
    sheet = pictures.sheet(torch.rand(640, 1280, 3), ["a"], [pictures.Attention("", [layer], 8)])
    assert sheet.shape == (256 + 48, 3 * 512 + 2 * pictures.GAP, 3)


# -- on the host


@pytest.fixture(scope="module", params=KINDS)
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture(scope="module")
def personalized(graph):
    """The graph with a word of two vectors, and adapters for it in text encoder and U-Net."""
    from personalize.nodes.host import causal_adapters, clip_attachment, models

    model, clip, vae = graph
    generator = torch.Generator().manual_seed(0)
    names = models.encoder_names(clip)
    widths = [getattr(clip.cond_stage_model, n).transformer.get_input_embeddings().weight.shape[1] for n in names]
    vectors = {n: torch.randn(2, width, generator=generator) for n, width in zip(names, widths, strict=True)}
    tensors = {}
    for name, (rows, inputs) in causal_adapters._shapes(model, clip).items():
        tensors[f"{name}.down"] = torch.randn(1, inputs, generator=generator) / inputs**0.5
        tensors[f"{name}.up"] = torch.randn(rows, 1, generator=generator) / 2
    words = {"<dog>": causal_adapters.WordAdapters(tensors)}
    carried = clip_attachment.ClipAttachment(tokens={"<dog>": vectors}, adapters=words)
    return causal_adapters.attach_unet(model, words), clip_attachment.attach(clip, carried), vae


@pytest.fixture
def hosted():
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


def encode(clip, prompt):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def drawn(model, clip, prompt, height=8, width=12):
    from personalize.nodes.show_attention import denoise

    latent = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(1))
    return denoise(model, encode(clip, prompt), latent, torch.tensor([2.0, 0.0]), 0)


def recorded(model, clip, prompt, words):
    """Recorder and image."""
    from personalize.nodes.host.attention_recorder import Recorder

    recorder = Recorder(words)
    return recorder, drawn(recorder.on(model), clip, prompt)


def cross_attentions(model):
    return {name: m for name, m in model.model.diffusion_model.named_modules() if name.endswith("attn2")}


@pytest.mark.comfy
@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_recording_changes_nothing_that_is_drawn(personalized, hosted, prompt):
    model, clip, _ = personalized
    plain = drawn(model, clip, prompt)
    recorder, seen = recorded(model, clip, prompt, [[1]])
    assert (seen - plain).abs().max() < 1e-4 * plain.abs().max()
    assert len(recorder.maps) == len(cross_attentions(model)) > 5
    assert (drawn(model, clip, prompt.replace("snow", "sand")) - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.comfy
@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_every_layers_probabilities_are_those_of_its_weights_and_inputs(personalized, hosted, prompt):
    """Adapters among them: the inputs are what the layer really read. Over all tokens they add up to 1."""
    model, clip, _ = personalized
    layers, inputs, hooks = cross_attentions(model), {}, []
    for name, layer in layers.items():
        for part in ("to_q", "to_k"):

            def keep(module, args, output, key=(name, part)):
                inputs[key] = args[0].float(), module.weight.float()

            hooks.append(getattr(layer, part).register_forward_hook(keep))
    tokens = encode(clip, prompt)[0][0].shape[1]
    recorder, _ = recorded(model, clip, prompt, [[i] for i in range(tokens)])
    [hook.remove() for hook in hooks]
    assert tokens == (154 if prompt == LONG else 77) and len(inputs) == 2 * len(recorder.maps)
    # Every layer calls its recorder while it runs: both are in the order of the U-Net.
    for (name, layer), maps in zip(_in_order(layers, inputs), recorder.maps.values(), strict=True):
        q, k = (x[0].double() @ weight.double().T for x, weight in (inputs[name, "to_q"], inputs[name, "to_k"]))
        expected = by_hand(q, k, layer.heads).mean(dim=0).T
        assert (maps.flatten(1) - expected).abs().max() < 1e-5
        assert (maps.sum(dim=0) - 1).abs().max() < 1e-5
        assert tuple(maps.shape[1:]) in {(8, 12), (4, 6), (2, 3), (1, 2)}  # each level rounds up


def _in_order(layers, inputs):
    return [(name, layers[name]) for name, part in inputs if part == "to_q"]


@pytest.mark.comfy
def test_columns_follow_their_tokens(personalized, hosted):
    """Two tokens change places: so do their maps, and nothing else does."""
    model, clip, _ = personalized

    def swap(n, context, value, options):
        order = torch.arange(context.shape[1])
        order[[5, 9]] = torch.tensor([9, 5])
        return n, context[:, order], value[:, order]

    swapped = model.clone()
    swapped.set_model_attn2_patch(swap)
    words = [[5], [9], [2], [5, 9]]
    before, after = recorded(model, clip, PROMPT, words)[0], recorded(swapped, clip, PROMPT, words)[0]
    for block, maps in before.maps.items():
        assert (after.maps[block] - maps[[1, 0, 2, 3]]).abs().max() < 1e-5
    first = before.maps[min(before.maps)]
    assert (first[0] - first[1]).abs().max() > 1e-4


@pytest.mark.comfy
def test_words_are_found_where_they_stand(graph, personalized, hosted):
    from personalize.nodes.show_attention import positions

    clip = personalized[1]
    expected = {"<dog>": [5, 6], "dog": [7], "<dog> dog": [5, 6, 7], "a": [1, 4], "the snow": [10, 11]}
    expected |= {"snow": [11], "Photo": [2], "cat": [], "do": [], "snow the": [], ",": [8], "": [], "!": []}
    assert {word: positions(clip, PROMPT, word) for word in expected} == expected
    assert positions(clip, "a (photo:1.2) of a (<dog>:1.3) dog!", "<dog>") == [5, 6]
    assert positions(clip, "dog!", "!") == [2]  # whose number SD 2.x and SDXL also pad with
    assert positions(graph[1], "a <dog>", "<dog>") == [2, 3, 4]  # letters, for a CLIP that never learned it


@pytest.mark.comfy
def test_in_a_long_prompt_places_are_those_of_the_conditioning(personalized, hosted):
    """Text encoders look back only: what a word changes begins where it stands."""
    from personalize.nodes.show_attention import positions

    clip = personalized[1]
    told = encode(clip, LONG)[0][1]["personalize <dog>"].flatten().nonzero()[0].item()
    found = positions(clip, LONG, "<dog>")
    assert found == [told, told + 1] and told > 77
    snow, sand = encode(clip, LONG)[0][0], encode(clip, LONG.replace("snow", "sand"))[0][0]
    changed = (snow != sand).any(dim=-1).flatten().nonzero()[0].item()
    assert positions(clip, LONG, "snow") == [changed]
    assert len(positions(clip, LONG, "cat")) == 30


def look(graph, clip=None, **changes):
    """Sheet and maps of Show Attention for an image of 64 x 96 pixels."""
    from personalize.nodes.show_attention import ShowAttention

    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    values = {"image": picture, "prompt": PROMPT, "words": "<dog>, the snow", "noise_level": 0.5, "seed": 0} | changes
    model, own, vae = graph
    return ShowAttention.execute(model=model, clip=clip or own, vae=vae, **values).result


@pytest.mark.comfy
@pytest.mark.parametrize("noise", [0.05, 0.5, 0.95])
def test_the_image_is_looked_at_with_the_schedules_noise(graph, hosted, noise):
    model, clip, vae = graph
    seen = {}

    def wrapper(apply, args):
        seen.update(x=args["input"].clone(), t=args["timestep"].clone())
        return apply(args["input"], args["timestep"], **args["c"])

    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(wrapper)
    picture = torch.rand(1, 64, 96, 3)
    look((wrapped, clip, vae), image=picture, prompt="a dog", words="dog", noise_level=noise, seed=7)
    alpha = scaled_linear()[round(noise * 999)]
    sigma = ((1 - alpha) / alpha) ** 0.5
    latent = model.model.process_latent_in(vae.encode(picture))
    added = torch.randn(latent.shape, generator=torch.manual_seed(7))
    assert (seen["t"] - sigma).abs().max() < 1e-3 * sigma
    assert (seen["x"] - (latent + sigma * added)).abs().max() < 1e-3 * max(1, sigma)


@pytest.mark.comfy
def test_rows_columns_and_maps(graph, personalized, hosted):
    """Trained alone; beside the untrained model; and the maps for stock mask nodes."""
    sheet, maps = look(personalized)
    groups = len({tuple(m.shape[1:]) for m in recorded(*personalized[:2], PROMPT, [[1]])[0].maps.values()})
    tiles = 2 + groups
    assert sheet.shape == (1, 2 * (28 + 64) + 4, tiles * 96 + (tiles - 1) * 4, 3)
    assert sheet.min() >= 0 and sheet.max() <= 1 and sheet.dtype == torch.float32
    assert maps.shape == (2, 64, 96)
    assert maps.amin(dim=(1, 2)).tolist() == [0, 0] and maps.amax(dim=(1, 2)).tolist() == [1, 1]
    both, same = look(personalized, base_model=graph[0], base_clip=graph[1], base_words="cat")
    tiles += groups + 1
    assert both.shape == (1, 2 * (28 + 64) + 4, tiles * 96 + (tiles - 1) * 4, 3)
    assert torch.equal(maps, same)


@pytest.mark.comfy
def test_the_untrained_model_is_asked_in_its_own_words(graph, personalized, hosted, monkeypatch):
    from personalize.nodes import show_attention

    asked, original = [], show_attention.read_attention
    monkeypatch.setattr(show_attention, "read_attention", lambda *given: asked.append(given[0]) or original(*given))
    look(personalized, base_clip=graph[1], base_words="red cat")
    trained, base = asked
    assert (trained.prompt, trained.words) == (PROMPT, ["<dog>", "the snow"])
    assert (base.prompt, base.words) == (PROMPT.replace("<dog>", "red cat"), ["red cat", "the snow"])
    assert base.clip is graph[1] and base.model is personalized[0]  # what is not connected is the trained one


@pytest.mark.comfy
def test_a_model_beside_itself_shows_the_same(graph, hosted):
    sheet = look(graph, prompt="a dog", words="dog", base_model=graph[0], base_clip=graph[1])[0][0]
    _, *tiles = columns(sheet, 64, 96)
    half = len(tiles) // 2
    assert all(torch.equal(a, b) for a, b in zip(tiles[:half], tiles[half:], strict=True))


@pytest.mark.comfy
def test_the_seed_and_only_the_seed_decides(graph, hosted):
    first, again, other = (look(graph, prompt="a dog", words="dog", seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and (first - other).abs().max() > 1e-3


@pytest.mark.comfy
def test_what_was_learned_acts_on_the_maps(graph, personalized, hosted):
    """Adapters of the U-Net change what its layers read of the word, and here is where they are seen."""
    silent = graph[0], personalized[1], graph[2]
    assert (look(personalized)[1] - look(silent)[1]).abs().max() > 1e-3


@pytest.mark.comfy
def test_nothing_of_the_graph_is_changed(graph, personalized, hosted):
    patchers = [p for model, clip, _ in (graph, personalized) for p in (model, clip.patcher)]
    states = [(_copied(p.model_options), {**p.object_patches}, {**p.patches}) for p in patchers]
    before = [drawn(*pair[:2], PROMPT) for pair in (graph, personalized)]
    look(personalized, base_model=graph[0], base_clip=graph[1], base_words="cat")
    assert [(_copied(p.model_options), {**p.object_patches}, {**p.patches}) for p in patchers] == states
    after = [drawn(*pair[:2], PROMPT) for pair in (graph, personalized)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _copied(options):
    """Dicts and lists again, what they hold as it is."""
    if isinstance(options, dict):
        return {key: _copied(value) for key, value in options.items()}
    return [_copied(value) for value in options] if isinstance(options, list) else options


@pytest.mark.comfy
def test_another_packs_replacement_still_acts(graph, hosted):
    model, clip, _ = graph
    silenced = model.clone()
    for block in recorded(model, clip, PROMPT, [[1]])[0].maps:
        silenced.set_model_attn2_replace(lambda q, k, v, options: 0 * q, *block)
    plain = drawn(silenced, clip, PROMPT)
    recorder, seen = recorded(silenced, clip, PROMPT, [[1]])
    assert torch.equal(plain, seen) and not torch.equal(plain, drawn(model, clip, PROMPT)) and recorder.maps


@pytest.mark.comfy
def test_a_guidance_that_looks_twice_shows_the_same(graph, hosted):
    """In one batch, or after the first time with other words."""
    model, clip, _ = graph
    two, again = model.clone(), model.clone()
    two.model_options["disable_cfg1_optimization"] = True
    silence = encode(clip, "")[0][0]

    def wrapper(apply, args):
        first = apply(args["input"], args["timestep"], **args["c"])
        apply(args["input"], args["timestep"], **{**args["c"], "c_crossattn": silence})
        return first

    again.set_model_unet_function_wrapper(wrapper)
    ours, *others = (recorded(m, clip, PROMPT, [[1], [5]])[0].maps for m in (model, two, again))
    for theirs in others:
        assert all((ours[block] - theirs[block]).abs().max() < 1e-5 for block in ours)


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"words": "cat"}, "^The word 'cat' is not in the prompt: write it as it is written there"),
        ({"words": "dog, <cat>"}, "^The word '<cat>' is not in the prompt"),
        ({"words": " , "}, "^There is no word to show"),
        ({"prompt": ""}, "^The word '<dog>' is not in the prompt"),
        (
            {"image": torch.rand(1, 64, 40, 3)},
            "^The image is only 40 x 64 pixels: use one with at least 64 pixels per side",
        ),
        ({"image": torch.full((1, 64, 64, 3), float("nan"))}, "^The image contains NaN or infinite values"),
        ({"image": torch.rand(0, 64, 64, 3)}, "^There is no image to show attention for"),
        ({"noise_level": 1.0}, "^The value of noise_level is 1.0: use 0.05 to 0.95"),
    ],
)
def test_what_cannot_be_shown_gets_one_sentence(personalized, hosted, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        look(personalized, **changes)


@pytest.mark.comfy
def test_the_untrained_model_needs_words_and_the_family(graph, personalized, hosted, tmp_path):
    from personalize.tests.support import random_sd

    for base in ({"base_model": graph[0]}, {"base_clip": graph[1]}):
        with pytest.raises(ValueError, match=r"^The untrained model has not learned <dog>: write its replacement"):
            look(personalized, **base, base_words="  ")
    kind = "SDXL" if type(graph[0].model.model_config).__name__ != "RandomSDXL" else "SD 1.x"
    others = dict(zip(("base_model", "base_clip"), random_sd.graph(tmp_path, kind), strict=False))
    with pytest.raises(ValueError, match=r"^The base model is SD.*, but the model is SD.*: connect the one it was"):
        look(personalized, **others, base_words="cat")


# -- on a real server, with the demo's model, which knows what red is


@pytest.mark.slow
@pytest.mark.comfy
def test_heat_lies_where_the_word_is_drawn(server):
    """A red dog in a wide image: the word `red` acts on what is red, and `maps` stand as the image does."""
    import numpy as np

    text, sampled = "a photo of a red dog in the snow", {"seed": 3, "steps": 20, "cfg": 4.0, "denoise": 1.0}
    links = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2], "image": ["decode", 0]}
    conditions = {"model": links["model"], "positive": ["positive", 0], "negative": ["negative", 0]}
    nodes = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": server.checkpoint}),
        "positive": ("CLIPTextEncode", {"clip": links["clip"], "text": text}),
        "negative": ("CLIPTextEncode", {"clip": links["clip"], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": 160, "height": 128, "batch_size": 1}),
        "sampler": (
            "KSampler",
            conditions | sampled | {"latent_image": ["latent", 0], "sampler_name": "ddim", "scheduler": "normal"},
        ),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": links["vae"]}),
        "look": (
            "PersonalizeShowAttention",
            links | {"prompt": text, "words": "red, dog", "noise_level": 0.5, "seed": 0},
        ),
        "masks": ("MaskToImage", {"mask": ["look", 1]}),
        "picture": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "picture"}),
        "sheet": ("SaveImage", {"images": ["look", 0], "filename_prefix": "sheet"}),
        "maps": ("SaveImage", {"images": ["masks", 0], "filename_prefix": "maps"}),
    }
    history = server.run({name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()})
    images = server.images(history)
    assert [sheet.size for sheet in images["sheet"]] == [(3 * 160 + 8, 2 * (128 + 28) + 4)]
    picture = np.asarray(images["picture"][0].convert("RGB")).astype(float)
    heat, dog = (np.asarray(image.convert("L")).astype(float) for image in images["maps"])
    assert heat.shape == dog.shape == picture.shape[:2] == (128, 160)
    red = (picture[..., 0] > 150) & (picture[..., 1:].max(axis=-1) < 90)
    assert 0.005 < red.mean() < 0.5
    assert heat[red].mean() > 2 * heat[~red].mean()
    for turned in (heat[::-1], heat[:, ::-1], heat[::-1, ::-1]):
        assert heat[red].mean() > 1.3 * turned[red].mean()
