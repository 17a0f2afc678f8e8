"""What a LoRA or an embedding file may hold that this pack does not know: is each refused in one sentence?"""

import json
import re
from pathlib import Path

import pytest
import torch

from personalize.tests.support import prompts
from personalize.trainers.formats import foreign
from personalize.trainers.runs.result import complete, from_other_programs, read_complete

D, U = "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"
PAIR = {D: torch.ones(2, 4, 3, 3), U: torch.ones(32, 2, 1, 1)}
PEFT = {f"unet.conv_in.lora_{x}.weight": value for x, value in zip("AB", PAIR.values(), strict=True)}
STOCK = r"use ComfyUI's own Load LoRA for this one\.$"
UNKNOWN = rf"entries are unknown here \(such as .*\): {STOCK}"


def described_as(**config):
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}


REFUSED = {
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(1, 1)}, {}, f"^This LoRA is a LoHa, .*: {STOCK}"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(1, 1)}, {}, f"^This LoRA is a LoKr, .*: {STOCK}"),
    "DoRA": (PAIR | {"lora_unet_conv_in.dora_scale": torch.ones(32, 1)}, {}, f"^This LoRA is a DoRA, .*: {STOCK}"),
    "PEFT's DoRA": (PEFT | {"unet.conv_in.lora_magnitude_vector": torch.ones(32)}, {}, "^This LoRA is a DoRA"),
    "DoRA that is only said": (PEFT, described_as(use_dora=True), "^This LoRA is a DoRA"),
    "Tucker": (PAIR | {"lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3)}, {}, "^This LoRA is a LoCon in"),
    "norms": (PAIR | {"lora_unet_norm.w_norm": torch.ones(2)}, {}, f"^1 of this LoRA's 3 {UNKNOWN}"),
    "weights to set": (PAIR | {"lora_unet_conv_in.set_weight": torch.ones(2)}, {}, UNKNOWN),
    "another architecture": ({"transformer.blocks.0.lora_A.weight": torch.ones(1, 1)}, {}, UNKNOWN),
    "a checkpoint": ({"model.diffusion_model.out.2.bias": torch.ones(4)}, {}, UNKNOWN),
    "biases of PEFT": (PEFT | {"unet.conv_in.lora_B.bias": torch.ones(32)}, {}, UNKNOWN),
    "PEFT without its settings": (
        {f"base_model.model.{key}": v for key, v in PEFT.items()},
        {},
        r"^This LoRA of PEFT has its scale in adapter_config\.json: copy that file of its folder next to it\.$",
    ),
    "an old file with one odd entry": (
        {key.removeprefix("unet."): v for key, v in PEFT.items()} | {"odd": torch.ones(1)},
        {},
        rf"^1 of this LoRA's 3 entries are unknown here \(such as 'odd'\): {STOCK}",
    ),
    "a pair and one odd entry": (PEFT | {"unet.odd": torch.ones(1)}, {}, f"^1 of this LoRA's 3 {UNKNOWN}"),
    "two alphas": (PEFT | {"unet.conv_in.alpha": torch.ones(2)}, {}, UNKNOWN),
    "a layer twice": (
        PEFT | {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for key, v in PEFT.items()},
        {},
        f"^This LoRA contains a layer twice, in two spellings: {STOCK}",
    ),
    "quantized": (
        {key: value.to(torch.int8) for key, value in PAIR.items()},
        {},
        f"^This LoRA has whole numbers in '{re.escape(D)}', as quantized files do: {STOCK}",
    ),
    "two ranks": (PAIR | {D: torch.ones(3, 4, 3, 3)}, {}, "^The layer 'lora_unet_conv_in' of this LoRA is incomplete"),
    "no rank": ({D: torch.ones(0, 4, 3, 3), U: torch.ones(32, 0, 1, 1)}, {}, "of this LoRA is incomplete"),
    "nothing": ({}, {}, f"^0 of this LoRA's 0 entries are unknown here: {STOCK}"),
    "half a layer": ({D: PAIR[D]}, {}, r"^The layer 'lora_unet_conv_in' of this LoRA is incomplete: download or save"),
    "the other half": ({U: PAIR[U]}, {}, "is incomplete"),
    "half a layer of PEFT": ({"unet.conv_in.lora_A.weight": torch.ones(1, 1)}, {}, "is incomplete"),
    "flat": ({key: value.flatten() for key, value in PAIR.items()}, {}, "is incomplete"),
    "a LoRA and a difference": (PAIR | {"lora_unet_conv_in.diff": torch.ones(1)}, {}, "is incomplete"),
    "a pattern as scale": (PEFT, described_as(alpha_pattern={"conv_.*": 2}), "description of its scale cannot be read"),
    "a word as scale": (PEFT, described_as(lora_alpha="two"), "description of its scale cannot be read"),
    "a list as scales": (PEFT, described_as(alpha_pattern=[1]), "description of its scale cannot be read"),
    "settings that are no JSON": (PEFT, {"lora_adapter_metadata": "{"}, "description of its scale cannot be read"),
    "settings that are a list": (PEFT, {"lora_adapter_metadata": "[]"}, "description of its scale cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_in_one_sentence(name):
    state, header, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence) as error:
        foreign.lora(state, header)
    assert not prompts.faults(str(error.value))


def test_settings_of_another_lora_of_peft_are_not_taken():
    state = {f"base_model.model.{key.removeprefix('unet.')}": v for key, v in PEFT.items()}
    config = {"r": 2, "lora_alpha": 8}
    assert foreign.lora(state, {}, json.dumps(config))["lora_unet_conv_in.alpha"] == 8
    with pytest.raises(ValueError, match="The adapter_config.json next to this LoRA is another one's: copy its own"):
        foreign.lora(state, {}, json.dumps(config | {"r": 16}))


ODD_EMBEDDINGS = {
    "another width": (
        {"<dog>": torch.ones(2, 9)},
        r"^This embedding is 2 x 9 but this CLIP's embeddings are 8 wide: use",
    ),
    "SDXL's": (
        {"clip_l": torch.ones(1, 8), "clip_g": torch.ones(1, 9)},
        "contains 'clip_g', 'clip_l' but this CLIP needs cl",
    ),
    "two words": ({"<a>": torch.ones(8), "<b>": torch.ones(8)}, "^This embedding contains '<a>', '<b>' but"),
    "a scalar": ({"<dog>": torch.tensor(1.0)}, "^This embedding is a single number"),
    "no rows": ({"<dog>": torch.ones(0, 8)}, "^This embedding is 0 x 8"),
    "ids": ({"<dog>": torch.ones(1, 8).long()}, "^This embedding is 1 x 8"),
    "nothing": ({}, "^This embedding contains nothing"),
}


@pytest.mark.parametrize("name", ODD_EMBEDDINGS)
def test_an_embedding_that_does_not_fit_is_refused(name):
    state, sentence = ODD_EMBEDDINGS[name]
    with pytest.raises(ValueError, match=sentence) as error:
        foreign.embedding(state, {"clip_l": 8})
    assert not prompts.faults(str(error.value))


def test_an_embedding_for_two_encoders_is_read():
    state = {"clip_g": torch.randn(2, 16), "clip_l": torch.randn(2, 8)}
    vectors = foreign.embedding(state, {"clip_l": 8, "clip_g": 16})
    assert torch.equal(vectors[0], state["clip_l"]) and torch.equal(vectors[1], state["clip_g"])


def test_every_text_encoder_gets_its_own_layers():
    """SDXL's two, in transformers' nested and flat names, and the projection that only the second has."""
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    paths = ("text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj")
    state = {f"{path}.lora_{x}.weight": value for path in paths for x, value in (("A", down), ("B", up))}
    state |= {
        "text_encoder_2.text_projection.lora.down.weight": down,
        "text_encoder_2.text_projection.lora.up.weight": up,
    }
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 6, "text_encoder_2.lora_alpha": 8})}
    found = foreign.lora(state, header)
    alphas = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": 6,
        "lora_te2_text_model_encoder_layers_1_self_attn_k_proj": 8,
        "lora_te2_text_projection": 8,
    }
    assert found.keys() == {
        f"{name}.{part}" for name in alphas for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    for name, alpha in alphas.items():
        assert found[f"{name}.alpha"] == alpha
        assert torch.equal(found[f"{name}.lora_down.weight"], down) and torch.equal(found[f"{name}.lora_up.weight"], up)


def complete_file():
    """A small complete file: tensors and header."""
    result = from_other_programs("mine", dict(PAIR), {}, {"<dog>": (torch.ones(1, 8),)})
    return complete(result, "mine")


def test_a_complete_file_is_whole():
    state, header = complete_file()
    result = read_complete(state, header, Path("mine.safetensors"))
    assert result.tokens.keys() == {"<dog>"} and result.lora.keys() == PAIR.keys()


DAMAGES = {
    "no header": lambda state, about: about.clear(),
    "no settings": lambda state, about: about.pop("settings"),
    "null settings": lambda state, about: about.update(settings=None),
    "another word": lambda state, about: about["settings"]["concept"].update(placeholder_token="<cat>"),
    "a number for a word": lambda state, about: about["settings"]["concept"].update(placeholder_token=5),
    "no method": lambda state, about: about["settings"].pop("method"),
    "a word for the history": lambda state, about: about.update(history="many"),
    "a number for the history": lambda state, about: about.update(history=5),
    "words for the origin": lambda state, about: about.update(origin="here"),
    "an unknown tensor": lambda state, about: state.update(other=torch.ones(1)),
    "an odd word": lambda state, about: state.update({"tokens.x": torch.ones(1, 8)}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_complete_file_gets_one_sentence(name):
    state, header = complete_file()
    about = json.loads(header["personalize"])
    DAMAGES[name](state, about)
    with pytest.raises(ValueError, match=r"^This file of Save Personalized is incomplete: save the result again\.$"):
        read_complete(state, header | {"personalize": json.dumps(about)}, Path("mine.safetensors"))


def test_names_of_tensors_are_quoted():
    """They are a stranger's: an escape sequence or a new line in one would reach the log and the terminal."""
    name = "lora_unet_\x1b[2J\nERROR"
    for state in ({f"{name}.x": torch.ones(1)}, {f"{name}.lora_up.weight": torch.ones(1)}):
        with pytest.raises(ValueError) as error:
            foreign.lora(state, {})
        assert "ERROR" in str(error.value) and str(error.value).isprintable()
    with pytest.raises(ValueError) as error:
        foreign.embedding({name: torch.ones(1, 4), "b": torch.ones(1, 4)}, {"clip_l": 4})
    assert "ERROR" in str(error.value) and str(error.value).isprintable()


def test_one_unknown_entry_is_counted_as_one():
    """Beside 36 of kohya's names, whatever it is called."""
    many = {f"lora_unet_{i}.{part}": value for i in range(18) for part, value in (("diff", ONE), ("diff_b", ONE))}
    for odd in ("text_projection", "lora_unet_0.w_norm"):
        with pytest.raises(ValueError, match=rf"^1 of this LoRA's 37 entries are unknown here \(such as '{odd}'\)"):
            foreign.lora(many | {odd: ONE}, {})


ONE = torch.ones(2)
