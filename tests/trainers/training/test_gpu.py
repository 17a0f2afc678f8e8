"""On a graphics card: memory that really runs out, and memory that is really given back."""

import gc

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's allocator can be limited, others cannot"),
]
LIMIT = 2 * 2**30


@pytest.fixture
def little_memory():
    """This process may have two gigabytes of the card."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def train(folder, batch_size, **options):
    run = Run(
        concept=Concept(images=(torch.rand(3, 512, 512),)), recipe=TextBoost(steps=2, batch_size=batch_size, views=8)
    )
    said = []
    callbacks = training.Callbacks(on_notice=said.append)
    training.train(run, small.models(), folder, device="cuda", callbacks=callbacks, **options)
    return said


def test_where_memory_really_runs_out_less_goes_through_at_once(tmp_path, little_memory):
    said = train(tmp_path, batch_size=512)
    assert any(sentence.startswith("memory ran out: going on with") for sentence in said)


def test_an_estimate_avoids_running_out(tmp_path, little_memory):
    said = train(tmp_path, batch_size=512, free_memory=lambda: LIMIT)
    assert not any(sentence.startswith("memory ran out") for sentence in said)


def test_all_memory_comes_back(tmp_path):
    before = torch.cuda.memory_allocated()
    train(tmp_path, batch_size=2)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
