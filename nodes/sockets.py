"""The pack's own socket types. Their names are part of every saved workflow: they never change."""

from comfy_api.latest import io

CATEGORY = "Personalize"
ConceptSocket = io.Custom("PERSONALIZE_CONCEPT")
RecipeSocket = io.Custom("PERSONALIZE_RECIPE")
StopperSocket = io.Custom("PERSONALIZE_STOPPER")
ResultSocket = io.Custom("PERSONALIZE_RESULT")
ReportSocket = io.Custom("PERSONALIZE_REPORT")
