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
