"""What is done where memory runs out, in which order, and how it is told from other errors."""

import types

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.runs.test_resume import FAST, train
from personalize.trainers.data.class_images import class_images_of
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.device import is_out_of_memory
from personalize.trainers.models import sampler
from personalize.trainers.runs import train as training
from personalize.trainers.runs.preview import Preview
from personalize.trainers.training import memory
from personalize.trainers.training.memory import MemoryPlan


@pytest.mark.parametrize(
    ("wanted", "batch_size", "expected"),
    [
        (MemoryPlan(), 8, "0 4 2 0c 4c 2c 1c"),
        (MemoryPlan(micro_batch_size=4), 8, "4 2 4c 2c 1c"),
        (MemoryPlan(), 3, "0 2 0c 2c 1c"),
        (MemoryPlan(), 1, "0 0c"),
        (MemoryPlan(micro_batch_size=1), 8, "1 1c"),
        (MemoryPlan(gradient_checkpointing=True), 4, "0c 2c 1c"),
    ],
)
def test_efforts_go_from_halves_to_checkpointing(wanted, batch_size, expected):
    found = memory.memory_plans(wanted, batch_size)
    assert " ".join(f"{e.micro_batch_size}{'c' * e.gradient_checkpointing}" for e in found) == expected


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, max allowed: 9.07 GB)"), True),
        (RuntimeError("Could not allocate tensor with 4 bytes. There is not enough GPU video memory available!"), True),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("Inference tensors do not track version counter."), False),
        (ValueError("the word `memory` is out of memory"), False),
    ],
)
def test_no_memory_in_whatever_words(error, is_it):
    assert is_out_of_memory(error) == is_it


@pytest.mark.comfy
def test_what_the_host_takes_for_no_memory_is_none_here():
    import comfy.model_management as mm

    error = torch.AcceleratorError("CUDA error: out of memory")
    assert mm.is_oom(error) and is_out_of_memory(error)
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


def test_a_preview_without_memory_leaves_the_steps_alone(tmp_path, monkeypatch):
    """It is left out, and the steps go on with the whole batch."""

    def none(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("out of memory, on purpose")

    monkeypatch.setattr(sampler, "sample_ids", none)
    said, preview = [], Preview(prompts=("a photo of {}",), every=3, steps=2)
    result = train(tmp_path, callbacks=training.Callbacks(on_notice=said.append), preview=preview)
    assert len(result.history) == FAST.steps and not (tmp_path / "run" / "previews").exists()
    assert not any("continuing with" in sentence for sentence in said)
    assert "there was no memory to draw a preview" in said


def test_a_stage_begins_with_the_whole_batch_again():
    stage = types.SimpleNamespace(batch_size=4)
    room = memory.MemoryBudget(models=None, memory_plan=MemoryPlan(), free=None, resolution=32)
    room.shrink(stage, MemoryError())
    assert room.memory_plan == MemoryPlan(micro_batch_size=2)
    room.make(stage)
    assert room.memory_plan == MemoryPlan()


def test_an_estimate_chooses_the_effort_before_the_first_step(tmp_path):
    """The first that fits, in the order in which they cost more time."""
    models = small.models()
    size = {"trained": 1000, "batch_size": 4, "resolution": 32}
    memory_plans = memory.memory_plans(MemoryPlan(), 4)
    needs = [memory.stage_bytes(models, memory_plan, **size) for memory_plan in memory_plans]
    assert needs[-1] == min(needs) and needs[0] == max(needs)
    for need in needs:
        first = next(i for i, other in enumerate(needs) if other <= need)
        assert memory.fit(models, MemoryPlan(), need, **size) == (memory_plans[first], needs[first])
    with pytest.raises(MemoryError, match="lower the resolution"):
        memory.fit(models, MemoryPlan(), needs[-1] - 1, **size)
    said = []
    train(tmp_path, callbacks=training.Callbacks(on_notice=said.append), free_memory=lambda: memory.BASE + 2**21)
    assert any("micro-batch size" in sentence for sentence in said)


def test_activations_are_counted_once(monkeypatch):
    """Of a large model a count takes seconds; neither splits nor another training with the same change it."""
    counted, count = [], memory._unet_activation_bytes
    monkeypatch.setattr(memory, "_counted", {})
    monkeypatch.setattr(memory, "_unet_activation_bytes", lambda *given: counted.append(given[1:]) or count(*given))
    for _ in range(2):
        with pytest.raises(MemoryError):
            memory.fit(small.models(), MemoryPlan(), 0, trained=1000, batch_size=8, resolution=64)
    assert counted == [(8, False), (8, True)]
    frozen, trained = small.models(), small.models()
    trained.unet.requires_grad_(True)
    assert memory.activation_bytes(trained, 8, False) > memory.activation_bytes(frozen, 8, False)
    assert memory.activation_bytes(frozen, 16, False) > 2 * memory.activation_bytes(frozen, 8, False)
    assert len(counted) == 4


def test_class_images_are_drawn_fewer_at_once_where_memory_runs_out(monkeypatch):
    sizes, draw = [], sampler.sample_ids

    def limited(*arguments, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.cuda.OutOfMemoryError("out of memory, on purpose")
        return draw(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(sampler, "sample_ids", limited)
    concept = Concept(images=(torch.rand(3, 32, 32),), resolution=32)
    class_images_of(small.models(), concept, Context(), seed=0, count=8, steps=1)
    assert sizes == [8, 4, 2]
