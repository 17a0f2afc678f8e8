"""Monitors for Train: DVAR and Fixed Steps, each joined to another one if you like."""

from comfy_api.latest import io

from ..trainers.dvar import PRESETS
from ..trainers.stopping import FixedSteps
from .recipes import chosen, preset_input
from .schema import checked, widgets
from .sockets import CATEGORY, StopperSocket

JOINED = "Another monitor that watches as well; the first that fires ends the stage."


class DVARStopper(io.ComfyNode):
    """Settings of DVAR."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeDVAR",
            display_name="DVAR",
            category=CATEGORY,
            description="Stops a training when its loss on one fixed batch has settled.",
            search_aliases=["early stopping", "monitor", "convergence", "variance"],
            inputs=[
                preset_input(
                    PRESETS,
                    "The window and threshold for a method; those of the first three are the paper's, for their full "
                    "lengths.",
                ),
                StopperSocket.Input("stopper", optional=True, tooltip=JOINED),
            ],
            outputs=[StopperSocket.Output(display_name="stopper")],
        )

    @classmethod
    @checked
    def execute(cls, preset: dict | None = None, stopper: tuple = ()) -> io.NodeOutput:
        return io.NodeOutput((*stopper, chosen("DVAR", PRESETS, preset)))


class FixedStepsStopper(io.ComfyNode):
    """Settings of Fixed Steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeFixedSteps",
            display_name="Fixed Steps",
            category=CATEGORY,
            description="Ends a training, or one stage of it, after a number of steps.",
            search_aliases=["early stopping", "max steps", "limit"],
            inputs=[*widgets(FixedSteps()), StopperSocket.Input("stopper", optional=True, tooltip=JOINED)],
            outputs=[StopperSocket.Output(display_name="stopper")],
        )

    @classmethod
    @checked
    def execute(cls, steps=None, stage=None, act=None, stopper: tuple = ()) -> io.NodeOutput:
        given = {"steps": steps, "stage": stage, "act": act}
        return io.NodeOutput((*stopper, FixedSteps(**{k: v for k, v in given.items() if v is not None})))
