"""One node per method, generated from its recipe: presets, each with its own fields."""

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..trainers.data import captions_of
from ..trainers.recipes import METHODS
from ..trainers.sentences import quoted, reason
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
        return io.NodeOutput(chosen("TextBoost", preset))


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
        return io.NodeOutput(chosen("AttnDreamBooth", preset))


def preset_input(presets: dict, tooltip: str) -> io.Input:
    """A choice among a method's presets, each with widgets for its own fields."""
    options = [io.DynamicCombo.Option(name, widgets(recipe)) for name, recipe in presets.items()]
    return io.DynamicCombo.Input("preset", options=options, tooltip=tooltip)


def chosen(method: str, preset: dict | None):
    """The recipe that a preset's widgets describe.

    Raises:
        ValueError: there is no such preset, or its captions cannot be read.
    """
    presets = METHODS[method]
    # A prompt saved before a field existed lacks it, and the host then says None: the preset's value stands in.
    values = {field: value for field, value in (preset or {}).items() if value is not None}
    name = values.pop("preset", None)
    if name not in presets:
        raise ValueError(f"{method} has no preset of that name: choose one of {', '.join(presets)}.")
    if "captions" in values:
        values["captions"] = captions(values["captions"].strip())
    return replace(presets[name], **values)


def captions(name: str) -> tuple[str, ...]:
    """The lines of a text file in the input folder; none for an empty name.

    Raises:
        ValueError: a file that lies elsewhere, cannot be read, or holds no caption.
    """
    if not name:
        return ()
    try:
        found = captions_of(Path(host.inside_input(name)).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"The captions file {quoted(name)} cannot be read as text: save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(
            f"The captions file {quoted(name)} cannot be read ({reason(error)}): write the name of a text file as "
            "it is below input/."
        ) from error
    if not found:
        raise ValueError(f"The captions file {quoted(name)} is empty: write one caption per line.")
    return found
