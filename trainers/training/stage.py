"""A stage of a training as data: what trains, on what, against which losses; and one step's record."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..data.batch import Batch
from ..models.diffusion import Models
from .objective import Loss
from .optimizers import Optimization
from .step_inputs import Noise


@dataclass(kw_only=True)
class Stage:
    """What trains, on what, against which losses; stopping comes from outside."""

    name: str
    steps: int
    number: int = 1  # among the method's stages: what monitors choose a stage by
    batch_size: int  # samples of one step, however it is split
    params: list[dict]  # optimizer groups, the only statement of what trains; "max_grad_norm" clips a group
    batches: Iterator[Batch]  # with no memory of its own but the run's generator, so that a run can be resumed
    first: Callable[[int], Batch]  # that many of such samples, the concept's images and the templates in their order
    templates: Sequence[str]  # of the method's prompts, with `{}` for the subject; without an augmentation's name
    losses: dict[str, tuple[float, Loss]]  # name -> (weight, loss)
    timesteps: Callable[[int], Tensor]
    optimization: Optimization = Optimization()
    noise: Noise = Noise()
    after_step: Callable[[], None] = lambda: None
    after_pass: Callable[[], None] = lambda: None  # after each forward and backward, even one that failed

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.params for parameter in group["params"]]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The one record of a step: a line of steps.jsonl, and what callbacks receive."""

    step: int  # steps done so far, of all stages
    stage: str  # its name
    number: int  # of the stage, among the method's
    stage_step: int  # steps done so far of this stage
    steps: int  # of this stage, if nothing ends it early
    loss: float
    terms: dict[str, float]  # each loss by name, unweighted
    seconds: float  # of training so far, of all stages
    measures: dict[str, dict] = field(default_factory=dict)  # by monitor, after this step
    start: dict[str, dict] = field(default_factory=dict)  # the same before the stage's first step

    def entry(self) -> dict:
        """The report as a line of steps.jsonl holds it; without what no monitor measured."""
        return {name: value for name, value in asdict(self).items() if value != {}}


class Diverged(FloatingPointError):
    """The loss of `step` is no longer a number, so the parameters after `step - 1` are not to be trusted."""

    def __init__(self, step: int, loss: float):
        super().__init__(
            f"The loss became {loss} at step {step}: lower the learning rates, or set the precision to float32."
        )
        self.step = step


def freeze_all_but(stage: Stage, models: Models) -> None:
    """Only what the stage declares keeps a gradient."""
    for module in (models.unet, *models.text_encoders):
        module.requires_grad_(False)
    for parameter in stage.parameters():
        parameter.requires_grad_(True)
