"""Offset noise: is it the formula, the same in every method, and without an offset what it always was?"""

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.training.test_learning_rates import short
from personalize.trainers.data.concept import Concept
from personalize.trainers.data.context import Context
from personalize.trainers.device import SingleDevice
from personalize.trainers.recipes import METHODS
from personalize.trainers.training.loop import draw
from personalize.trainers.training.step_inputs import Noise

SHAPE = torch.Size([2, 4, 3, 5])


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_formula(offset):
    """`n + offset * m` with a value m for each sample and channel; without an offset nothing else is drawn."""
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    noise, plain = Noise(noise_offset=offset).draw(SHAPE, ours), torch.randn(SHAPE, generator=theirs)
    m = torch.randn(2, 4, 1, 1, generator=theirs) if offset else 0.0
    assert torch.equal(noise, plain + offset * m)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_it(method):
    concept = Concept(images=(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(5)),), resolution=32)
    drawn = []
    for offset in (0.0, 0.5):
        recipe = short([*METHODS[method].values()][-1], noise_offset=offset)
        generator = torch.Generator().manual_seed(0)
        stage = next(recipe.stages(small.models(), concept, generator, Context()))
        drawn.append(draw(stage, SingleDevice(device=torch.device("cpu")), generator).noise)
    difference = drawn[1] - drawn[0]
    assert difference.abs().min() > 0 and torch.allclose(difference, difference.mean(dim=(2, 3), keepdim=True))
