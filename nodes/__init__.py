"""The nodes, as ComfyUI lists them. The only package that imports the host."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import Apply
from .evaluate import Evaluate
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
    """The pack."""

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        making = [LoadReferences, *RECIPES, Train]
        stopping = [DVARStopper, FixedStepsStopper, CLIPEarlyStoppingStopper, PickByScoreStopper]
        keeping = [Save, Apply, Load, Runs, LoadFiles]
        looking = [PromptList, ShowAttention, PlotHistory]
        evaluating = [Evaluate, ScoreImages, WriteReport]
        return [*making, *stopping, *keeping, *looking, *evaluating]
