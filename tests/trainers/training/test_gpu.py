"""On a graphics card: memory that really runs out, and memory that is really given back."""

import gc
from dataclasses import replace

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.device import SingleDevice
from personalize.trainers.recipes.attndreambooth import PAPER
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run
from personalize.trainers.stopping.dvar import DVAR, FixedBatch
from personalize.trainers.stopping.monitor import StageContext
from personalize.trainers.training.loop import train_stage
from personalize.trainers.training.optimizers import adamw

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
    assert any(sentence.startswith("memory ran out: continuing with") for sentence in said)


def test_an_estimate_avoids_running_out(tmp_path, little_memory):
    said = train(tmp_path, batch_size=512, free_memory=lambda: LIMIT)
    assert not any(sentence.startswith("memory ran out") for sentence in said)


def test_a_step_of_the_optimizer_takes_no_memory_for_itself():
    """Beside the two moments, which it makes in its first step."""
    parameter = torch.nn.Parameter(torch.zeros(2**24, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    optimizer = adamw([{"params": [parameter], "lr": 1e-3}], 0.0)
    optimizer.step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < parameter.nbytes // 4


@pytest.mark.parametrize("method", ["textboost", "attndreambooth"])
def test_a_graph_learns_what_single_launches_learn(method):
    """Losses of six steps alike, and parameters no further apart than ten times what two runs without a graph are.

    Two runs on a card differ in the last digits of their gradients, which AdamW's first steps turn into whole steps.
    """

    def learned(graph):
        recipe = {
            "textboost": TextBoost(steps=6, batch_size=2, views=4, captions=("a red ball",)),
            "attndreambooth": replace(PAPER, steps_3=6, batch_size_3=2, views=4),
        }[method]
        models, generator = small.models().to("cuda", torch.float32), torch.Generator().manual_seed(0)
        picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5))
        stages = recipe.stages(models, Concept(images=(picture,), resolution=64), generator, Context())
        *_, stage = (next(stages) for _ in range(1 if method == "textboost" else 3))
        device = SingleDevice(device=torch.device("cuda"), graph=graph)
        train_stage(
            stage, models, device, generator, notice=said.append,
            on_step=lambda report, state: losses.append(report.loss),
        )  # fmt: skip
        stages.close()
        return [parameter.detach().cpu() for parameter in stage.parameters()]

    said, losses = [], []
    plain, again, graphed = learned(False), learned(False), learned(True)
    assert said == []  # a graph was captured
    assert losses[12:] == pytest.approx(losses[:6], rel=1e-4)
    assert apart(plain, graphed) <= 10 * max(apart(plain, again), 1e-6)


@torch.no_grad()
def test_a_graph_measures_what_single_launches_measure():
    """DVAR's loss before and after the parameters have changed: a graph must read them again."""

    def measured(graph):
        models, generator = small.models().to("cuda", torch.float32), torch.Generator().manual_seed(0)
        concept = Concept(images=(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5)),), resolution=64)
        stages = TextBoost(steps=6, batch_size=2, views=4).stages(models, concept, generator, Context())
        device = SingleDevice(device=torch.device("cuda"), graph=graph)
        context = StageContext(
            models=models, stage=(stage := next(stages)), concept=concept, device=device, generator=generator,
            subject="<concept>",
        )  # fmt: skip
        fixed_batch_loss = FixedBatch(DVAR(accumulation=4), context)
        found = fixed_batch_loss(1)
        for parameter in stage.parameters():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel(), device="cuda").view_as(parameter))
        found += fixed_batch_loss(2)
        assert hasattr(fixed_batch_loss.run, "replay") == graph
        assert not graph or fixed_batch_loss.run.replay
        stages.close()
        return found

    graphed, plain = measured(True), measured(False)
    assert graphed == pytest.approx(plain, rel=1e-5)
    assert plain[:4] != pytest.approx(plain[4:], rel=1e-3)


def apart(one, other):
    return max((a - b).abs().mean().item() for a, b in zip(one, other, strict=True))


def test_all_memory_comes_back(tmp_path):
    gc.collect()  # what other tests left
    before = torch.cuda.memory_allocated()
    train(tmp_path, batch_size=2)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
