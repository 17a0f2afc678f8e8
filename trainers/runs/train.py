"""Train a run in its folder, and say in one sentence why that is not possible; the work is trainer.py's."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..data.context import Context
from ..device import TOO_LARGE, SingleDevice, is_out_of_memory
from ..metrics.extractor_cache import ExtractorCache
from ..models.diffusion import Models
from ..models.fingerprint import fingerprint
from ..text import reason, remedy
from ..training.memory import MemoryBudget, MemoryPlan
from .callbacks import Callbacks
from .folder import RunFolder
from .preview import Preview
from .result import RunResult
from .run import Run
from .trainer import Trainer


def train(
    run: Run,
    models: Models,
    folder: Path | RunFolder,
    *,
    model: str = "",
    device: torch.device | str | SingleDevice = "cpu",
    memory_plan: MemoryPlan | None = None,
    free_memory: Callable[[], int] | None = None,
    preview: Preview | None = None,
    checkpoint_every: int = 50,
    callbacks: Callbacks | None = None,
    cache: Path | None = None,
    extractors: ExtractorCache | None = None,
) -> RunResult:
    """Train `run` in its folder, or go on where an earlier process stopped, and return what was learned.

    An exception, the host's interrupt among them, ends it; the folder then holds a checkpoint and what was learned so
    far. A loss that is no longer a number ends it too, with the last state whose loss still was one as the result.

    Args:
        model: fingerprint of `models`; computed if empty.
        device: or several that share the work.
        memory_plan: the least to do to fit into memory; more is done where an estimate or an error asks for it.
        free_memory: bytes that the device has free; without it nothing is estimated.
        checkpoint_every: steps between checkpoints; 0 writes none but at the end.
        cache: a folder for what other runs, too, would have to compute again; none keeps nothing.
        extractors: where the feature extractors that the recipe and the monitors name are loaded.

    Raises:
        RuntimeError: another process trains in this folder, or it cannot be written.
        MemoryError: the stage does not fit, whatever is done.
        Diverged: the loss stopped being a number before the first checkpoint.
    """
    if not isinstance(device, SingleDevice):
        device = SingleDevice(device=torch.device(device), dtype=run.dtype)
    callbacks = callbacks or Callbacks()
    # Memory goes with the area, and none is larger than the square's.
    resolution = run.concept.at_resolution(models.resolution)
    training = Trainer(
        run=run,
        models=models,
        folder=folder if isinstance(folder, RunFolder) else RunFolder(folder),
        model=model or fingerprint(models),
        device=device,
        room=MemoryBudget(
            models=models, memory_plan=memory_plan or MemoryPlan(), free=free_memory, resolution=resolution
        ),
        preview=preview or Preview(),
        checkpoint_every=checkpoint_every,
        callbacks=callbacks,
        context=Context(cache=cache, notice=callbacks.on_notice, extractors=extractors or ExtractorCache()),
    )
    try:
        with training.folder.lock():
            return training.go()
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"The run's folder {training.folder.path.name} cannot be written ({reason(error)}): "
            f"{remedy(error)} and queue again; the run goes on from its last checkpoint."
        ) from error
    except RuntimeError as error:
        if is_out_of_memory(error):  # outside of a step: moving or reading the models, drawing a preview
            raise MemoryError(TOO_LARGE) from None
        raise
