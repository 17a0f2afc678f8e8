"""A run: what goes in, a folder that fills while it trains, what comes out. No host, no widgets."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import export, sampling
from .data import Concept
from .loop import SingleDevice, StepReport, train_stage
from .models import Models

RUN_FORMAT = 1  # raised only when the same inputs give other results; part of every digest


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Pictures drawn while training. They never change what is learned."""

    prompts: tuple[str, ...] = ()  # `{}` stands for the subject
    every: int = 50  # steps; 0 draws none
    images_per_prompt: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5

    def due(self, step: int, last: int) -> bool:
        return bool(self.prompts and self.every) and (step % self.every == 0 or step == last)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a result, except the models themselves."""

    concept: Concept
    recipe: object  # a dataclass of hyperparameters with `stages` and `subject`
    seed: int = 0
    dtype: torch.dtype = torch.float32
    micro_batch_size: int = 0

    def settings(self) -> dict:
        """All but the pictures, as JSON knows it."""
        words = {f.name: getattr(self.concept, f.name) for f in dataclasses.fields(Concept)}
        settings = {
            "run_format": RUN_FORMAT,
            "method": type(self.recipe).__name__,
            "recipe": dataclasses.asdict(self.recipe),
            "concept": {name: value for name, value in words.items() if name not in ("images", "masks")},
            "seed": self.seed,
            "precision": str(self.dtype).removeprefix("torch."),
            "micro_batch_size": self.micro_batch_size,
        }
        return json.loads(json.dumps(settings))

    def digest(self, models: Models) -> str:
        """16 hexadecimal digits that name the run's folder: same digest, same result."""
        sha = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        sha.update(f"{models.family.name} {models.prediction_type} {models.device.type}".encode())
        tensors = [*self.concept.images, *(self.concept.masks or ()), models.alphas_cumprod]
        for module in (models.unet, *models.text_encoders):
            tensors += [_sampled(p) for p in module.parameters()]
        for encoder in models.text_encoders:  # what was learned earlier in the graph
            sha.update(" ".join(encoder.known_tokens).encode())
            tensors += [*encoder.known_tokens.values()]
            tensors += [] if encoder.fixed_outputs is None else [encoder.fixed_outputs]
        for tensor in tensors:
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]


def _sampled(weight: Tensor, most: int = 256) -> Tensor:
    """An even sample of a weight: enough to tell two models apart, quick for billions of parameters."""
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // most)]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run learned, on the CPU, and how it went."""

    folder: Path
    settings: dict
    lora: dict[str, Tensor]  # kohya's names
    tokens: dict[str, tuple[Tensor, ...]]  # placeholder -> vectors [n, d] per text encoder
    fixed_outputs: tuple[Tensor, ...]  # [layers + 1, 77, d] per text encoder; empty where nothing is fixed
    history: list[dict]  # one entry per step, as in steps.jsonl
    stop_reason: str
    seconds: float

    @property
    def placeholder_token(self) -> str:
        return self.settings["concept"]["placeholder_token"]


def train(
    run: Run,
    models: Models,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    preview: Preview | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_preview: Callable[[int, Image.Image], None] = lambda step, picture: None,
) -> RunResult:
    """Train `run` and write its folder; an exception from a callback ends it and leaves what was written so far."""
    preview = preview or Preview()
    start_folder(run, folder)
    models.to(device, run.dtype)
    generator = torch.Generator().manual_seed(run.seed)
    subject = run.recipe.subject(run.concept)
    history = []

    def show(step: int, last: int) -> None:
        if preview.due(step, last):
            picture = draw_previews(models, run, preview, subject)
            picture.save(folder / "previews" / f"step_{step:04d}.png")
            on_preview(step, picture)

    with (folder / "steps.jsonl").open("w", encoding="utf-8") as log:
        for stage in run.recipe.stages(models, run.concept, generator):

            def after(report: StepReport) -> None:
                history.append({**dataclasses.asdict(report), "step": len(history) + 1, "stage_step": report.step})
                log.write(json.dumps(history[-1]) + "\n")
                log.flush()
                show(len(history), -1)
                on_step(report)

            if not history:
                show(0, -1)
            train_stage(
                stage,
                models,
                SingleDevice(device=torch.device(device), dtype=run.dtype),
                generator,
                micro_batch_size=run.micro_batch_size,
                on_step=after,
            )
    if history and not preview.due(len(history), -1):
        show(len(history), len(history))
    result = RunResult(
        folder=folder,
        settings=run.settings(),
        lora=export.text_encoder_lora(models),
        tokens=export.token_vectors(models),
        fixed_outputs=tuple(e.fixed_outputs.cpu() for e in models.text_encoders if e.fixed_outputs is not None),
        history=history,
        stop_reason=f"all {len(history)} steps done",
        seconds=history[-1]["seconds"] if history else 0.0,
    )
    finish_folder(result)
    return result


def draw_previews(models: Models, run: Run, preview: Preview, subject: str) -> Image.Image:
    """One row per prompt, one column per seed."""
    prompts = [p.replace("{}", subject) for p in preview.prompts for _ in range(preview.images_per_prompt)]
    seeds = [preview.seed + i for _ in preview.prompts for i in range(preview.images_per_prompt)]
    resolution = run.concept.at_resolution(models.family.resolution)
    with SingleDevice(device=models.device, dtype=run.dtype).autocast():
        pictures = sampling.sample(
            models, prompts, seeds, resolution=resolution, steps=preview.steps, guidance=preview.guidance
        )
    return to_pil(rearrange(pictures, "(r c) d h w -> d (r h) (c w)", r=len(preview.prompts)))


def to_pil(pixels: Tensor) -> Image.Image:
    """`[3, h, w]` in 0..1 to a picture."""
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def start_folder(run: Run, folder: Path) -> None:
    """run.json, the pictures learned from, and room for previews."""
    for name in ("images", "previews"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(run.concept.images):
        to_pil(image).save(folder / "images" / f"{i:02d}.png")
    _write_json(folder / "run.json", {**run.settings(), "complete": False})


def finish_folder(result: RunResult) -> None:
    """The learned weights, and run.json last: only a run that says so is complete."""
    metadata = {"personalize": json.dumps(result.settings)}
    save_file(result.lora, result.folder / "lora.safetensors", metadata=metadata)
    carried = export.carried(result.tokens, result.fixed_outputs)
    save_file(carried, result.folder / "clip.safetensors", metadata=metadata)
    done = {"complete": True, "stop_reason": result.stop_reason, "seconds": result.seconds}
    _write_json(result.folder / "run.json", {**result.settings, **done})


def load(folder: Path) -> RunResult | None:
    """The result in a run's folder, or `None` if it holds no complete one."""
    try:
        stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not stored.pop("complete", False):
        return None
    tokens, fixed_outputs = export.read_carried(load_file(folder / "clip.safetensors"))
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return RunResult(
        folder=folder,
        stop_reason=stored.pop("stop_reason"),
        seconds=stored.pop("seconds"),
        settings=stored,
        lora=load_file(folder / "lora.safetensors"),
        tokens=tokens,
        fixed_outputs=fixed_outputs,
        history=[json.loads(line) for line in lines],
    )


def _write_json(path: Path, data: dict) -> None:
    """Written beside and renamed, so that a reader never sees half a file."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(data, indent=2), encoding="utf-8")
    beside.replace(path)
