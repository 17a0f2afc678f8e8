"""Time and memory of one TextBoost step at Stable Diffusion 1.5's real shape, with random weights.

    python -m benchmarks.step [--size 512 --batch 8 --precision bfloat16] [--steps 5] [--json FILE]

Prints the parts of a step in milliseconds (median over the steps after the first) and the peak memory. On a CPU the
default is one image of 256 px, and the output says so; 512 px and batches of 8 are for a GPU. Nothing is extrapolated.
The autoencoder and the teacher, which TextBoost keeps out of the step, are timed beside it.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from trainers import loop
from trainers.checkpoint import SD1_UNET, scaled_linear
from trainers.data import Concept
from trainers.families import SD1
from trainers.memory import Effort, stage_bytes
from trainers.models import Models, TextEncoder, diffusers_unet_config
from trainers.recipes.textboost import BENCHMARK
from trainers.tokenizer import Tokenizer, bundled_words


class Clock:
    """Milliseconds by part, waiting for the device at both ends of each."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, defaultdict(list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1000

    @contextmanager
    def part(self, name: str):
        start = self.now()
        yield
        self.parts[name].append(self.now() - start)

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def batches(self, batches):
        while True:
            with self.part("batch"):
                batch = next(batches)
            yield batch


class TimedDevice(loop.SingleDevice):
    """The loop's own device, on the clock."""

    clock: Clock

    def backward(self, loss):
        with self.clock.part("backward"):
            super().backward(loss)

    def step(self, optimizer):
        with self.clock.part("optimizer"):
            super().step(optimizer)


def random_sd15(device: torch.device, dtype: torch.dtype) -> Models:
    """SD 1.5's U-Net, text encoder and autoencoder with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device(device):
        unet = UNet2DConditionModel(**diffusers_unet_config(SD1_UNET))
        text = CLIPTextModel(
            CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        )
        channels = (128, 256, 512, 512)
        blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4, **blocks)

    def encode(pixels):
        posterior = vae.encode(pixels.to(device=device, dtype=dtype) * 2 - 1).latent_dist
        return posterior.mean * SD1.latent_scale, posterior.std * SD1.latent_scale

    for module in (unet, text, vae):
        module.requires_grad_(False).eval()
    for module in (unet, vae):
        torch.nn.Module.to(module, dtype=dtype)
    return Models(
        family=SD1,
        text_encoders=(TextEncoder(text, Tokenizer(bundled_words())),),
        unet=unet,
        alphas_cumprod=scaled_linear(),
        prediction_type="epsilon",
        encode_images=encode,
        decode_latents=lambda latents: vae.decode(latents.to(dtype)).sample,
    )


def measure(args, device: torch.device, dtype: torch.dtype) -> Clock:
    models = random_sd15(device, dtype)
    recipe = replace(BENCHMARK, steps=args.steps + 1, batch_size=args.batch, views=2 * args.batch)
    concept = Concept(images=(torch.rand(3, args.size, args.size),), resolution=args.size)
    clock, generator = Clock(device), torch.Generator().manual_seed(0)
    models.encode_images = clock.timed("autoencoder, per batch (ahead)", models.encode_images)
    stage = next(recipe.stages(models, concept, generator))
    effort = Effort(micro_batch_size=args.split, gradient_checkpointing=args.checkpointing)
    models.save_memory(args.checkpointing)
    size = {"batch_size": args.batch, "resolution": args.size, "trained": sum(p.numel() for p in stage.parameters())}
    clock.estimate = stage_bytes(models, effort, **size) / 2**30
    ids = models.tokenize(["a photo of a dog"] * args.batch).to(device)
    for _ in range(2):
        with torch.no_grad(), clock.part("teacher, per batch (ahead)"):
            models.encode_ids(ids)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stage.batches = clock.batches(stage.batches)
    models.encode_ids = clock.timed("text encoder forward", models.encode_ids)
    models.predict = clock.timed("U-Net forward", models.predict)
    timed = TimedDevice(device=device, dtype=dtype)
    timed.clock = clock
    ends = [clock.now()]

    def on_step(report, capture) -> None:
        ends.append(clock.now())

    loop.train_stage(stage, models, timed, generator, micro_batch_size=args.split, on_step=on_step)
    clock.parts["whole step"] = [b - a for a, b in zip(ends, ends[1:])]
    return clock


def peak_memory(device: torch.device) -> float:
    """GiB: what the GPU's allocator held at most, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", type=int, default=512 if cuda else 256)
    parser.add_argument("--batch", type=int, default=8 if cuda else 1)
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--split", type=int, default=0, help="pictures at once; 0 = the whole batch")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    where = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()} CPU"
    clock = measure(args, device, getattr(torch, args.precision))
    medians = {name: statistics.median(times[1:] or times) for name, times in clock.parts.items()}
    threads = "" if cuda else f", {torch.get_num_threads()} thread(s)"
    print(f"TextBoost, SD 1.5 shape, {args.batch} x {args.size} px, {args.precision}, {where}{threads}")
    for name, milliseconds in medians.items():
        print(f"  {name:32} {milliseconds:10.1f} ms")
    print(f"  {'estimate, beside the models':32} {clock.estimate:10.2f} GiB")
    memory = peak_memory(device)
    print(f"  {'peak memory' if cuda else 'peak memory (whole process)':32} {memory:10.2f} GiB")
    if args.json:
        args.json.write_text(
            json.dumps({**vars(args), "json": None, "where": where, "ms": medians, "GiB": memory}, indent=2)
        )


if __name__ == "__main__":
    main()
