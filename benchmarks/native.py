"""The host's own trainer beside this pack's LoRA: the same transformer, image, prompt, rank, rate and number of steps.

    python demo/build.py transformer.safetensors --transformer
    python -m benchmarks.with_host COMFYUI native --checkpoint transformer.safetensors [--steps 60 --rate 1e-3]

Both learn one individual of the demo's world, three times. They are compared on one fixed batch, the learned image at
six noise levels with noise of its own, by this pack's loss, the mean of (v - (e - x))^2, and by the host's, the mean of
(x0' - x0)^2, which is the former times the noise level's square. Then, on random tiny transformers, gradients under
gradient checkpointing: their cosine to those without, 1 where they are right, and how well finite differences agree.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from trainers.data.concept import Concept
from trainers.models import gradient_check
from trainers.recipes.lora import LoRA
from trainers.runs import train
from trainers.runs.run import Run
from trainers.training import trainables

from . import host_trainer, with_host
from .fidelity_rows import pixels, reference, unseen

INDIVIDUAL, TOKEN = 0, "sks"
CLASS_WORD = unseen(INDIVIDUAL).subject
PROMPT = f"a photo of {TOKEN} {CLASS_WORD}"
LEVELS, RANK, SEEDS = 6, 8, (0, 1, 2)


def losses(graph, picture: torch.Tensor) -> tuple[float, float]:
    """This pack's loss and the host's on the fixed batch."""
    models = with_host.flow_models(graph)
    latents = models.network.latents(picture[None]).expand(LEVELS, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(99))
    timesteps = ((torch.arange(LEVELS) + 0.5) / LEVELS * len(models.sigmas)).long()
    with torch.no_grad():
        noisy = models.add_noise(latents, noise, timesteps)
        error = models.predict(noisy, timesteps, models.encode_prompts([PROMPT] * LEVELS)) - (noise - latents)
    each = error.square().mean(dim=(1, 2, 3))
    return each.mean().item(), (each * models.sigmas[timesteps].square()).mean().item()


def ours(graph, picture: torch.Tensor, options, seed: int):
    """MODEL, CLIP and VAE after this pack's LoRA."""
    given = {"resolution": picture.shape[-1], "placeholder_token": TOKEN, "captions": ("a photo of {}",)}
    concept = Concept(images=(picture,), class_word=CLASS_WORD, **given)
    recipe = LoRA(steps=options.steps, learning_rate=options.rate, lora_rank=RANK, flip_p=0.0, views=1)
    with tempfile.TemporaryDirectory() as folder:
        result = train.train(Run(concept=concept, recipe=recipe, seed=seed), with_host.flow_models(graph), Path(folder))
    model, clip = with_host.of_pack("nodes.apply").apply(*graph[:2], result)
    return model, clip, graph[2]


def hosts(graph, picture: torch.Tensor, options, seed: int):
    """MODEL, CLIP and VAE after the host's trainer."""
    given = {"steps": options.steps, "learning_rate": options.rate, "rank": RANK, "seed": seed}
    return host_trainer.train(graph, picture, PROMPT, batch_size=1, **given)


def compared(family: str, checkpointed) -> str:
    """A LoRA's gradient under a gradient checkpointing, on a tiny random transformer.

    Its cosine to the one without, and how far the slope that finite differences measure along it is from its square.

    Args:
        checkpointed: turns it on, given the models.
    """
    random_native, found = with_host.of_pack("tests.support.random_native"), []
    with tempfile.TemporaryDirectory() as folder:
        models = random_native.models(Path(folder), family)
    lora = trainables.add_lora(models.unet, trainables.layers(models), 4, 4, torch.Generator().manual_seed(0))
    lora = gradient_check.reached(models, lora, PROMPT)  # from here on without operations in place, where they do harm
    gradient_check.move(lora, torch.Generator().manual_seed(0))
    loss = gradient_check.Loss(models, PROMPT, torch.Generator().manual_seed(0))
    for turn_on in (lambda models: None, checkpointed):
        turn_on(models)
        gradients = torch.autograd.grad(value := loss(), lora)
        found.append(torch.cat([part.flatten() for part in gradients]).double())
    square = found[-1].square().sum().item()
    error = abs(gradient_check.slope(loss, value.item(), lora, gradients) / square - 1)
    return f"{torch.nn.functional.cosine_similarity(*found, dim=0).item():.4f} | {error:.1e}"


def by_host(models) -> None:
    """Gradient checkpointing as Train LoRA turns it on."""
    from comfy_extras.nodes_train import find_modules_at_depth, patch

    models.in_place = False
    for module in find_modules_at_depth(models.unet, depth=1):
        patch(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    compare_trainings(with_host.load_graph(options.checkpoint), options)
    compare_gradients()


def compare_trainings(graph, options) -> None:
    """Print the losses before and after trainings by both, over some seeds."""
    picture = pixels(reference(INDIVIDUAL))
    rows = {"untrained": [graph]}
    for name, learned in (("this pack's LoRA", ours), ("the host's Train LoRA", hosts)):
        rows[name] = [learned(graph, picture, options, seed) for seed in SEEDS]
    print("| | this pack's loss | the host's loss |\n| --- | --- | --- |")
    for name, graphs in rows.items():
        both = zip(*(losses(each, picture) for each in graphs), strict=True)
        print(f"| {name} | {' | '.join(spread(values) for values in both)} |")


def compare_gradients() -> None:
    """Print how right gradients are in both ways of gradient checkpointing."""
    random_native = with_host.of_pack("tests.support.random_native")
    random_native.register()
    print("\n| family | this pack's: cosine | finite differences | the host's: cosine | finite differences |")
    print("|" + " --- |" * 5)
    for family in random_native.LAYOUTS:
        found = compared(family, lambda models: models.save_memory(True)), compared(family, by_host)
        print(f"| {family} | {' | '.join(found)} |", flush=True)


def spread(values) -> str:
    """The mean of some seeds, and their smallest and largest value."""
    values = [*values]
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()
