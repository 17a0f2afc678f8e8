"""Generates one node per method from its recipe: presets, each with its own settings."""

from collections.abc import Collection
from dataclasses import dataclass, fields

from comfy_api.latest import io

from ..trainers.evaluation.scorer import ScorerConfig
from ..trainers.recipes import METHODS
from ..trainers.runs.run import extractor_configs
from ..trainers.text import captions_of
from ..trainers.training import optimizers
from .evaluation.metric_models import SETTINGS, metric_models_input, values_for
from .host.folders import fingerprint, text_in_input
from .host.prompt_texts import queued_inputs
from .host.session import extractors
from .schema import checked, filled, fits, valid, widgets
from .sockets import METHOD_FOLDER, RecipeSocket


@dataclass(frozen=True, kw_only=True)
class Method:
    """Texts of a method's node; its presets are those of METHODS."""

    node_id: str  # part of every saved workflow: never changes
    name: str
    description: str
    search_aliases: tuple[str, ...]
    presets: str  # the tooltip that tells them apart


SHOWN = ("steps", "steps_1", "steps_2", "steps_3")  # without opening the advanced settings
SHORT = "full: the authors' number of steps without early stopping; short: the steps of their quick baseline."
TRAIN = ("train", "personalize")
NODES = (
    Method(
        node_id="PersonalizeTextBoost",
        name="TextBoost",
        description="Settings of TextBoost, which learns a subject from one image by adapting the text encoder.",
        search_aliases=("textboost", *TRAIN, "lora", "dreambooth"),
        presets="benchmark: the settings of the paper's comparison; readme: the authors' example command; style: for a "
        "style, from images with a caption each; 2026 CPA: the authors' revision with causality-preserved adapters, "
        "which keep everything before the placeholder token unchanged; 2026++: also adapts the U-Net.",
    ),
    Method(
        node_id="PersonalizeAttnDreamBooth",
        name="AttnDreamBooth",
        description="Settings of AttnDreamBooth, which trains embedding, cross-attention and U-Net in three stages.",
        search_aliases=("attndreambooth", "dreambooth", *TRAIN, "fine-tune"),
        presets="paper: the authors' settings, 660 steps; fast: 360 steps, the last 200 with half the batch size.",
    ),
    Method(
        node_id="PersonalizeTextualInversion",
        name="Textual Inversion",
        description="Settings of Textual Inversion, which trains only a token embedding, the smallest of all results.",
        search_aliases=("textual inversion", "embedding", *TRAIN),
        presets=SHORT,
    ),
    Method(
        node_id="PersonalizeDreamBoothLoRA",
        name="DreamBooth-LoRA",
        description="Settings of DreamBooth-LoRA, which trains a token embedding and a LoRA on the U-Net.",
        search_aliases=("dreambooth", "lora", *TRAIN, "fine-tune"),
        presets=f"{SHORT.rstrip('.')}; attention only: full, without a LoRA on the feed-forward layers.",
    ),
    Method(
        node_id="PersonalizeCustomDiffusion",
        name="Custom Diffusion",
        description="Settings of Custom Diffusion, which trains a token embedding and the cross-attention's keys and "
        "values, with prior preservation.",
        search_aliases=("custom diffusion", "prior preservation", *TRAIN, "fine-tune"),
        presets=SHORT,
    ),
    Method(
        node_id="PersonalizeTLoRA",
        name="T-LoRA",
        description="Settings of T-LoRA, which learns from one image with a LoRA whose rank falls with the noise.",
        search_aliases=("t-lora", "tlora", "lora", "dreambooth", *TRAIN),
        presets="single image: the authors' settings.",
    ),
    Method(
        node_id="PersonalizeLoRA",
        name="LoRA",
        description="Settings of LoRA, which adapts the diffusion model alone: Z-Image, Qwen-Image, Krea 2, Flux and "
        "others, and Stable Diffusion.",
        search_aliases=("lora", "dreambooth", "flux", "z-image", "qwen", "krea", *TRAIN, "fine-tune"),
        presets="full: 1000 steps; short: 300 steps at three times the learning rate.",
    ),
)


def recipe_node(method: Method) -> type[io.ComfyNode]:
    """Return the node class of a method: a choice among its presets, each with its own settings."""

    class Recipe(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=method.node_id,
                display_name=method.name,
                category=METHOD_FOLDER,
                description=method.description,
                search_aliases=[*method.search_aliases],
                inputs=preset_inputs(METHODS[method.name], method.presets, SHOWN),
                outputs=[
                    RecipeSocket.Output(display_name="recipe", tooltip="For Train or Compare Methods: how to learn.")
                ],
                hidden=[io.Hidden.unique_id],
            )

        @classmethod
        def validate_inputs(cls, preset: dict | None = None) -> bool | str:
            return valid_preset(method.name, METHODS[method.name], cls.hidden)

        @classmethod
        def fingerprint_inputs(cls, preset: dict | None = None, **others) -> str:
            return fingerprint(preset or {})

        @classmethod
        @checked
        def execute(cls, preset: dict | None = None, metric_models=None) -> io.NodeOutput:
            return io.NodeOutput(chosen(method.name, METHODS[method.name], preset, metric_models))

    Recipe.__doc__ = f"Settings of {method.name}."
    Recipe.__name__ = Recipe.__qualname__ = method.node_id.removeprefix("Personalize") + "Recipe"
    return Recipe


def preset_inputs(presets: dict, tooltip: str, shown: Collection[str] | None = None) -> list[io.Input]:
    """Return a choice among presets, each with widgets for its own settings, and the socket for those that measure.

    See `widgets` for `shown`.
    """
    options = [io.DynamicCombo.Option(name, widgets(settings, shown, SETTINGS)) for name, settings in presets.items()]
    measuring = any(field.name in SETTINGS for settings in presets.values() for field in fields(settings))
    return [
        io.DynamicCombo.Input("preset", options=options, tooltip=tooltip),
        *([metric_models_input()] if measuring else []),
    ]


def valid_preset(method: str, presets: dict, hidden) -> bool | str:
    """Return `True`, or the sentence that says why `chosen` will fail, for `validate_inputs`.

    What comes through links is not known yet; what is beyond a widget's limits the host refuses in its own words.
    """
    given = queued_inputs(hidden)
    preset = {name.removeprefix("preset."): value for name, value in given.items() if name.split(".")[0] == "preset"}
    if (name := preset.get("preset")) not in [*presets]:  # a client may send something else than text
        return True
    # A prompt whose preset was changed by hand still has the other's fields, which the host passes over.
    own = {"preset", *(field.name for field in fields(presets[name]))}
    preset = {field: value for field, value in preset.items() if field in own}
    linked = any(isinstance(value, list) for value in preset.values())
    if linked or not fits(preset_inputs(presets, "")[0], preset):
        return True
    make = described if "metric_models" in given else chosen
    return valid(lambda values: make(method, presets, values), preset)


def chosen(method: str, presets: dict, preset: dict | None, metric_models: ScorerConfig | None = None):
    """Return `described` settings, once what they need is found on this computer.

    Raises:
        ValueError: as `described` and `with_extractors`.
    """
    return with_extractors(described(method, presets, preset, metric_models))


def described(method: str, presets: dict, preset: dict | None, metric_models: ScorerConfig | None = None):
    """Return the settings that a preset's widgets describe, with the connected metric models.

    Raises:
        ValueError: the preset does not exist, its captions cannot be read, its optimizer is missing, or its settings
            contradict each other.
    """
    values = dict(preset or {})
    name = values.pop("preset", None)
    if name not in presets:
        raise ValueError(f"The preset of {method} does not exist: choose one of {', '.join(presets)}.")
    if values.get("captions") is not None:
        values["captions"] = captions_of(text_in_input(values["captions"], "captions", "caption"))
    settings = filled(presets[name], values | values_for(presets[name], metric_models))
    optimizers.check(getattr(settings, "optimizer", ""))  # monitors have none
    return settings


def with_extractors(settings):
    """Return a recipe's or a monitor's settings unchanged, once its metric models are found.

    Raises:
        ValueError: a metric model that they name cannot be found.
    """
    extractors.check(*extractor_configs(settings, ()))
    return settings


RECIPES = [recipe_node(method) for method in NODES]
