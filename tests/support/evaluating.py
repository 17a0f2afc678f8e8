"""The demo world's metric models as a user's files, and a graph whose CLIP knows a word. No test in here."""

import json
import shutil

import torch

from personalize.demo import evaluators
from personalize.tests.support import world_clip

ENCODER = "instance.safetensors"
WORLD = {
    "clip_model": world_clip.CHOICE.clip_model,
    "clip_weights": world_clip.FILE,
    "dino_model": evaluators.ENCODER_NAME,
    "dino_weights": ENCODER,
}


def connected(inputs):
    """A node's inputs, of which those that Metric Models has become what that node returns."""
    from personalize.nodes.evaluation.metric_models import SETTINGS, MetricModels

    own = {name: value for name, value in inputs.items() if name not in SETTINGS}
    (metric_models,) = MetricModels.execute(**{name: inputs[name] for name in inputs.keys() - own.keys()}).result
    return own | {"metric_models": metric_models}


def write(folder):
    """Both metric models' files in a folder, and `Backbones` that look there."""
    shelf = world_clip.write(folder)
    shutil.copy(evaluators.WEIGHTS / "evaluator_instance.safetensors", folder / ENCODER)
    return shelf


def write_for_server(folder):
    """The same for a ComfyUI in another process, which knows no architecture of the world's CLIP but its folder's."""
    evaluators.register()
    (folder / "world").mkdir(parents=True, exist_ok=True)  # other tests may have asked for the same server
    evaluators.expand_clip(evaluators.WEIGHTS / "evaluator_clip.safetensors", folder / "world" / world_clip.FILE)
    config = {"model_cfg": json.loads(evaluators.CLIP_CONFIG.read_text()), "preprocess_cfg": {}}
    (folder / "world" / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(evaluators.WEIGHTS / "evaluator_instance.safetensors", folder / ENCODER)
    return WORLD | {"clip_weights": "world", "diversity": "DINO encoder"}


def teach(clip, word):
    """A clone of the host's CLIP that knows `word`, by a random vector."""
    from personalize.nodes.host import clip_attachment
    from personalize.nodes.host.models import encoder_names

    vectors = {}
    for name in encoder_names(clip):
        width = getattr(clip.cond_stage_model, name).transformer.get_input_embeddings().weight.shape[1]
        vectors[name] = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    return clip_attachment.attach(clip, clip_attachment.ClipAttachment(tokens={word: vectors}))
