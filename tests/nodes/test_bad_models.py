"""Models that cannot be trained, and parts that do not belong together: one sentence, before anything starts."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from personalize.tests.support import prompts, random_sd

pytestmark = pytest.mark.comfy
WIDTH = 96
TRAINABLE = ("SD15", "SD20", "SDXL")
FLOWS = ("ZImage", "Lumina2", "QwenImage", "Krea2", "Flux", "FluxSchnell", "Flux2", "SD3", "Chroma")


def families():
    """Every family that the host knows but those that can be trained."""
    import comfy.supported_models

    host = comfy.supported_models  # other tests teach it small models of their own
    own = [one for one in host.models if one.__module__ == host.__name__]
    return [one for one in own if one.__name__ not in (*TRAINABLE, *FLOWS)]


def model_of(config, **unet):
    """A MODEL as far as its family is asked for."""
    family = config.__new__(config)
    family.unet_config = {"in_channels": 4, "context_dim": random_sd.WIDTH, **config.unet_config, **unet}
    return SimpleNamespace(model=SimpleNamespace(model_config=family))


def test_every_other_family_is_refused_by_its_name():
    from personalize.nodes.host.models import family_of

    assert len(families()) > 80
    names = set()
    for config in families():
        with pytest.raises(ValueError) as error:
            family_of(model_of(config))
        assert not prompts.faults(str(error.value))
        sentence = r"This model is ([\w.\- ]+), but only plain SD 1\.x, [\w.\-, ]+ and Chroma models can be trained: "
        names.add(re.match(sentence, str(error.value))[1])
    assert {
        "SDXLRefiner",
        "SSD-1B",
        "KOALA_700M",
        "WAN21_T2V",
        "SVD_img2vid",
        "HunyuanVideo",
        "ACEStep",
        "LTXAV",
    } <= names
    assert {"SD21UnclipL", "SD21UnclipH", "LotusD", "FluxInpaint", "ZImagePixelSpace", "ChromaRadiance"} <= names


def test_families_of_flow_matching_are_known_by_their_classes():
    """Those with further inputs, such as a depth image, are refused like inpainting models."""
    import comfy.supported_models

    from personalize.nodes.host.models import family_of

    plain = {"in_channels": 16, "out_channels": 16}
    names = [family_of(model_of(getattr(comfy.supported_models, kind), **plain)).name for kind in FLOWS]
    assert names == [
        "Z-Image", "Lumina Image 2", "Qwen-Image", "Krea 2", "Flux.1", "Flux.1", "Flux.2", "SD 3", "Chroma"
    ]  # fmt: skip
    for kind in ("Flux", "SD3"):
        with pytest.raises(ValueError, match=f"^This model is {kind}, but only"):
            family_of(model_of(getattr(comfy.supported_models, kind), **plain | {"in_channels": 32}))


@pytest.mark.parametrize(("kind", "name"), [("SD15", "SD 1.x"), ("SD20", "SD 2.x"), ("SDXL", "SDXL")])
def test_inpainting_models_of_the_family_are_refused_by_their_channels(kind, name):
    import comfy.supported_models

    from personalize.nodes.host.models import family_of

    with pytest.raises(ValueError, match=f"^This model is {re.escape(name)} with 9 input channels, but only"):
        family_of(model_of(getattr(comfy.supported_models, kind), in_channels=9))


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """MODEL, CLIP, VAE of a random SD 1.x."""
    return random_sd.graph(tmp_path_factory.mktemp("random"))


def clip_of(kind):
    """A random CLIP: OpenCLIP as SD 2.x has it, SDXL's pair, or CLIP-L in another width."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base as base

    config = {**random_sd.CLIP, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, **options):
            super().__init__(device, dtype=dtype, textmodel_json_config=config, **options)

    class Wide(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, **options):
            name = "h" if kind == "SD 2.x" else "l"
            super().__init__(device, dtype, clip_name=name, clip_model=Encoder, **options)
            if kind == "SDXL":
                self.clip_g = Encoder(device, dtype)

    target = base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, Wide)
    return comfy.sd.CLIP(target, embedding_directory=None, tokenizer_data={}, parameters=0, state_dict=[])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "SD 2.x",
            r"^This CLIP \(clip_h\) does not belong to an SD 1\.x model: take MODEL and CLIP from the same loader",
        ),
        ("SDXL", r"^This CLIP \(clip_l, clip_g\) does not belong to an SD 1\.x model"),
        (
            "wide",
            f"^The CLIP's width is {WIDTH} but the MODEL expects {random_sd.WIDTH}: take both from the same loader",
        ),
    ],
)
def test_a_clip_of_another_family_is_refused(graph, kind, sentence):
    from personalize.nodes.apply import apply
    from personalize.nodes.host.models import check_fit

    clip = clip_of(kind)
    for refused in (lambda: check_fit(graph[0], clip, graph[2]), lambda: apply(graph[0], clip, None)):
        with pytest.raises(ValueError, match=sentence) as error:
            refused()
        assert not prompts.faults(str(error.value))


@pytest.fixture(scope="module")
def incomplete(server):
    """Checkpoints that lack a part, and a VAE of sixteen channels, where the server looks for them."""
    from comfy.taesd.taesd import TAESD

    from personalize.demo import build

    models, whole = server.base / "models", build.checkpoint()
    for name, prefix in (("no_clip", "cond_stage_model."), ("no_vae", "first_stage_model.")):
        kept = {key: value for key, value in whole.items() if not key.startswith(prefix)}
        save_file(kept, models / "checkpoints" / f"{name}.safetensors")
    (models / "vae").mkdir(exist_ok=True)
    state = {key: torch.zeros_like(value) for key, value in TAESD(latent_channels=16).state_dict().items()}
    save_file({**state, "vae_scale": torch.ones(()), "vae_shift": torch.zeros(())}, models / "vae" / "16.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"checkpoint.ckpt_name": "no_clip.safetensors"},
            "^The input clip received no CLIP: connect one, from a checkpoint that contains it",
        ),
        (
            {"checkpoint.ckpt_name": "no_vae.safetensors"},
            "^The input vae received no VAE: connect one, from a checkpoint that contains it",
        ),
        (
            {"vae": ("VAELoader", {"vae_name": "16.safetensors"}), "train.vae": ["vae", 0]},
            "^This VAE has 16 latent channels, the MODEL has 4: use the MODEL's own VAE",
        ),
    ],
)
def test_incomplete_models_are_refused_on_the_server(server, object_info, incomplete, changes, sentence):
    good = prompts.smallest(object_info, server.checkpoint)
    outcome = prompts.run(server.client, prompts.changed(good, changes))
    assert outcome.kind == "failed" and re.search(sentence, outcome.message), outcome
    assert not prompts.faults(outcome.message)
    assert prompts.run(server.client, good).kind == "success"


@pytest.mark.parametrize("sampling", ["lcm", "x0", "EDM", "eps with EDM's noise"])
def test_sampling_that_cannot_be_trained_is_refused(graph, sampling):
    """Patched by the host's own nodes; noise and v prediction pass."""
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete

    from personalize.nodes.host.models import prediction_of

    for fine, kind in (("eps", "epsilon"), ("v_prediction", "v_prediction")):
        assert prediction_of(ModelSamplingDiscrete().patch(graph[0], fine, False)[0]) == kind
    if "EDM" in sampling:
        kind = "edm" if sampling == "EDM" else "eps"
        model = ModelSamplingContinuousEDM().patch(graph[0], kind, 80.0, 0.002)[0]
    else:
        model = ModelSamplingDiscrete().patch(graph[0], sampling, False)[0]
    with pytest.raises(ValueError, match="^This model's sampling") as error:
        prediction_of(model)
    assert not prompts.faults(str(error.value))
