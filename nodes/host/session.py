"""Wraps the host's memory management, messages and interrupts, and shares the metric models of this process."""

import contextlib
import gc
import html
import importlib
import traceback
from collections.abc import Callable, Iterator

import torch
from comfy_api.latest import ui
from server import PromptServer

from ...trainers import device as rule
from ...trainers.metrics.extractor_cache import ExtractorCache
from . import internals
from .folders import weight_folders

# Metric models stay in memory during a training, so that its initializer, monitors and scores share them.
extractors = ExtractorCache(folders=weight_folders)


def notices(node_id: str) -> Callable[[str], None]:
    """Return a function that shows a sentence on a node, and does nothing without an editor.

    The editor reads it as HTML, in which `<concept>` would be an element without a look.
    """
    server = getattr(PromptServer, "instance", None)
    return lambda sentence: server.send_progress_text(html.escape(sentence, quote=False), node_id) if server else None


def preview(images: torch.Tensor, cls) -> dict:
    """Return images `[n, h, w, 3]` as a node shows them, with the client's prompt and workflow in the files.

    What a client sends as such need not be text, nor have names: then the files do without.
    """
    try:
        return ui.PreviewImage(images, cls=cls).as_dict()
    except (AttributeError, LookupError, TypeError, ValueError):
        return ui.PreviewImage(images).as_dict()


def check_interrupted() -> None:
    """Raise the host's interrupt exception if the user pressed cancel."""
    internals.throw_exception_if_processing_interrupted()


def training_device() -> torch.device:
    """Return the host's compute device."""
    return internals.get_torch_device()


def free_memory(device: torch.device) -> int:
    """Return the bytes that the host reports as free on `device`."""
    return internals.get_free_memory(device)


@torch.inference_mode()  # the graph's: a parameter that was made in it breaks when it is moved outside of it
def unload_all() -> None:
    """Unload the graph's models from the device."""
    internals.unload_all_models()
    internals.soft_empty_cache()


@contextlib.contextmanager
def operations_with_gradients() -> Iterator[None]:
    """Let the host's modules use no operation without a gradient, while the block lasts."""
    management = importlib.import_module("comfy.model_management")
    before = getattr(management, "in_training", False)  # which older hosts do not have
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


@contextlib.contextmanager
def memory_returned() -> Iterator[None]:
    """Free the garbage of before, and at the end what the block leaves behind, metric models among it.

    In between what is in use is set aside: a collection that passes over all that the host holds takes half a second.
    """
    gc.collect()
    first = not gc.get_freeze_count()  # what an outer block, or others, set aside is theirs to bring back
    if first:
        gc.freeze()
    try:
        yield
    finally:
        extractors.clear()
        gc.collect()
        if first:
            gc.unfreeze()
        internals.soft_empty_cache()


@contextlib.contextmanager
def training_session() -> Iterator[torch.device]:
    """Enable gradients, unload the graph's models, and restore everything afterwards.

    Keep trained tensors inside a function called from this block, so that their memory is free when the block ends.
    """
    device = training_device()
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with memory_returned():  # copies of an earlier training were made outside of inference mode and break within it
        unload_all()
        with torch.inference_mode(False), torch.enable_grad(), operations_with_gradients(), rng:
            try:
                yield device
            except BaseException as error:
                # The frames of a failed training hold its tensors; the host keeps the exception for a while.
                traceback.clear_frames(error.__traceback__)
                raise


def training_dtype(name: str) -> torch.dtype:
    """Return the precision to train in; for "auto" by the host's rules for its device.

    Raises:
        ValueError: the device cannot train.
    """
    return rule.training_dtype(name, training_device(), internals.should_use_bf16, internals.should_use_fp16)
