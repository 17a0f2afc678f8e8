"""A pipeline's folder as diffusers saves it: do MODEL and CLIP become that pipeline, and what is said if not?"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.tests.support.saved import load

pytestmark = pytest.mark.comfy
TABLE = "text_model.embeddings.token_embedding.weight"
CHANGED = ("conv_in.weight", "conv_out.bias", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")


@pytest.fixture(scope="module", params=("SD 1.x", "SD 2.x epsilon", "SDXL"))
def graph(tmp_path_factory, request):
    """MODEL, CLIP, VAE of a random checkpoint."""
    from personalize.tests.support import random_sd

    return random_sd.graph(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture
def pipeline(graph, model_folders, tmp_path, monkeypatch):
    """`pipeline(...)`: writes models/diffusers/mine from the graph's own weights, three of the U-Net's changed.

    Returns the U-Net of diffusers and the new rows of each text encoder: two of `<dog>`, one of `<cat>`.
    """
    import folder_paths

    from personalize.nodes.host import session, weights
    from personalize.nodes.host.models import encoder_names

    root = tmp_path / "models" / "diffusers"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], {"folder"}))
    names = {"<dog>": 49408, "<dog>_1": 49409, "<cat>": 49410}

    def write(added=names, shift=0.0, layers="text_model."):
        with session.training_session():
            unet = weights.read_models(weights.GraphModels.of(*graph), torch.float32).unet
        for name, parameter in unet.named_parameters():
            if name in CHANGED:
                parameter.data += 0.125
        unet.save_pretrained(root / "mine" / "unet")
        rows = []
        for i, name in enumerate(encoder_names(graph[1])):
            state = weights.effective_state_dict(graph[1].patcher, f"{name}.transformer.")
            rows.append(torch.randn(3, state[TABLE].shape[1], generator=torch.Generator().manual_seed(i)))
            state[TABLE] = torch.cat([state[TABLE], rows[-1]])
            state["text_model.final_layer_norm.weight"] += shift
            number = f"_{i + 1}" if i else ""
            for folder in ("text_encoder", "tokenizer"):
                (root / "mine" / f"{folder}{number}").mkdir(parents=True)
            state = {key.replace("text_model.", layers, 1): value.contiguous() for key, value in state.items()}
            save_file(state, root / "mine" / f"text_encoder{number}" / "model.safetensors")
            (root / "mine" / f"tokenizer{number}" / "added_tokens.json").write_text(json.dumps(added))
        return unet, rows

    return write


@pytest.mark.parametrize("layers", ["text_model.", ""], ids=["transformers 4", "transformers 5"])
def test_the_graph_becomes_the_pipeline(graph, pipeline, layers):
    from personalize.nodes.host import clip_attachment, session, weights

    unet, rows = pipeline(layers=layers)
    model, clip, result = load(graph, diffusers="mine")
    assert len(result.lora) == len(CHANGED)
    with session.training_session():
        now = weights.read_models(weights.GraphModels.of(model, *graph[1:]), torch.float32).unet.state_dict()
    assert all(torch.allclose(now[name], value, atol=1e-3) for name, value in unet.state_dict().items())
    tokens = clip_attachment.of(clip).tokens
    for encoder, own in zip(tokens["<dog>"], rows, strict=True):
        assert torch.equal(tokens["<dog>"][encoder], own[:2]) and torch.equal(tokens["<cat>"][encoder], own[2:])
    assert tokens.keys() == {"<dog>", "<cat>"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"shift": 0.5},
            "The text encoder 'text_encoder' differs from this CLIP's, such as in 'text_model.final_layer",
        ),
        ({"added": {"<dog>": 49500}}, "The token <dog> has no row in 'text_encoder': download or save"),
        ({"added": ["<dog>"]}, "The file 'tokenizer/added_tokens.json' cannot be read: download or save"),
    ],
    ids=str,
)
def test_what_does_not_fit_gets_one_sentence(graph, pipeline, options, sentence):
    pipeline(**options)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        load(graph, diffusers="mine")


def test_other_folders_get_one_sentence(graph, pipeline, model_folders):
    pipeline()
    folder = model_folders["loras"].parent / "diffusers" / "mine" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(folder)
    save_file({**state, "conv_in.weight": state["conv_in.weight"][:1].clone()}, folder)
    with pytest.raises(
        ValueError, match="^The U-Net of this folder has 'conv_in.weight', 1 x 4 x 3 x 3, which this MODEL"
    ):
        load(graph, diffusers="mine")
    for name in ("nothing", "../diffusers/mine", "mine/unet"):
        with pytest.raises(ValueError, match="^There is no folder .* in models/diffusers: choose one from the list"):
            load(graph, diffusers=name)
