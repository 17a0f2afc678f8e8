"""Monitors for Train, each joined to another one if you like."""

from comfy_api.latest import io

from ..trainers import clip_stopping, dvar
from ..trainers.clip_stopping import ClipEarlyStopping
from ..trainers.dvar import DVAR
from ..trainers.picking import PickByScore
from ..trainers.stopping import FixedSteps
from . import host
from .recipes import chosen, preset_input
from .schema import checked, valid, widgets
from .sockets import CATEGORY, StopperSocket

JOINED = "Another monitor that watches as well; the first that fires ends the stage."


def monitor_node(
    node_id: str, name: str, presets: dict, *, description: str, search_aliases: list[str], tooltip: str
) -> type[io.ComfyNode]:
    """The node of a monitor with presets; `tooltip` says what these are."""

    class Stopper(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                display_name=name,
                category=CATEGORY,
                description=description,
                search_aliases=["early stopping", "monitor", *search_aliases],
                inputs=[
                    preset_input(presets, tooltip),
                    StopperSocket.Input("stopper", optional=True, tooltip=JOINED),
                ],
                outputs=[StopperSocket.Output(display_name="stopper")],
            )

        @classmethod
        @checked
        def execute(cls, preset: dict | None = None, stopper: tuple = ()) -> io.NodeOutput:
            return io.NodeOutput((*stopper, chosen(name, presets, preset)))

    Stopper.__doc__ = f"Settings of {name}."
    Stopper.__name__ = Stopper.__qualname__ = node_id.removeprefix("Personalize") + "Stopper"
    return Stopper


DVARStopper = monitor_node(
    "PersonalizeDVAR",
    DVAR.name,
    dvar.PRESETS,
    description="Stops a training when its loss on one fixed batch has settled.",
    search_aliases=["convergence", "variance"],
    tooltip="The window and threshold for a method; the last three are the paper's, for their full lengths, the others "
    "ours, for short trainings.",
)
CLIPEarlyStoppingStopper = monitor_node(
    "PersonalizeCLIPEarlyStopping",
    ClipEarlyStopping.name,
    clip_stopping.PRESETS,
    description="Stops a training when the pictures it draws no longer come closer to the references.",
    search_aliases=["clip score", "patience", "plateau"],
    tooltip="Patience, threshold and pictures for a method; the first three are the paper's, for their full lengths, "
    "the others ours, for short trainings.",
)


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


class PickByScoreStopper(io.ComfyNode):
    """Settings of Pick by Score."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePickByScore",
            display_name=PickByScore.name,
            category=CATEGORY,
            description="Scores a training on its way, for likeness and for following words, and picks the best state.",
            search_aliases=["best checkpoint", "overfitting", "evaluate", "clip-t", "dino", "early stopping"],
            inputs=[*widgets(PickByScore()), StopperSocket.Input("stopper", optional=True, tooltip=JOINED)],
            outputs=[StopperSocket.Output(display_name="stopper")],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool | str:
        return valid(lambda given: PickByScore(prompts=given), prompts)

    @classmethod
    @checked
    def execute(
        cls, text_weight=None, every=None, prompts=None, seeds=None, guidance=None, sampler_steps=None, identity=None,
        stage=None, first_seed=None, clip_model=None, clip_weights=None, clip_download=None, dino_model=None,
        dino_weights=None, dino_download=None, stopper: tuple = (),
    ) -> io.NodeOutput:  # fmt: skip
        given = {
            "text_weight": text_weight, "every": every, "prompts": prompts, "seeds": seeds, "guidance": guidance,
            "sampler_steps": sampler_steps, "identity": identity, "stage": stage, "first_seed": first_seed,
            "clip_model": clip_model, "clip_weights": clip_weights, "clip_download": clip_download,
            "dino_model": dino_model, "dino_weights": dino_weights, "dino_download": dino_download,
        }  # fmt: skip
        picker = PickByScore(**{k: v for k, v in given.items() if v is not None})
        for judge in picker.judges:
            host.backbones.check(judge)
        return io.NodeOutput((*stopper, picker))
