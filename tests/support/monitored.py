"""A stage as its monitors see it, on small models, before its first step. No test in here."""

import torch

from personalize.tests.support import small
from personalize.trainers.data.context import Context
from personalize.trainers.device import SingleDevice
from personalize.trainers.stopping.monitor import StageContext


def stage_context(recipe, concept, *, models=None, seed=0, subject="<concept>", context=None):
    """The recipe's first stage on the CPU."""
    models, generator = models or small.models(), torch.Generator().manual_seed(seed)
    return StageContext(
        models=models,
        stage=next(recipe.stages(models, concept, generator, Context())),
        concept=concept,
        device=SingleDevice(device=torch.device("cpu")),
        generator=generator,
        subject=subject,
        context=context or Context(),
    )
