"""LoRAs and embeddings of other programs: does Load Personalized Files compute what diffusers does with them?

Adapters on random models in the real layout, written by diffusers' and PEFT's own functions in every spelling.
"""

import re

import diffusers
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from personalize.tests.support.saved import load, same, save, stock, unet, words
from personalize.tests.trainers.formats.test_kohya import pipeline

pytestmark = pytest.mark.comfy
UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "conv_in"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PROMPT = "a photo of a dog"


@pytest.fixture(scope="module", params=("SD 1.x", "SD 2.x v"))
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture(scope="module")
def fresh(graph, comfyui):
    """`fresh()`: a diffusers pipeline with the graph's weights."""
    from personalize.nodes.host import session, weights

    def build():
        with session.training_session():
            models = weights.read_models(weights.GraphModels.of(*graph), torch.float32)
        return pipeline(comfyui, models.family, models)

    return build


@pytest.fixture(scope="module")
def untouched(fresh):
    """What such a pipeline computes."""
    return outputs(fresh())


@pytest.fixture(scope="module")
def adapted(fresh):
    """`adapted(**config)`: such a pipeline with random adapters, whose ranks and scales differ between layers."""
    from peft import LoraConfig

    def build(alpha_pattern=None, **options):
        pipe, g = fresh(), torch.Generator().manual_seed(3)
        for module, targets in ((pipe.unet, UNET), (pipe.text_encoder, TEXT)):
            alphas = {name: alpha for name, alpha in (alpha_pattern or {}).items() if name in targets}
            ranks = {targets[0]: 2}
            config = LoraConfig(r=3, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas, **options)
            module.add_adapter(config)
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn(parameter.shape, generator=g) * (0.05 if ".conv" in name else 0.15)
        return pipe

    return build


def states(pipe):
    from peft import get_peft_model_state_dict

    return {"unet": get_peft_model_state_dict(pipe.unet), "text_encoder": get_peft_model_state_dict(pipe.text_encoder)}


def outputs(pipe):
    g = torch.Generator().manual_seed(1)
    context, latents = torch.randn(2, 77, 64, generator=g), torch.randn(2, 4, 16, 16, generator=g)
    with torch.no_grad():
        noise = pipe.unet(latents, torch.tensor([3, 801]), context).sample
        return noise, pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]


def write(folder, **layers):
    """With diffusers' own function; returns the file's tensors."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.save_lora_weights(folder, weight_name="theirs.safetensors", **layers)
    return load_file(folder / "theirs.safetensors")


def plain(pipe):
    """What diffusers' training scripts write."""
    return {"unet_lora_layers": states(pipe)["unet"], "text_encoder_lora_layers": states(pipe)["text_encoder"]}


def described(pipe):
    from diffusers.training_utils import _collate_lora_metadata

    return plain(pipe) | _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})


def in_diffusers_names(pipe):
    from diffusers.utils import convert_state_dict_to_diffusers

    return {name: convert_state_dict_to_diffusers(layers) for name, layers in plain(pipe).items()}


def nested(state):
    """As transformers 4 names the text encoder."""
    return {key.replace("text_encoder.encoder.", "text_encoder.text_model.encoder."): v for key, v in state.items()}


def kohya(state):
    from diffusers.utils import convert_state_dict_to_kohya

    converted = convert_state_dict_to_kohya(nested(state))
    return {key.replace("lora_te1_", "lora_te_"): value.float() for key, value in converted.items()}


def without_alpha(state):
    return {key: value for key, value in kohya(state).items() if not key.endswith(".alpha")}


def processors(state):
    """As diffusers wrote attention before PEFT."""
    names = {f".{x}.lora_{a}.": f".processor.{x}_lora.{b}." for x in ("to_q", "to_k", "to_v") for a, b in PARTS}
    names |= {f".to_out.0.lora_{a}.": f".processor.to_out_lora.{b}." for a, b in PARTS}
    names |= {f".{x}_proj.lora_{a}.": f".to_{x}_lora.{b}." for x in ("q", "k", "v", "out") for a, b in PARTS}
    names |= {f".{x}.lora_{a}.": f".{x}.lora_linear_layer.{b}." for x in ("fc1", "fc2") for a, b in PARTS}
    return {renamed(key, names): value for key, value in nested(state).items()}


PARTS = (("A", "down"), ("B", "up"))


def renamed(key, names):
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def with_alphas(state):
    """Alphas as keys of their own; 1.5 / rank as the scale everywhere."""
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith("lora_A.weight")]
    return state | {f"{name}.alpha": torch.tensor(1.5) for name in names}


def ldm(state, model):
    """kohya's names with the U-Net's original paths, as for SDXL."""
    import comfy.utils

    paths = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    under = {f"lora_unet_{a.removesuffix('.weight').replace('.', '_')}": b for a, b in paths.items()}
    found = {}
    for key, value in kohya(state).items():
        layer, _, part = key.partition(".")
        path = under.get(layer, "").removesuffix(".weight").replace(".", "_")
        found[f"lora_unet_{path}.{part}" if path else key] = value
    assert not any("down_blocks" in key for key in found) and any("input_blocks" in key for key in found)
    return found


AS_RANKS = {"lora_alpha": 3, "alpha_pattern": {"to_q": 2, "q_proj": 2}}  # a scale of one everywhere
# Before 0.40 diffusers itself scales layers of a rarer rank wrongly where a file has no alphas.
NO_ALPHAS = Version(diffusers.__version__) >= Version("0.40")
SPELLINGS = {  # how it is written, PEFT's options, what is done to the file afterwards, does diffusers load it
    "peft": (plain, AS_RANKS, None, NO_ALPHAS),
    "peft, described": (described, {"lora_alpha": 6, "alpha_pattern": {"to_k": 1, "fc1": 12}}, None, True),
    "peft, rank-stabilised": (described, {"lora_alpha": 2, "use_rslora": True}, None, True),
    "peft, alphas": (plain, {"lora_alpha": 1.5}, with_alphas, False),
    "peft, transformers 4": (plain, AS_RANKS, nested, NO_ALPHAS),
    # diffusers itself leaves out the U-Net's attention where such a file has LoRA beside it
    "diffusers": (in_diffusers_names, AS_RANKS, None, False),
    "before peft": (plain, AS_RANKS, processors, False),
    "kohya": (plain, AS_RANKS, kohya, False),
    "kohya, no alpha": (plain, AS_RANKS, without_alpha, False),
    "kohya, original paths": (plain, AS_RANKS, ldm, False),
}


# Of the second family, whose layers and paths are others, one of each kind of name.
CASES = [("SD 1.x", each) for each in SPELLINGS]
CASES += [("SD 2.x v", each) for each in ("peft", "peft, alphas", "diffusers", "kohya", "kohya, original paths")]


@pytest.mark.parametrize(("graph", "spelling"), CASES, indirect=["graph"])
def test_a_lora_of_any_spelling_computes_what_its_maker_did(graph, model_folders, fresh, untouched, adapted, spelling):
    from personalize.nodes import apply as applying
    from personalize.nodes.host import full_precision

    writer, options, change, loadable = SPELLINGS[spelling]
    pipe, file = adapted(**options), model_folders["loras"] / "theirs.safetensors"
    state = write(model_folders["loras"], **writer(pipe))
    if change:
        more = [graph[0]] if change is ldm else []
        save_file(state := {key: value.clone() for key, value in change(state, *more).items()}, file)
    made = outputs(pipe)
    model, clip, result = load(graph, lora=file.name, full_precision=True)
    for ours, theirs, base in zip((unet(model), words(clip, PROMPT)), made, untouched, strict=True):
        difference, effect = (ours - theirs).abs().max(), (theirs - base).abs().max()
        print(f"difference {difference:.1e}, effect {effect:.1e}")
        assert effect > 0.3 and difference < 1e-4
    if loadable:
        again = fresh()
        again.load_lora_weights(str(model_folders["loras"]), weight_name=file.name)
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(outputs(again), made, strict=True))
    layers = len([key for key in state if not key.endswith("alpha")]) // 2
    _, *keys = applying.check(*graph[:2], result)
    patchers = graph[0].clone(), graph[1].clone().patcher
    assert [len(result.lora), layers > 60] == [3 * layers, True]
    assert (
        sum(full_precision.add(patcher, result.lora, k, 1.0) for patcher, k in zip(patchers, keys, strict=True))
        == layers
    )


def test_the_stock_loader_leaves_out_what_this_node_uses(graph, model_folders, adapted):
    """Why the node exists, for as long as it is so; once this fails, its help page can say less."""
    state = write(model_folders["loras"], **plain(adapted(lora_alpha=3)))
    used = stock(graph, state)[1]
    attention = {key for key in state if ".attn" in key}
    assert len(attention) > 80 and not used & {key for key in attention if "to_q" in key}


def test_a_loaded_lora_is_saved_for_the_stock_loader(graph, model_folders, adapted):
    """Save after Load: kohya's names, which the host's own Load LoRA uses to the last key."""
    write(model_folders["loras"], **described(adapted(lora_alpha=6)))
    model, clip, result = load(graph, lora="theirs.safetensors")
    save(result)
    state = load_file(model_folders["loras"] / "mine.safetensors")
    (theirs, their_clip), used = stock(graph, state)
    assert used == set(state)
    assert torch.equal(unet(model), unet(theirs)) and torch.equal(words(clip), words(their_clip))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_lora_that_peft_itself_saved(graph, model_folders, fresh, component):
    """`save_pretrained` writes one component, and its scale into a file of its own."""
    from peft import LoraConfig, get_peft_model

    pipe, folder, g = fresh(), model_folders["loras"] / "theirs", torch.Generator().manual_seed(3)
    base = outputs(pipe)
    targets = UNET if component == "unet" else TEXT
    adapted = get_peft_model(getattr(pipe, component), LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=g) * (0.05 if ".conv" in name else 0.15)
    adapted.save_pretrained(folder)
    made = outputs(pipe)
    model, clip, _ = load(graph, lora="theirs/adapter_model.safetensors", full_precision=True)
    for ours, theirs in zip((unet(model), words(clip, PROMPT)), made, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    assert max((theirs - before).abs().max() for theirs, before in zip(made, base, strict=True)) > 0.3
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has its scale in adapter_config\.json: copy that file"):
        load(graph, lora="theirs/adapter_model.safetensors")


def test_names_of_adapters_are_left_out(graph, model_folders, adapted):
    """As a module names its adapter "default", and its file does not."""
    state = write(model_folders["loras"], **plain(adapted(**AS_RANKS)))
    named = {re.sub(r"(lora_[AB])\.", r"\1.default.", key): value for key, value in state.items()}
    assert sum(".default.weight" in key for key in named) == len(named)
    save_file(named, model_folders["loras"] / "named.safetensors")
    assert same(load(graph, lora="named.safetensors")[2].lora, load(graph, lora="theirs.safetensors")[2].lora)


def test_a_lora_that_changes_nothing_says_so(graph, model_folders, monkeypatch):
    """As a training leaves it that learned nothing."""
    from personalize.nodes import load_files

    said, layer = [], "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    monkeypatch.setattr(load_files, "notices", lambda node: said.append)
    for up in (torch.zeros(64, 2), torch.ones(64, 2)):
        state = {f"{layer}.lora_down.weight": torch.ones(2, 64), f"{layer}.lora_up.weight": up}
        save_file(state, model_folders["loras"] / "zero.safetensors")
        load(graph, lora="zero.safetensors")
    assert said == [
        f"no placeholder token; 3 LoRA tensors{more}" for more in (", all zero, so that it changes nothing", "")
    ]


@pytest.mark.parametrize("name, part", [("<my dog>", "clip_l"), ("ohwx", "string_to_param.*"), ("a.b", "emb_params")])
def test_embeddings_inside_of_a_lora_are_read_too(graph, model_folders, adapted, name, part):
    """As OneTrainer bundles them; one that is chosen beside it comes first."""
    state, rows = write(model_folders["loras"], **plain(adapted(**AS_RANKS))), torch.randn(2, 64)
    save_file(state | {f"bundle_emb.{name}.{part}": rows}, model_folders["loras"] / "bundled.safetensors")
    save_file({"x": rows[:1]}, model_folders["embeddings"] / "chosen.safetensors")
    word = {"<my dog>": "<my_dog>", "ohwx": "<ohwx>", "a.b": "<a_b>"}[name]
    _, clip, alone = load(graph, lora="bundled.safetensors")
    (chunks,) = clip.tokenize(f"a photo of {word}").values()
    assert torch.equal(torch.stack([token for token, _ in chunks[0] if torch.is_tensor(token)]), rows)
    assert alone.placeholder_token == word and len(alone.lora) > 100
    both = load(graph, lora="bundled.safetensors", embedding="chosen.safetensors", placeholder_token="<mine>")[2]
    assert both.placeholder_token == "<mine>" and [*both.tokens] == ["<mine>", word]


# -- embeddings


def embedding_files(vectors):
    return {
        "A1111": {"emb_params": vectors},
        "A1111, flattened": {"string_to_param.*": vectors, "string_to_token.*": torch.tensor(265)},
        "diffusers": {"<dog>": vectors},
        "half precision": {"<dog>": vectors.half()},
    }


@pytest.mark.parametrize("kind", embedding_files(torch.ones(1, 1)))
@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_embedding_gives_the_learned_rows(graph, model_folders, kind, count):
    """In the prompt, at the word's place, exactly the file's rows; one vector may be flat."""
    rows = torch.randn(count or 1, 64).half().float()
    state = embedding_files(rows if count else rows[0])[kind]
    save_file(state, model_folders["embeddings"] / "dog.safetensors")
    _, clip, result = load(graph, embedding="dog.safetensors", placeholder_token="<my-dog>")
    (chunks,) = clip.tokenize("a photo of <my-dog>").values()
    found = [token for token, _ in chunks[0] if torch.is_tensor(token)]
    assert torch.equal(torch.stack(found), rows)
    assert torch.equal(result.tokens["<my-dog>"][0], rows) and result.lora == {}


def test_diffusers_reads_the_same_rows(graph, model_folders, fresh):
    """What diffusers makes of a saved word, Load Files makes too: the same output of the text encoder."""
    rows = torch.randn(2, 64)
    save_file({"<dog>": rows}, model_folders["embeddings"] / "dog.safetensors")
    pipe = fresh()
    pipe.load_textual_inversion(str(model_folders["embeddings"] / "dog.safetensors"))
    theirs = pipe.encode_prompt("a photo of <dog>", "cpu", 1, False)[0]
    clip = load(graph, embedding="dog.safetensors", placeholder_token="<dog>")[1]
    assert (words(clip, "a photo of <dog>") - theirs).abs().max() < 1e-4
