"""Train: turns MODEL, CLIP, VAE, CONCEPT and RECIPE into a MODEL and a CLIP that have learned the concept."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..trainers.evaluation.scorer import described
from ..trainers.runs import pick
from ..trainers.runs.callbacks import Callbacks
from ..trainers.runs.folder import RunFolder
from ..trainers.runs.preview import Preview
from ..trainers.runs.result import RunResult
from ..trainers.runs.run import Run, check_family, check_lengths, extractor_configs, start_of
from ..trainers.runs.train import train
from ..trainers.training.memory import MemoryPlan
from ..trainers.training.trainables import check_words
from .apply import FULL_PRECISION, apply, fits
from .host import clip_attachment, internals, live, prompt_texts, run_list, weights
from .host.folders import cache_folder, runs_folder
from .host.models import GraphModels, resolution_of
from .host.session import check_interrupted, extractors, free_memory, notices, training_dtype, training_session
from .host.unsupported import warning
from .schema import checked
from .sockets import CATEGORY, ConceptSocket, RecipeSocket, StopperSocket, learned_outputs, result_output

PREVIEW_PROMPTS = "a photo of {}\na painting of {}"


class Train(io.ComfyNode):
    """Runs one training; its folder below output/personalize/runs keeps all of its files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTrain",
            display_name="Train",
            category=CATEGORY,
            description="Trains the model on your subject and returns a model and a text encoder that have learned it.",
            search_aliases=[
                "train", "fine-tune", "finetune", "personalize", "dreambooth", "lora", "textboost", "lora training",
                "learn", "subject", "my dog",
            ],  # fmt: skip
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                ConceptSocket.Input("concept"),
                RecipeSocket.Input("recipe"),
                seed_input(),
                io.String.Input(
                    "preview_prompts", default=PREVIEW_PROMPTS, multiline=True, advanced=True,
                    tooltip="Prompts of the preview images, one per line; {} is your subject. Other than in the graph, "
                    "parentheses and weights are read as text, and only the first 75 tokens.",
                ),
                io.Int.Input(
                    "preview_every", default=50, min=0, max=100_000, advanced=True,
                    tooltip="Training steps between previews; 0 = no previews.",
                ),
                io.Int.Input(
                    "previews_per_prompt", default=1, min=1, max=16, advanced=True,
                    tooltip="Number of preview images per prompt.",
                ),
                io.Int.Input(
                    "preview_steps", default=20, min=1, max=200, advanced=True,
                    tooltip="Sampler steps of the preview images.",
                ),
                io.Float.Input(
                    "preview_cfg", default=7.5, min=1.0, max=30.0, step=0.5, advanced=True,
                    tooltip="Guidance scale (CFG) of the preview images.",
                ),
                *memory_inputs(),
                io.Boolean.Input(
                    "full_precision", default=False, advanced=True, optional=True, tooltip=FULL_PRECISION,
                ),
                StopperSocket.Input(
                    "stopper", optional=True, tooltip="Monitors that can end the training, or a stage of it, early."
                ),
            ],
            outputs=[
                *learned_outputs(),
                result_output(),
                io.Image.Output(
                    display_name="previews", tooltip="Images generated during training, in the order of their steps.",
                ),
                io.String.Output(
                    display_name="subject", tooltip="Your subject as prompts name it, in the way it was learned.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> int:
        """Return another number once a run of this node is to train on."""
        return live.REOPENED[str(cls.hidden.unique_id)]

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, concept, recipe, seed, preview_prompts, preview_every, previews_per_prompt,
        preview_steps, preview_cfg, precision, micro_batch_size, checkpoint_every=50, full_precision=False,
        stopper=(),
    ) -> io.NodeOutput:  # fmt: skip
        preview = Preview(
            prompts=tuple(line.strip() for line in preview_prompts.splitlines() if line.strip()),
            every=preview_every,
            images_per_prompt=previews_per_prompt,
            steps=preview_steps,
            guidance=preview_cfg,
        )
        dtype = training_dtype(precision)
        run = Run(concept=concept, recipe=recipe, seed=seed, dtype=dtype, stopper=stopper)
        options = {
            "preview": preview,
            "memory_plan": MemoryPlan(micro_batch_size=micro_batch_size),
            "checkpoint_every": checkpoint_every,
        }
        notify, warnings = notices(cls.hidden.unique_id), []

        def warn(sentence: str) -> None:
            logging.warning(sentence)
            warnings.append(sentence)
            live.warn(cls.hidden, warnings)
            notify(sentence)

        subject, size = recipe.subject(concept), concept.sizes(resolution_of(model))[0]
        texts, sizes = prompt_texts.advice(cls.hidden, concept, recipe), prompt_texts.size_advice(cls.hidden, size)
        for sentence in filter(None, [warning(model, clip), *texts, *sizes]):
            warn(sentence)
        result = find_or_train(model, clip, vae, run, notify, hidden=cls.hidden, warn=warn, **options)
        run_list.note_checkpoint(result.folder.name, prompt_texts.checkpoint(cls.hidden))
        result = pick.chosen(result, stopper)
        end = f"run {result.folder.name}: {result.stop_reason}, {result.seconds / 60:.1f} minutes of training"
        end += f". In prompts write {subject}"  # some presets learn it with the class word
        notify(". ".join([end, *warnings]))
        trained_model, trained_clip = apply(model, clip, result, in_full_precision=full_precision)
        images = previews(result)
        # The live view shows the previews.
        shown = {"personalize_run": [result.folder.name]}
        return io.NodeOutput(trained_model, trained_clip, result, images, subject, ui=shown)


def seed_input() -> io.Input:
    """Return the widget of the training's seed."""
    return io.Int.Input(
        "seed", default=0, min=0, max=2**63 - 1, control_after_generate=io.ControlAfterGenerate.fixed, advanced=True,
        tooltip="Seed of the training: another seed trains again, so leave it fixed.",
    )  # fmt: skip


def memory_inputs() -> list[io.Input]:
    """Return the widgets of precision, memory and checkpoints."""
    return [
        io.Combo.Input(
            "precision", options=["auto", "bfloat16", "float16", "float32"], advanced=True,
            tooltip="Training precision; auto is bfloat16 if the device supports it, else float16 or float32.",
        ),
        io.Int.Input(
            "micro_batch_size", default=0, min=0, max=512, advanced=True,
            tooltip="Images per forward pass: fewer take less memory, with equal results; 0 = as many as fit.",
        ),
        io.Int.Input(
            "checkpoint_every", default=50, min=0, max=100_000, advanced=True, optional=True,
            tooltip="Steps between checkpoints, at most lost if ComfyUI is killed; 0 = only when cancelled.",
        ),
    ]  # fmt: skip


def find_or_train(
    model, clip, vae, run: Run, notify, *, preview: Preview | None = None, warn=logging.warning, **options
) -> RunResult:
    """Return the finished run with these inputs if there is one, else train, resuming an interrupted run."""
    preview = preview or Preview()
    graph = GraphModels.of(model, clip, vae)
    for sentence in check(graph, clip, run, preview.used_prompts):
        warn(sentence)
    fingerprint = start_of(run.recipe, run.stopper, weights.fingerprint(graph), extractors)
    folder = runs_folder() / run.digest(fingerprint)
    RunFolder(folder).check_path()
    finished = RunFolder(folder).result()
    if finished and fits(model, clip, finished):  # a damaged one is trained again
        return finished
    with training_session() as device:
        # A separate function: when it returns, only the result remains in memory.
        options |= {"preview": preview, "warn": warn}
        return _train(graph, run, device, folder, notify, model_fingerprint=fingerprint, **options)


def check(graph: GraphModels, clip, run: Run, previews: Iterable[str] = ()) -> list[str]:
    """Return sentences about prompts that are too long, before anything is loaded.

    Args:
        previews: the preview's prompts, with `{}` for the subject.

    Raises:
        ValueError: the recipe cannot learn this concept with these models.
    """
    concept, known = run.concept, clip_attachment.of(clip).tokens
    check_family(run.recipe, graph.family)
    run.recipe.check(concept, known=known)
    tokenizers = [weights.tokenizer_of(clip, name) for name in graph.family.text_encoders]
    for tokenizer in tokenizers:
        for one in concept.members:
            check_words(tokenizer, one.placeholder_token, one.initializer, one.class_word)
    vectors = max(map(len, known.get(concept.placeholder_token, {}).values()), default=0)
    return check_lengths(run, previews, tokenizers, vectors)


def _train(
    graph: GraphModels, run: Run, device, folder, notify, *, model_fingerprint: str, hidden, warn, **options,
) -> RunResult:  # fmt: skip
    load_extractors(run, notify)
    models = weights.read_models(graph, run.dtype, notify)
    progress = internals.ProgressBar(run.recipe.steps)

    def on_step(report) -> None:
        progress.update_absolute(report.stage_step, report.steps)
        view.add(report.entry())
        notify(view.words())
        check_interrupted()

    def on_preview(step: int, image: Image.Image) -> None:
        progress.update_absolute(progress.current, None, ("JPEG", image, 768))  # `step` counts all stages
        check_interrupted()

    def on_notice(sentence: str) -> None:
        notify(sentence)
        check_interrupted()

    with live.Live(folder, run.recipe.steps, hidden) as view:
        callbacks = Callbacks(
            on_step=on_step,
            on_preview=on_preview,
            on_notice=on_notice,
            on_warning=warn,
            finish=view.finish,
        )
        options |= {
            "model": model_fingerprint,
            "device": weights.device_of(graph, device, run.dtype),
            "callbacks": callbacks,
            "cache": cache_folder(),
            "extractors": extractors,
        }
        return train(run, models, folder, free_memory=lambda: free_memory(device), **options)


def load_extractors(run: Run, notify) -> None:
    """Load the metric models of the recipe and the monitors, before anything that takes long.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    for config in extractor_configs(run.recipe, run.stopper):
        notify(f"loading {described(config)}")
        extractors.load(config)


def previews(result: RunResult) -> torch.Tensor:
    """Return the previews of a run as one IMAGE, in the order of their steps; a reference image if there are none."""
    files = sorted((result.folder / "previews").glob("step_*.png")) or [result.folder / "images" / "00.png"]
    images = [image for file in files if (image := _read(file)) is not None] or [torch.zeros(64, 64, 3)]
    return torch.stack([image for image in images if image.shape == images[-1].shape])


def _read(file: Path) -> torch.Tensor | None:
    """Return `[h, w, 3]`, or `None` for a deleted or damaged file: a preview must not fail a training."""
    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    except (OSError, ValueError, SyntaxError):
        return None
