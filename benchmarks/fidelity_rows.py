"""The rows of the fidelity study as images: which individuals, which prompts, and how each row comes to its images.

Judging, storing and the command line are fidelity.py's.
"""

import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from demo import captions, world
from demo.build import HEADS, NETWORK, UNET
from trainers.data.concept import Concept
from trainers.models.checkpoint import load_models
from trainers.models.sampler import sample
from trainers.recipes import (
    attndreambooth,
    custom_diffusion,
    dreambooth_lora,
    lora,
    t_lora,
    textboost,
    textboost_2026,
    textual_inversion,
)
from trainers.runs.run import Run
from trainers.runs.train import train
from trainers.stopping import dvar

from . import host_trainer, with_host
from .fidelity_report import array

SIDE = world.TILES * world.TILE
PLACEHOLDER = "<thing>"
# What is asked for, and the same as a scene, in which the real individual is drawn for the ceiling.
# "{}" comes with its article.
PROMPTS = {
    "a photo of {} in the snow": world.Scene("in the snow"),
    "a photo of {} on the beach": world.Scene("on the beach"),
    "a painting of {} on grass": world.Scene("on grass", style="painting"),
    "a photo of {} at night": world.Scene("at night"),
    "a photo of {} on pink fabric, far away": world.Scene("on pink fabric", distance="far away"),
    "a sketch of {} in the desert": world.Scene("in the desert", style="sketch"),
    "a photo of {} on water": world.Scene("on water"),
    "a photo of {} on grass, on the left": world.Scene("on grass", side="on the left"),
}
# One technique of TextBoost off at a time.
VARIANTS = {
    "no_augmentation": {"augmentation_p": 0.0, "grayscale_p": 0.0},
    "no_knowledge": {"knowledge_weight": 0.0},
    "no_snr": {"snr_weighted": False},
    "no_norm_clamp": {"clamp_norms": False},
    "no_fixed_outputs": {"fixed_outputs": False},
    "no_inversion_tokens": {"augmentation_prompt": "words"},
    "fresh_views": {"views": 0},
    "unet_lora": {"unet_lora_rank": 8, "unet_lora_learning_rate": 1e-3},
}
UNTRAINED = ("untuned", "initializer", "oracle", "real")
PRESETS = textboost.PRESETS
FAST = attndreambooth.FAST
UNREGULARIZED = {f"{kind}_weight_{stage}": 0.0 for kind in ("mean", "variance") for stage in (1, 2, 3)}
LORA = replace(lora.FULL, steps=300, batch_size=4, learning_rate=3e-4)
T_LORA = replace(t_lora.TLoRA(), steps=300, batch_size=4, learning_rate=2e-3)
# What the 2026 revision was here before it followed its authors: TextBoost's augmentation, named in words.
HEAVY = {"augmentations": "all", "snr_weighted": True}
# Rows of other recipes; `--set` changes those fields that a row's recipe has.
OTHERS = {
    "2026": textboost_2026.REVISED,
    "2026++": textboost_2026.PLUS,
    "2026-heavy": replace(textboost_2026.REVISED, **HEAVY),
    "2026++-heavy": replace(textboost_2026.PLUS, **HEAVY),
    "attndreambooth": FAST,
    "attndreambooth-1": replace(FAST, run_stages="1"),
    "attndreambooth-1+2": replace(FAST, run_stages="1+2"),
    "attndreambooth-lora": replace(FAST, fine_tuning="lora"),
    "attndreambooth-no_regularizer": replace(FAST, **UNREGULARIZED),
    "attndreambooth-paper": attndreambooth.PAPER,
    "textual_inversion": replace(textual_inversion.FULL, steps=600),
    "dreambooth_lora": replace(dreambooth_lora.FULL, steps=300, learning_rate=1e-3),
    "lora": LORA,
    "host_lora": LORA,  # by ComfyUI's own trainer; it takes of the recipe what it has
    "t_lora": replace(T_LORA, lora_rank=64, min_rank=32),
    "t_lora-all_ranks": replace(T_LORA, lora_rank=64, min_rank=64),
    "custom_diffusion": replace(custom_diffusion.FULL, steps=300, learning_rate=1e-4, class_images=48),
}
# Rows that stop where a monitor says so: the row that is trained, and the monitor.
STOPPED = {"lora-dvar": ("lora", replace(dvar.SHORT, window=80))}
METHODS = (*UNTRAINED, "textboost", *(f"textboost-{name}" for name in VARIANTS), *OTHERS, *STOPPED)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What decides the images; stored beside each result, and a result of other settings is measured again."""

    checkpoint: Path
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    preset: str
    overrides: dict
    initializer: str
    training_seed: int
    sampler_steps: int
    guidance: float
    dtype: str

    def settings(self, method: str = "textboost") -> dict:
        """As plain data, the same after a round trip through JSON; the checkpoint by its content, not by where it
        lies, and of the overrides only those that the method's recipe has.
        """
        plain = {**asdict(self), "checkpoint": digest(self.checkpoint), "overrides": self.overrides_for(method)}
        return json.loads(json.dumps(plain))

    def overrides_for(self, method: str) -> dict:
        known = {field.name for field in fields(self.preset_of(method))}
        return {name: value for name, value in self.overrides.items() if name in known}

    def preset_of(self, method: str):
        return OTHERS.get(trained(method), PRESETS[self.preset])


def trained(method: str) -> str:
    """The row whose recipe a row has."""
    return STOPPED.get(method, (method, None))[0]


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def recipe(bench: Bench, method: str):
    """The method's preset with the overrides, and for "textboost-x" with variant x."""
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(METHODS)}")
    variant = VARIANTS.get(method.removeprefix("textboost-"), {})
    return replace(bench.preset_of(method), **bench.overrides_for(method) | variant)


def unseen(number: int) -> world.Instance:
    """Test individual `number`: the classes in turn, all else as its seed falls."""
    return world.instance(world.TEST_SEEDS[number], world.SUBJECTS[number % len(world.SUBJECTS)])


def reference(number: int) -> Image.Image:
    return world.picture(world.draw(unseen(number), world.reference_scene(), random.Random(f"reference {number}")))


def real(bench: Bench, number: int) -> list:
    """Other images of the individual in the very scenes of the prompts, one per prompt and seed."""
    scenes = [(PROMPTS[prompt], prompt, seed) for prompt in bench.prompts for seed in bench.seeds]
    thing = unseen(number)
    return [
        world.picture(world.draw(thing, scene, random.Random(f"real {number} {prompt} {s}")))
        for scene, prompt, s in scenes
    ]


def read_models(bench: Bench):
    """The checkpoint's models; those of a transformer work in ComfyUI (see with_host.py)."""
    with safe_open(bench.checkpoint, "pt") as file:
        transformer = NETWORK + "x_embedder.weight" in {*file.keys()}
    if transformer:
        return with_host.flow_models(with_host.load_graph(bench.checkpoint))
    return load_models(bench.checkpoint, UNET, HEADS)


def generate(bench: Bench, models, subject: str) -> list:
    """Pictures of the subject's words with their article, prompt by prompt, each with every seed.

    A seed starts from the same noise everywhere.
    """
    prompts = [prompt.format(subject) for prompt in bench.prompts for _ in bench.seeds]
    seeds = [seed for _ in bench.prompts for seed in bench.seeds]
    pixels = sample(
        models, prompts, seeds, size=(SIDE, SIDE), steps=bench.sampler_steps, guidance=bench.guidance, batch_size=24
    )
    arrays = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(array(image)).permute(2, 0, 1).float() / 255


def concept_of(bench: Bench, number: int) -> Concept:
    """The individual's one reference image and its words."""
    thing = unseen(number)
    return Concept(
        images=(pixels(reference(number)),),
        class_word=thing.subject,
        placeholder_token=PLACEHOLDER,
        initializer_token=bench.initializer.format(**asdict(thing)),
        resolution=SIDE,
    )


def personalised(bench: Bench, method: str, number: int, folder: Path, device: str) -> tuple[list, dict]:
    """Train on the one reference; its images, and what the training cost."""
    models, concept, chosen = read_models(bench), concept_of(bench, number), recipe(bench, method)
    stopper = (STOPPED[method][1],) if method in STOPPED else ()
    run = Run(
        concept=concept, recipe=chosen, stopper=stopper, seed=bench.training_seed, dtype=getattr(torch, bench.dtype)
    )
    result = train(run, models, folder, device=device, cache=folder.parents[3] / "cache")
    losses = [entry["loss"] for entry in result.history]
    facts = {
        "train_seconds": result.seconds,
        "steps": len(losses),
        "last_loss": sum(losses[-20:]) / max(1, len(losses[-20:])),
    }
    return generate(bench, models, captions.with_article(chosen.subject(concept))), facts


def personalised_by_host(bench: Bench, number: int) -> tuple[list, dict]:
    """Train with ComfyUI's own trainer on the one reference; as `personalised`."""
    concept, chosen = concept_of(bench, number), recipe(bench, "host_lora")
    subject = captions.with_article(chosen.subject(concept))
    settings = {name: getattr(chosen, name) for name in ("steps", "batch_size", "learning_rate")}
    settings |= {"rank": chosen.lora_rank, "seed": bench.training_seed}
    graph, start = with_host.load_graph(bench.checkpoint), time.perf_counter()
    trained = host_trainer.train(graph, concept.images[0], f"a photo of {subject}", **settings)
    facts = {"train_seconds": time.perf_counter() - start, "steps": chosen.steps}
    return generate(bench, with_host.flow_models(trained), subject), facts


def draw(bench: Bench, method: str, number: int, folder: Path, device: str) -> tuple[list, dict]:
    """The images of one row for one individual."""
    thing = unseen(number)
    if method == "real":
        return real(bench, number), {}
    if method in UNTRAINED:
        words = {"untuned": thing.subject, "initializer": bench.initializer.format(**asdict(thing))}
        subject = captions.with_article(words[method]) if method in words else captions.describe(thing)
        models = read_models(bench).to(device, getattr(torch, bench.dtype))
        return generate(bench, models, subject), {}
    if method == "host_lora":
        return personalised_by_host(bench, number)
    return personalised(bench, method, number, folder, device)
