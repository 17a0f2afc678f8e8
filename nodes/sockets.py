"""Defines the pack's own socket types; their names are part of every saved workflow and never change."""

from comfy_api.latest import io

CATEGORY = "Personalize"  # folders of the editor's list of nodes
METHOD_FOLDER, STOPPING_FOLDER, EVALUATION_FOLDER = (
    f"{CATEGORY}/{folder}" for folder in ("methods", "early stopping", "evaluation")
)
ConceptSocket = io.Custom("PERSONALIZE_CONCEPT")
RecipeSocket = io.Custom("PERSONALIZE_RECIPE")
StopperSocket = io.Custom("PERSONALIZE_STOPPER")
ResultSocket = io.Custom("PERSONALIZE_RESULT")
MetricModelsSocket = io.Custom("PERSONALIZE_METRIC_MODELS")
ReportSocket = io.Custom("PERSONALIZE_REPORT")


def learned_outputs() -> list[io.Output]:
    """Return the outputs of a node that applies what was learned."""
    return [
        io.Model.Output(display_name="model", tooltip="Model that has learned your subject."),
        io.Clip.Output(
            display_name="clip", tooltip="Text encoder that knows the placeholder token: encode prompts with it."
        ),
    ]


def result_output() -> io.Output:
    """Return the output of what was learned."""
    return ResultSocket.Output(display_name="result", tooltip="What was learned, for Save, Apply and Plot History.")


def stopper_output() -> io.Output:
    """Return the output of a monitor's node."""
    return StopperSocket.Output(display_name="stopper", tooltip="For Train, or for another monitor.")
