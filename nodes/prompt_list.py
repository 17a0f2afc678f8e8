"""Prompt List: many prompts in one queue, and a folder for the pictures of each."""

from pathlib import Path

from comfy_api.latest import io

from ..trainers.data.prompts import prompts_of
from ..trainers.evaluation.prompt_folders import folder_names, folder_of, table
from ..trainers.files import replaced
from ..trainers.text import reason
from .host.folders import digest_of_text, inside_output, text_in_input
from .schema import checked, valid
from .sockets import CATEGORY

PROMPTS = "a photo of {}\na photo of {} on the beach\na photo of {} in the snow\nan oil painting of {}"


class PromptList(io.ComfyNode):
    """Lines of text -> a list of prompts and a list of file name prefixes; stock nodes work through both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePromptList",
            display_name="Prompt List",
            category=CATEGORY,
            description="Draws one prompt after the other in one queue, and gives each a folder for its pictures.",
            search_aliases=["prompts", "batch", "list", "text file", "folder per prompt"],
            inputs=[
                io.String.Input("prompts", default=PROMPTS, multiline=True, tooltip="One prompt per line."),
                io.String.Input(
                    "file",
                    default="",
                    tooltip="More prompts: a text file in the input folder, one per line; empty: none.",
                ),
                io.String.Input("subject", default="<concept>", tooltip="What {} stands for in prompts."),
                io.String.Input(
                    "prefix",
                    default="personalize/prompts",
                    tooltip="Where the prompts' folders and prompts.txt go, in the output folder.",
                ),
                io.Int.Input(
                    "first", default=0, min=0, max=10000, advanced=True, tooltip="Use only the first N; 0 = all."
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", is_output_list=True),
                io.String.Output(display_name="filename prefix", is_output_list=True),
                io.Int.Output(display_name="count"),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts=None, file=None, subject=None, prefix=None) -> bool | str:
        """What can be known before the graph runs: a training may stand before this node."""
        if (answer := valid(_folder, prefix)) is not True:
            return answer
        known = None if prompts is None or file is None else (prompts, file, "any" if subject is None else subject)
        return valid(lambda given: prompts_of(_text(*given[:2]), given[2]), known)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others) -> str:
        """The file's lines may change while its name stays."""
        return digest_of_text(file or "")

    @classmethod
    @checked
    def execute(cls, prompts, file, subject, prefix, first) -> io.NodeOutput:
        texts, prefix = prompts_of(_text(prompts, file), subject, first), folder_of(prefix)
        folders = folder_names(texts)
        _write(_folder(prefix) / "prompts.txt", table(texts, folders))
        return io.NodeOutput(texts, [f"{prefix}/{folder}/image" for folder in folders], len(texts))


def _folder(prefix: str) -> Path:
    return Path(inside_output(folder_of(prefix)))


def _text(prompts: str, file: str) -> str:
    return f"{prompts}\n{text_in_input(file, 'prompts', 'prompt')}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RuntimeError(
            f"The file {path.name} cannot be written ({reason(error)}): make room, or choose another prefix."
        ) from error
