"""One node per method, generated from its recipe: presets, each with its own fields."""

from dataclasses import dataclass

from comfy_api.latest import io

from ..trainers.recipes import METHODS
from ..trainers.runs.run import extractor_configs
from ..trainers.text import captions_of
from .host.folders import text_in_input
from .host.session import extractors
from .schema import checked, filled, widgets
from .sockets import CATEGORY, RecipeSocket


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method's node presents itself; its presets are those of METHODS."""

    node_id: str  # part of every saved workflow: never changes
    name: str
    description: str
    search_aliases: tuple[str, ...]
    presets: str  # what they are


SHORT = "full: as long as the authors train without a stopping monitor. short: the length of their quick baseline."
TRAIN = ("train", "personalize")
NODES = (
    Method(
        node_id="PersonalizeTextBoost",
        name="TextBoost",
        description="Learns a subject from one picture by adapting the text encoder.",
        search_aliases=("textboost", *TRAIN, "lora", "dreambooth"),
        presets="benchmark: the settings of the paper's comparison. readme: the authors' example command. "
        "style: for a style, from pictures with a caption each. 2026 CPA: the authors' revision, adapters "
        "that leave everything before the new word as it was. 2026++: the same, and in the U-Net.",
    ),
    Method(
        node_id="PersonalizeAttnDreamBooth",
        name="AttnDreamBooth",
        description="Learns a subject in three stages: the word, what the model attends to, the model itself.",
        search_aliases=("attndreambooth", "dreambooth", *TRAIN, "fine-tune"),
        presets="paper: 660 steps in all. fast: 360, the last 200 of them with half the pictures.",
    ),
    Method(
        node_id="PersonalizeTextualInversion",
        name="Textual Inversion",
        description="Learns a new word for a subject and leaves the model as it is: the smallest of all results.",
        search_aliases=("textual inversion", "embedding", *TRAIN),
        presets=SHORT,
    ),
    Method(
        node_id="PersonalizeDreamBoothLoRA",
        name="DreamBooth-LoRA",
        description="Learns a new word and a small LoRA on the U-Net's attention.",
        search_aliases=("dreambooth", "lora", *TRAIN, "fine-tune"),
        presets=SHORT,
    ),
    Method(
        node_id="PersonalizeCustomDiffusion",
        name="Custom Diffusion",
        description="Learns a new word and what the U-Net makes of words, beside other pictures of its class.",
        search_aliases=("custom diffusion", "prior preservation", *TRAIN, "fine-tune"),
        presets=SHORT,
    ),
)


def recipe_node(method: Method) -> type[io.ComfyNode]:
    """The node of a method: one choice among its presets, each with its own fields."""

    class Recipe(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=method.node_id,
                display_name=method.name,
                category=CATEGORY,
                description=method.description,
                search_aliases=[*method.search_aliases],
                inputs=[preset_input(METHODS[method.name], method.presets)],
                outputs=[RecipeSocket.Output(display_name="recipe")],
            )

        @classmethod
        @checked
        def execute(cls, preset: dict | None = None) -> io.NodeOutput:
            return io.NodeOutput(chosen(method.name, METHODS[method.name], preset))

    Recipe.__doc__ = f"Settings of {method.name}."
    Recipe.__name__ = Recipe.__qualname__ = method.node_id.removeprefix("Personalize") + "Recipe"
    return Recipe


def preset_input(presets: dict, tooltip: str) -> io.Input:
    """A choice among a method's presets, each with widgets for its own fields."""
    options = [io.DynamicCombo.Option(name, widgets(recipe)) for name, recipe in presets.items()]
    return io.DynamicCombo.Input("preset", options=options, tooltip=tooltip)


def chosen(method: str, presets: dict, preset: dict | None):
    """The settings that a preset's widgets describe.

    Raises:
        ValueError: there is no such preset, its captions cannot be read, or the CLIP that it names cannot be found.
    """
    values = dict(preset or {})
    name = values.pop("preset", None)
    if name not in presets:
        raise ValueError(f"{method} has no preset of that name: choose one of {', '.join(presets)}.")
    if values.get("captions") is not None:
        values["captions"] = captions_of(text_in_input(values["captions"], "captions", "caption"))
    return with_extractors(filled(presets[name], values))


def with_extractors(settings):
    """A recipe's or a monitor's settings as they are.

    Raises:
        ValueError: a backbone that they name cannot be found.
    """
    for extractor in extractor_configs(settings, ()):
        extractors.check(extractor)
    return settings


RECIPES = [recipe_node(method) for method in NODES]
