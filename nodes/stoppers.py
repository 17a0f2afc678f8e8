"""Nodes of the monitors for Train, which can be chained."""

from comfy_api.latest import io

from ..trainers.stopping import clip_early_stopping, dvar
from ..trainers.stopping.clip_early_stopping import ClipEarlyStopping
from ..trainers.stopping.dvar import DVAR
from ..trainers.stopping.monitor import FixedSteps
from ..trainers.stopping.pick_by_score import PickByScore
from .evaluation.metric_models import SETTINGS, metric_models_input, values_for
from .recipes import chosen, preset_inputs, valid_preset, with_extractors
from .schema import checked, filled, valid, widgets
from .sockets import STOPPING_FOLDER, StopperSocket, stopper_output

SHOWN = ("text_weight", "every", "prompts")  # of Pick by Score, without opening the advanced settings
CHAINED = "Another monitor to run as well; the first that fires ends the stage."


def monitor_node(
    node_id: str, name: str, presets: dict, *, description: str, search_aliases: list[str], tooltip: str,
    shown: tuple[str, ...],
) -> type[io.ComfyNode]:  # fmt: skip
    """Return the node class of a monitor with presets, which `tooltip` tells apart; see `widgets` for `shown`."""

    class Stopper(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                display_name=name,
                category=STOPPING_FOLDER,
                description=description,
                search_aliases=["early stopping", "monitor", *search_aliases],
                inputs=[
                    *preset_inputs(presets, tooltip, shown),
                    StopperSocket.Input("stopper", optional=True, tooltip=CHAINED),
                ],
                outputs=[stopper_output()],
                hidden=[io.Hidden.unique_id],
            )

        @classmethod
        def validate_inputs(cls, preset: dict | None = None) -> bool | str:
            return valid_preset(name, presets, cls.hidden)

        @classmethod
        @checked
        def execute(cls, preset: dict | None = None, stopper: tuple = (), metric_models=None) -> io.NodeOutput:
            return io.NodeOutput((*stopper, chosen(name, presets, preset, metric_models)))

    Stopper.__doc__ = f"Settings of {name}."
    Stopper.__name__ = Stopper.__qualname__ = node_id.removeprefix("Personalize") + "Stopper"
    return Stopper


DVARStopper = monitor_node(
    "PersonalizeDVAR",
    DVAR.name,
    dvar.PRESETS,
    description="Early stopping: ends a training when its loss on one fixed batch has become stable.",
    search_aliases=["convergence", "variance", "fixed batch"],
    tooltip="Window and threshold for a method: the last three presets are the paper's, the three before them evaluate "
    "every 8th step only, both for full-length trainings; the others are this pack's, for short ones.",
    shown=("window", "threshold"),
)
CLIPEarlyStoppingStopper = monitor_node(
    "PersonalizeCLIPEarlyStopping",
    ClipEarlyStopping.name,
    clip_early_stopping.PRESETS,
    description="Early stopping: ends a training when its images no longer get closer to the reference images.",
    search_aliases=["clip score", "patience", "plateau"],
    tooltip="Patience and threshold for a method: the first three presets are the paper's, for full-length trainings, "
    "the others are this pack's, for short ones.",
    shown=("patience", "min_delta"),
)


class FixedStepsStopper(io.ComfyNode):
    """Settings of Fixed Steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeFixedSteps",
            display_name="Fixed Steps",
            category=STOPPING_FOLDER,
            description="Early stopping: ends a training, or one stage of it, after a fixed number of steps.",
            search_aliases=["early stopping", "max steps", "limit"],
            inputs=[*widgets(FixedSteps()), StopperSocket.Input("stopper", optional=True, tooltip=CHAINED)],
            outputs=[stopper_output()],
        )

    @classmethod
    @checked
    def execute(cls, stopper: tuple = (), **settings) -> io.NodeOutput:
        return io.NodeOutput((*stopper, filled(FixedSteps(), settings)))


class PickByScoreStopper(io.ComfyNode):
    """Settings of Pick by Score."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePickByScore",
            display_name=PickByScore.name,
            category=STOPPING_FOLDER,
            description="Scores identity and text alignment during training, and returns the state that you prefer.",
            search_aliases=[
                "best checkpoint",
                "checkpoint selection",
                "overfitting",
                "clip-t",
                "dino",
                "early stopping",
            ],
            inputs=[
                *widgets(PickByScore(), SHOWN, SETTINGS),
                metric_models_input(),
                StopperSocket.Input("stopper", optional=True, tooltip=CHAINED),
            ],
            outputs=[stopper_output()],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool | str:
        return valid(lambda given: PickByScore(prompts=given), prompts)

    @classmethod
    @checked
    def execute(cls, stopper: tuple = (), metric_models=None, **settings) -> io.NodeOutput:
        settings |= values_for(PickByScore, metric_models)
        return io.NodeOutput((*stopper, with_extractors(filled(PickByScore(), settings))))
