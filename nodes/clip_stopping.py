"""CLIP Early Stopping: a monitor for Train that draws pictures and compares them with the references."""

from comfy_api.latest import io

from ..trainers.clip_stopping import PRESETS, ClipEarlyStopping
from .recipes import chosen, preset_input
from .schema import checked
from .sockets import CATEGORY, StopperSocket
from .stopping import JOINED


class CLIPEarlyStoppingStopper(io.ComfyNode):
    """Settings of CLIP early stopping."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeCLIPEarlyStopping",
            display_name=ClipEarlyStopping.name,
            category=CATEGORY,
            description="Stops a training when the pictures it draws no longer come closer to the references.",
            search_aliases=["early stopping", "monitor", "clip score", "patience", "plateau"],
            inputs=[
                preset_input(
                    PRESETS,
                    "Patience, threshold and pictures for a method; the first three are the paper's, for their full "
                    "lengths, the others ours, for short trainings.",
                ),
                StopperSocket.Input("stopper", optional=True, tooltip=JOINED),
            ],
            outputs=[StopperSocket.Output(display_name="stopper")],
        )

    @classmethod
    @checked
    def execute(cls, preset: dict | None = None, stopper: tuple = ()) -> io.NodeOutput:
        return io.NodeOutput((*stopper, chosen(ClipEarlyStopping.name, PRESETS, preset)))
