"""Load Personalized and Runs: use, list and delete earlier trainings in output/personalize/runs."""

import time

from comfy_api.latest import io, ui

from ..trainers.runs.pick import picked
from ..trainers.stopping.pick_by_score import PickByScore
from ..trainers.text import reason, remedy, size_of
from .apply import FULL_PRECISION, apply
from .host.run_list import cache_size, find, folders, label, labels
from .host.session import notices
from .schema import checked, valid
from .sockets import CATEGORY, learned_outputs, result_output


class Load(io.ComfyNode):
    """Restores an earlier run: MODEL and CLIP as its training returned them, and its RESULT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoad",
            display_name="Load Personalized",
            category=CATEGORY,
            description="Restores the result of an earlier training, without its images and without training again.",
            search_aliases=["restore", "run", "load lora", "checkpoint"],
            inputs=[
                io.Model.Input("model", tooltip="Model that the run was trained on, or another of its family."),
                io.Clip.Input("clip"),
                io.Combo.Input(
                    "run", options=labels(), tooltip="Run to restore, the newest first; interrupted runs work, too."
                ),
                io.Boolean.Input("full_precision", default=False, advanced=True, optional=True, tooltip=FULL_PRECISION),
                io.Float.Input(
                    "text_weight", default=PickByScore.text_weight, min=0.0, max=1.0, step=0.01, optional=True,
                    display_mode=io.NumberDisplay.slider, advanced=True,
                    tooltip="For runs with Pick by Score: 0 loads the state with the highest identity, 1 the one with "
                    "the highest text alignment.",
                ),
            ],
            outputs=[
                *learned_outputs(),
                result_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, run: str | None = None) -> bool | str:
        """Check the digest; the host's own check compares the whole line, which changes when the run ends."""
        return valid(find, run)

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None, **others) -> float:
        return time.time() if run is None else (find(run).path / "run.json").stat().st_mtime

    @classmethod
    @checked
    def execute(cls, model, clip, run, full_precision=False, text_weight=PickByScore.text_weight) -> io.NodeOutput:
        folder = find(run)
        result = folder.result(partial=True)
        if result is None:
            raise ValueError(
                f"The run {folder.path.name} has no result that can be loaded: queue its training again, or delete it."
            )
        result = picked(result, text_weight)
        notices(cls.hidden.unique_id)(f"{result.placeholder_token}: {result.stop_reason}")
        return io.NodeOutput(*apply(model, clip, result, in_full_precision=full_precision), result)


class Runs(io.ComfyNode):
    """Lists the runs with their sizes, and deletes one if asked to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeRuns",
            display_name="Runs",
            category=CATEGORY,
            description="Shows the trainings on disk, to be named and deleted.",
            search_aliases=["delete", "disk space", "clean up", "trainings"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "action", options=["list", "delete"], tooltip="List all runs, or delete the run below permanently."
                ),
                io.Combo.Input("run", options=labels(), tooltip="Run to delete, the newest first."),
            ],
            outputs=[io.String.Output(display_name="runs", tooltip="The list as text.")],
        )

    @classmethod
    def validate_inputs(cls, action: str | None = None, run: str | None = None) -> bool | str:
        return valid(find, run) if action == "delete" else True

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return time.time()  # the disk changes without the graph

    @classmethod
    @checked
    def execute(cls, action, run) -> io.NodeOutput:
        lines = []
        if action == "delete":
            folder = find(run)
            try:
                folder.delete()
            except OSError as error:
                raise RuntimeError(
                    f"The run {folder.path.name} cannot be deleted ({reason(error)}): {remedy(error)} and queue again."
                ) from error
            lines.append(f"Deleted {run}.")
        sizes = [(label(folder, folder.info()), folder.size()) for folder in folders()]
        lines += [f"{size_of(size):>10}  {name}" for name, size in sizes]
        cache = f"cache {size_of(cache_size())}"
        lines.append(f"{len(sizes)} runs, {size_of(sum(size for _, size in sizes))}; {cache}")
        return io.NodeOutput("\n".join(lines), ui=ui.PreviewText("\n".join(lines)))
