"""Lists the nodes for ComfyUI; no other package imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import Apply
from .evaluate import Evaluate
from .host import routes  # noqa: F401 - what the scripts in the editor ask for
from .load_files import LoadFiles
from .load_references import LoadReferences
from .plot_history import PlotHistory
from .prompt_list import PromptList
from .recipes import RECIPES
from .report import WriteReport
from .runs import Load, Runs
from .save import Save
from .score_images import ScoreImages
from .show_attention import ShowAttention
from .stoppers import CLIPEarlyStoppingStopper, DVARStopper, FixedStepsStopper, PickByScoreStopper
from .train import Train


class Personalize(ComfyExtension):
    """ComfyUI's extension with all nodes of the pack."""

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        training = [LoadReferences, *RECIPES, Train]
        monitors = [DVARStopper, FixedStepsStopper, CLIPEarlyStoppingStopper, PickByScoreStopper]
        results = [Save, Apply, Load, Runs, LoadFiles]
        inspection = [PromptList, ShowAttention, PlotHistory]
        evaluation = [Evaluate, ScoreImages, WriteReport]
        return [*training, *monitors, *results, *inspection, *evaluation]
