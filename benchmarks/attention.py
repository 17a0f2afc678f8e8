"""How alike is the attention to the new word and to its class word? For runs of the fidelity study, from their folders.

    python -m benchmarks.attention --checkpoint tiny.safetensors --out fidelity [--methods ... --instances 8]

For each individual: the mean and the variance of every cross-attention's probabilities (over heads and positions, as
AttnDreamBooth's regulariser takes them) for the placeholder less those for the class word, in absolute value, averaged
over layers, prompts and three noise levels of the reference image. In thousandths; mean and standard error.
"""

import argparse
import statistics
from pathlib import Path

import torch

from demo.build import HEADS, UNET
from trainers.formats.kohya import difference_key
from trainers.models.checkpoint import load_models
from trainers.models.diffusion import Models
from trainers.runs.folder import RunFolder
from trainers.runs.result import RunResult
from trainers.training import trainables
from trainers.training.cross_attention import record_cross_attention
from trainers.training.losses import positions

from .fidelity_rows import PLACEHOLDER, PROMPTS, pixels, reference, unseen

METHODS = ("attndreambooth-1", "attndreambooth-1+2", "attndreambooth", "attndreambooth-no_regularizer")
TIMESTEPS = (200, 500, 800)


def learned_models(checkpoint: Path, result: RunResult) -> Models:
    """The checkpoint with the run's word, and its full differences or its LoRA."""
    models = load_models(checkpoint, UNET, HEADS).to("cpu", torch.float32)
    encoder = models.text_encoders[0]
    encoder.known_tokens = {token: vectors[0] for token, vectors in result.tokens.items()}
    trainables.add_tokens(encoder, [(PLACEHOLDER, "dog")])
    with torch.no_grad():
        for name, parameter in models.unet.named_parameters():
            gained = difference(result.lora, name)
            if gained is not None:
                parameter += gained.float()
    return models


def difference(lora: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """What a parameter of the U-Net gained; `None` for nothing."""
    whole = difference_key(name)
    layer, _, kind = whole.rpartition(".")
    if kind == "diff" and f"{layer}.lora_up.weight" in lora:
        down, up, alpha = (lora[f"{layer}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        return up @ down * (alpha / len(down))
    return lora.get(whole)


@torch.no_grad()
def distances(models: Models, number: int) -> tuple[float, float]:
    """Of means and of variances, in thousandths."""
    class_word = unseen(number).subject
    tokenizer = models.text_encoders[0].tokenizer
    words = tuple(tokenizer.placeholders[PLACEHOLDER]), tuple(tokenizer.encode_words(class_word)[:1])
    prompts = [prompt.format(f"a {PLACEHOLDER} {class_word}") for prompt in PROMPTS]
    encoding = models.encode_prompts(prompts)
    v, c = positions(models.tokenize(prompts)[:, -1], *words)
    latents = models.encode_images(pixels(reference(number))[None])[0].expand(len(prompts), -1, -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    found = []
    with record_cross_attention(models.unet) as maps:
        for t in TIMESTEPS:
            timesteps = torch.full((len(prompts),), t)
            models.predict(models.add_noise(latents, noise, timesteps), timesteps, encoding)
            for layers in (maps.means.values(), maps.variances.values()):
                apart = [((s * v).sum(1) / v.sum(1) - (s * c).sum(1) / c.sum(1)).abs().mean() for s in layers]
                found.append(1000 * torch.stack(apart).mean().item())
    return statistics.mean(found[::2]), statistics.mean(found[1::2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--instances", type=int, default=8)
    args = parser.parse_args()
    print("| row | n | mean, apart | variance, apart |\n| --- | --- | --- | --- |")
    for method in args.methods:
        folders = {n: args.out / "cells" / method / f"{n:03d}" / "run" for n in range(args.instances)}
        results = {n: result for n, folder in folders.items() if (result := RunFolder(folder).result())}
        each = [distances(learned_models(args.checkpoint, result), n) for n, result in results.items()]
        cells = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x) / len(x) ** 0.5:.2f}" for x in zip(*each)]
        print(f"| {method} | {len(each)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
