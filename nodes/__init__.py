"""Lists the nodes for ComfyUI; no other package imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import Apply
from .evaluation.compare_methods import CompareMethods
from .evaluation.evaluate import Evaluate
from .evaluation.metric_models import MetricModels
from .evaluation.report import WriteReport
from .evaluation.score_images import ScoreImages
from .host import routes  # noqa: F401 - what the scripts in the editor ask for
from .join_concepts import JoinConcepts
from .load_files import LoadFiles
from .load_references import LoadReferences
from .plot_history import PlotHistory
from .prompt_list import PromptList
from .recipes import RECIPES
from .runs import Load, Runs
from .save import Save
from .show_attention import ShowAttention
from .stoppers import CLIPEarlyStoppingStopper, DVARStopper, FixedStepsStopper, PickByScoreStopper
from .train import Train


class Personalize(ComfyExtension):
    """ComfyUI's extension with all nodes of the pack."""

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        training = [LoadReferences, JoinConcepts, *RECIPES, Train]
        monitors = [DVARStopper, FixedStepsStopper, CLIPEarlyStoppingStopper, PickByScoreStopper]
        results = [Save, Apply, Load, Runs, LoadFiles]
        inspection = [PromptList, ShowAttention, PlotHistory]
        evaluation = [MetricModels, Evaluate, ScoreImages, WriteReport, CompareMethods]
        return [*training, *monitors, *results, *inspection, *evaluation]
