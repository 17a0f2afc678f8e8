"""A training's passes: does a failed one leave nothing behind, neither activations nor gradients?"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from personalize.tests.support import small
from personalize.tests.trainers.recipes.test_attndreambooth import CONCEPT, recipe
from personalize.trainers.data.context import Context
from personalize.trainers.device import SingleDevice
from personalize.trainers.training.cuda_graph import GraphedPass
from personalize.trainers.training.loop import draw, run_pass, train_stage
from personalize.trainers.training.objective import Objective
from personalize.trainers.training.stage import freeze_all_but
from personalize.trainers.training.step_inputs import Ahead

CPU = SingleDevice(device=torch.device("cpu"))


def last_stage(dtype=torch.float32, **changes):
    """The models and the third stage of AttnDreamBooth, with its generator; the last keeps attention recorded."""
    models, generator = small.models().to("cpu", dtype), torch.Generator().manual_seed(0)
    stages = recipe(run_stages="all", **changes).stages(models, CONCEPT, generator, Context())
    *_, stage = (next(stages) for _ in range(3))
    return models, stage, generator, stages


def fail_once(monkeypatch, at):
    """The pass of number `at` runs out of memory behind the U-Net."""
    calls, forward = [], Objective.forward

    def failing(self, *inputs):
        calls.append(1)
        terms = forward(self, *inputs)
        if len(calls) == at:
            raise MemoryError
        return terms

    monkeypatch.setattr(Objective, "forward", failing)


def test_a_failed_pass_keeps_no_activations(monkeypatch):
    """Statistics of attention carry a gradient, and with it everything that they were computed from."""
    models, stage, generator, stages = last_stage()
    layers = next(m for p, m in models.unet.named_modules() if p.endswith(".attn2")).processor.maps
    fail_once(monkeypatch, at=2)
    with pytest.raises(MemoryError):
        train_stage(stage, models, CPU, generator)
    assert layers.means == layers.variances == {}
    stages.close()


def test_a_step_leaves_no_statistics_behind():
    models, stage, generator, stages = last_stage()
    layers = next(m for p, m in models.unet.named_modules() if p.endswith(".attn2")).processor.maps
    left = []
    train_stage(stage, models, CPU, generator, on_step=lambda report, state: left.append(len(layers.means)))
    assert left == [0, 0]
    stages.close()


def test_gradients_of_a_broken_step_do_not_count_in_the_next_attempt(monkeypatch):
    """The second half of the second step fails; begun again, the stage learns what an undisturbed one learns."""
    models, stage, generator, stages = last_stage()
    begun = [p.detach().clone() for p in stage.parameters()]
    drawn = generator.get_state()
    train_stage(stage, models, CPU, generator, micro_batch_size=1)
    undisturbed = [p.detach().clone() for p in stage.parameters()]

    def again():
        generator.set_state(drawn)
        with torch.no_grad():
            for parameter, value in zip(stage.parameters(), begun, strict=True):
                parameter.copy_(value)
        train_stage(stage, models, CPU, generator, micro_batch_size=1)

    fail_once(monkeypatch, at=4)
    with pytest.raises(MemoryError):
        again()
    again()
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, stage.parameters(), strict=True))
    stages.close()


def inputs_of(stage, generator, n):
    return [draw(stage, CPU, generator) for _ in range(n)]


def replayed(run, clear):
    """In the place of a card's graph: the pass itself, which reads its inputs from where they were at the capture."""
    run()
    clear()
    return run


def refused(run, clear):
    raise RuntimeError("operation not permitted when stream is capturing\nand more lines")


@pytest.mark.parametrize(("capture", "said"), [(replayed, 0), (refused, 1)])
def test_a_replayed_pass_gives_what_a_plain_one_gives(capture, said):
    """Loss terms and gradients of four steps, bit for bit; where nothing can be captured one sentence says so."""
    models, stage, generator, stages = last_stage()
    freeze_all_but(stage, models)
    objective = Objective(models, {name: loss for name, (_, loss) in stage.losses.items()})
    run = partial(run_pass, stage, objective, CPU, 0)
    notices = []
    graphed = GraphedPass(run, stage.parameters(), notices.append, capture)
    for inputs in inputs_of(stage, generator, 4):
        found = []
        for one in (run, graphed):
            terms = {name: term.item() for name, term in one(inputs).items()}
            found.append((terms, [p.grad.clone() for p in stage.parameters()]))
            for parameter in stage.parameters():
                parameter.grad = None
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert len(notices) == said and not any("\n" in notice for notice in notices)
    assert (graphed.replay is None) == bool(said)
    stages.close()


def test_what_is_drawn_ahead_leaves_the_generator_where_it_was():
    """Two steps in turn, with and without drawing ahead: the same inputs, and between them the same state."""
    _, stage, generator, stages = last_stage()
    begun, plain, ahead = generator.get_state(), [], []
    for found in (plain, ahead):
        generator.set_state(begun)
        inputs = Ahead(partial(draw, stage, CPU, generator), generator, lambda tensor: tensor)
        for _ in range(3):
            found += [*inputs.take().tensors(), generator.get_state()]
            if found is ahead:
                inputs.prepare()
                found[-1] = generator.get_state()
    assert all(torch.equal(a, b) for a, b in zip(plain, ahead, strict=True))
    stages.close()


class Casts(TorchDispatchMode):
    """Counts the copies to another precision."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_in_half_precision_what_trains_is_cast_once_per_pass(weights):
    """Once on the way there and its gradient once on the way back; activations stay as they are but for timesteps,
    statistics of attention and the losses."""
    models, stage, generator, stages = last_stage(dtype=torch.bfloat16, fine_tuning=weights)
    freeze_all_but(stage, models)
    objective = Objective(models, {name: loss for name, (_, loss) in stage.losses.items()})
    device = SingleDevice(device=torch.device("cpu"), dtype=torch.bfloat16)
    inputs = draw(stage, device, generator)
    with Casts() as casts:
        run_pass(stage, objective, device, 0, inputs)
    trained = len(stage.parameters())
    assert 2 * trained <= casts.count < 2 * trained + 120
    stages.close()


@pytest.mark.parametrize(("number", "passes"), [(1, 2), (3, 1)])
def test_encoders_that_do_not_train_read_a_prompt_once(number, passes):
    """Of two steps: stage 1 trains the word, so its prompt is another in each; stages 2 and 3 do not."""
    models, generator = small.models(), torch.Generator().manual_seed(0)
    stages = recipe(run_stages="all").stages(models, CONCEPT, generator, Context())
    *_, stage = (next(stages) for _ in range(number))
    calls = []
    models.text_encoders[0].register_forward_hook(lambda *seen: calls.append(1))
    train_stage(stage, models, CPU, generator)
    assert stage.steps == 2 and len(calls) == passes
    stages.close()
