"""Metric Models: the models that evaluations and monitors measure with, and how they compare, chosen once for all."""

from dataclasses import fields

from comfy_api.latest import io

from ...trainers.evaluation.scorer import ScorerConfig
from ..host.folders import fingerprint
from ..host.session import extractors
from ..schema import checked, filled, widgets
from ..sockets import EVALUATION_FOLDER, MetricModelsSocket

DEFAULTS = ScorerConfig()
SETTINGS = tuple(field.name for field in fields(ScorerConfig))
SHOWN = ("clip_model", "clip_download", "dino_model", "dino_download")  # without opening the advanced settings


class MetricModels(io.ComfyNode):
    """Settings of the metric models; the nodes that use them check those that they use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeMetricModels",
            display_name="Metric Models",
            category=EVALUATION_FOLDER,
            description="Chooses the models that measure identity, text alignment and diversity.",
            search_aliases=["clip score", "clip-t", "clip-i", "dino", "lpips", "metrics", "feature extractor"],
            inputs=widgets(DEFAULTS, SHOWN),
            outputs=[
                MetricModelsSocket.Output(
                    display_name="metric_models",
                    tooltip="For Evaluate, Score Images, Compare Methods, Pick by Score and CLIP Early Stopping.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **values) -> str:
        return fingerprint(values)

    @classmethod
    @checked
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(filled(DEFAULTS, settings))


def metric_models_input() -> io.Input:
    """Return the socket of a node that measures with metric models."""
    return MetricModelsSocket.Input(
        "metric_models", optional=True,
        tooltip="Models that measure; unconnected: the defaults of Metric Models, if their files are on this computer.",
    )  # fmt: skip


def used(metric_models: ScorerConfig | None) -> ScorerConfig:
    """Return the connected metric models, or the defaults, checked as far as names and folders tell.

    Raises:
        ValueError: one of them cannot be found.
    """
    config = metric_models or DEFAULTS
    config.check(extractors)
    return config


def values_for(settings, metric_models: ScorerConfig | None) -> dict:
    """Return the settings of connected metric models that a dataclass of settings, or its class, has as well."""
    names = [field.name for field in fields(settings) if field.name in SETTINGS] if metric_models else []
    return {name: getattr(metric_models, name) for name in names}
