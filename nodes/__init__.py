"""The nodes, as ComfyUI lists them. The only package that imports the host."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import Apply
from .attention import ShowAttention
from .concept import LoadReferences
from .evaluate import Evaluate
from .files import LoadFiles
from .history import PlotHistory
from .prompts import PromptList
from .recipes import RECIPES
from .reports import WriteReport
from .results import Save
from .runs import Load, Runs
from .score_images import ScoreImages
from .stopping import CLIPEarlyStoppingStopper, DVARStopper, FixedStepsStopper, PickByScoreStopper
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
