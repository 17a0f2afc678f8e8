"""Steps as metrics of Weights & Biases, if its package is installed; the run's own files stay as they are."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict

from ..reports.history_export import rows
from ..training.stage import StepReport

NO_WANDB = "Weights & Biases is not installed: run `pip install wandb` with this Python, or leave --wandb out."


def check() -> None:
    """Raise `ValueError` if the package is not installed."""
    if not importlib.util.find_spec("wandb"):
        raise ValueError(NO_WANDB)


def logger(project: str, run: str, settings: dict) -> Callable[[StepReport], None]:
    """Begin or resume a run in a project, and return what logs a step's losses, measurements and seconds.

    Args:
        run: name and id; an interrupted training goes on with the same one.
        settings: as `Run.settings` gives them.
    """
    import wandb

    begun = wandb.init(project=project, id=run, name=run, resume="allow", config=settings)

    def log(report: StepReport) -> None:
        (values,) = rows([asdict(report)])
        begun.log({name: value for name, value in values.items() if name != "step"}, step=report.step)

    return log
