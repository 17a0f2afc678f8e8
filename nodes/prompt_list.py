"""Prompt List: many prompts in one queue, and a folder for the images of each."""

from pathlib import Path

from comfy_api.latest import io

from ..trainers.data.prompts import prompts_of
from ..trainers.evaluation.prompt_folders import folder_names, folder_of, table
from ..trainers.files import replaced
from ..trainers.text import reason, remedy
from .host.folders import fingerprint, inside_output, text_in_input
from .schema import checked, valid
from .sockets import EVALUATION_FOLDER

PROMPTS = "a photo of {}\na photo of {} on the beach\na photo of {} in the snow\nan oil painting of {}"


class PromptList(io.ComfyNode):
    """Turns lines of text into a list of prompts and a list of filename prefixes for stock nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePromptList",
            display_name="Prompt List",
            category=EVALUATION_FOLDER,
            description="Runs many prompts in one queue, and gives each a folder for its images.",
            search_aliases=["prompts", "batch", "list", "text file", "folder per prompt"],
            inputs=[
                io.String.Input(
                    "prompts", default=PROMPTS, multiline=True, tooltip="Prompts, one per line; {} is the subject."
                ),
                io.String.Input(
                    "prompt_file",
                    default="",
                    tooltip="Text file in the input folder with more prompts, one per line; empty: none.",
                ),
                io.String.Input(
                    "subject",
                    default="<concept>",
                    tooltip="Text that replaces {} in the prompts, such as the placeholder token.",
                ),
                io.String.Input(
                    "prefix",
                    default="personalize/prompts",
                    tooltip="Folder inside the output folder for the prompts' folders and prompts.txt.",
                ),
                io.Int.Input(
                    "max_prompts",
                    default=0,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Use only the first N prompts; 0 = all.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompt",
                    tooltip="The prompts, one after the other, with the subject in them.",
                    is_output_list=True,
                ),
                io.String.Output(
                    display_name="filename prefix", tooltip="For Save Image: a folder per prompt.", is_output_list=True
                ),
                io.Int.Output(display_name="count", tooltip="Number of prompts."),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts=None, prompt_file=None, subject=None, prefix=None) -> bool | str:
        """Check what is known before the graph runs, which may train for hours before it reaches this node."""
        if (answer := valid(_folder, prefix)) is not True:
            return answer
        subject = "any" if subject is None else subject
        widgets = None if prompts is None or prompt_file is None else (prompts, prompt_file)
        return valid(lambda given: prompts_of(_text(*given), subject), widgets)

    @classmethod
    def fingerprint_inputs(cls, prompt_file: str | None = "", **others) -> str:
        return fingerprint({"prompt_file": prompt_file})

    @classmethod
    @checked
    def execute(cls, prompts, prompt_file, subject, prefix, max_prompts) -> io.NodeOutput:
        texts, prefix = prompts_of(_text(prompts, prompt_file), subject, max_prompts), folder_of(prefix)
        folders = folder_names(texts)
        _write(_folder(prefix) / "prompts.txt", table(texts, folders))
        return io.NodeOutput(texts, [f"{prefix}/{folder}/image" for folder in folders], len(texts))


def _folder(prefix: str) -> Path:
    return Path(inside_output(folder_of(prefix)))


def _text(prompts: str, prompt_file: str) -> str:
    return f"{prompts}\n{text_in_input(prompt_file, 'prompts', 'prompt')}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RuntimeError(
            f"The file {path.name} cannot be written ({reason(error)}): {remedy(error)}, or choose another prefix."
        ) from error
