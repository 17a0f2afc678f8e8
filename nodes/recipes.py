"""One node per method, generated from its recipe: presets, each with its own fields."""

from dataclasses import replace

from comfy_api.latest import io

from ..trainers.data import captions_of
from ..trainers.recipes import METHODS
from . import host
from .schema import checked, widgets
from .sockets import CATEGORY, RecipeSocket


class TextBoostRecipe(io.ComfyNode):
    """Settings of TextBoost."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTextBoost",
            display_name="TextBoost",
            category=CATEGORY,
            description="Learns a subject from one picture by adapting the text encoder.",
            search_aliases=["textboost", "train", "personalize", "lora", "dreambooth"],
            inputs=[
                preset_input(
                    METHODS["TextBoost"],
                    "benchmark: the settings of the paper's comparison. readme: the authors' example command. "
                    "style: for a style, from pictures with a caption each. 2026 CPA: the authors' revision, adapters "
                    "that leave everything before the new word as it was. 2026++: the same, and in the U-Net.",
                )
            ],
            outputs=[RecipeSocket.Output(display_name="recipe")],
        )

    @classmethod
    @checked
    def execute(cls, preset: dict | None = None) -> io.NodeOutput:
        return io.NodeOutput(chosen("TextBoost", METHODS["TextBoost"], preset))


class AttnDreamBoothRecipe(io.ComfyNode):
    """Settings of AttnDreamBooth."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeAttnDreamBooth",
            display_name="AttnDreamBooth",
            category=CATEGORY,
            description="Learns a subject in three stages: the word, what the model attends to, the model itself.",
            search_aliases=["attndreambooth", "dreambooth", "train", "personalize", "fine-tune"],
            inputs=[
                preset_input(
                    METHODS["AttnDreamBooth"],
                    "paper: 660 steps in all. fast: 360, the last 200 of them with half the pictures.",
                )
            ],
            outputs=[RecipeSocket.Output(display_name="recipe")],
        )

    @classmethod
    @checked
    def execute(cls, preset: dict | None = None) -> io.NodeOutput:
        return io.NodeOutput(chosen("AttnDreamBooth", METHODS["AttnDreamBooth"], preset))


def preset_input(presets: dict, tooltip: str) -> io.Input:
    """A choice among a method's presets, each with widgets for its own fields."""
    options = [io.DynamicCombo.Option(name, widgets(recipe)) for name, recipe in presets.items()]
    return io.DynamicCombo.Input("preset", options=options, tooltip=tooltip)


def chosen(method: str, presets: dict, preset: dict | None):
    """The settings that a preset's widgets describe.

    Raises:
        ValueError: there is no such preset, or its captions cannot be read.
    """
    # A prompt saved before a field existed lacks it, and the host then says None: the preset's value stands in.
    values = {field: value for field, value in (preset or {}).items() if value is not None}
    name = values.pop("preset", None)
    if name not in presets:
        raise ValueError(f"{method} has no preset of that name: choose one of {', '.join(presets)}.")
    if "captions" in values:
        values["captions"] = captions_of(host.text_in_input(values["captions"], "captions", "caption"))
    return replace(presets[name], **values)
