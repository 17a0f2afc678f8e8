"""Save Personalized: writes a result as files for stock loaders and for Load Personalized Files."""

import os
import re
from collections.abc import Callable
from functools import partial
from itertools import count

from comfy_api.latest import io, ui
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..trainers.evaluation.prompt_folders import is_name
from ..trainers.files import check_length, replaced
from ..trainers.formats import kohya
from ..trainers.formats.z_image import with_diffusers_names
from ..trainers.runs.result import complete
from ..trainers.text import quoted, reason, remedy
from .host import folders, weights
from .host.models import GraphModels
from .schema import checked, valid
from .sockets import CATEGORY, ResultSocket

KINDS = ("loras", "embeddings", "personalize", "checkpoints")  # of folders
WHOLE_MODEL = "Connect Train's model and clip, and the VAE, to also save a checkpoint, which any program loads."


class Save(io.ComfyNode):
    """Writes a RESULT as <name>.safetensors in models/loras, embeddings and personalize, its model in checkpoints."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeSave",
            display_name="Save Personalized",
            category=CATEGORY,
            description="Saves a LoRA for Load LoRA, an embedding for embedding:name in prompts, and a complete file.",
            search_aliases=["export", "save lora", "save embedding", "safetensors"],
            is_output_node=True,
            inputs=[
                ResultSocket.Input("result"),
                io.String.Input("name", default="my_subject", tooltip="Name of the files: letters, digits, - and _."),
                io.Boolean.Input(
                    "overwrite", default=False, advanced=True,
                    tooltip="Replace existing files of that name; off: the next free name, such as my_subject_2.",
                ),
                io.Boolean.Input(
                    "complete_file", default=True, optional=True, advanced=True,
                    tooltip="Also save everything that was learned in one file, for Load Personalized Files.",
                ),
                io.Model.Input("model", optional=True, tooltip=WHOLE_MODEL),
                io.Clip.Input("clip", optional=True, tooltip=WHOLE_MODEL),
                io.Vae.Input("vae", optional=True, tooltip=WHOLE_MODEL),
            ],
            outputs=[
                io.String.Output(display_name="lora name", tooltip="File name for Load LoRA; empty if there is none."),
                io.String.Output(
                    display_name="embedding",
                    tooltip="Text that stands for the subject in prompts, such as embedding:name.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Check the name before the training, not after it; a linked name is not known yet."""
        return valid(_file_name, name)

    @classmethod
    @checked
    def execute(
        cls, result, name, overwrite, complete_file=True, model=None, clip=None, vae=None
    ) -> io.NodeOutput:  # fmt: skip
        connected = [each is not None for each in (model, clip, vae)]
        graph = GraphModels.of(model, clip, vae) if all(connected) else None
        name, files, known = _named(result, _file_name(name), complete_file, overwrite, graph)
        for kind, (tensors, header) in files.items():
            if not known:
                _write(tensors(), _path(kind, name), header)
        lora = f"{name}.safetensors" if "loras" in files else ""
        embedding = f"embedding:{name}" if "embeddings" in files else ""
        return io.NodeOutput(lora, embedding, ui=ui.PreviewText(_sentence(result, name, [*files], any(connected))))


# What makes the tensors, and the header, by the kind of folder.
Files = dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, str]]]


def _named(
    result, name: str, complete_file: bool, overwrite: bool, graph: GraphModels | None
) -> tuple[str, Files, bool]:
    """Return the name to save under, its files, and whether they exist already.

    Without `overwrite` it is the first of name, name_2, name_3 ... that is free or holds this very result.
    """
    model = weights.fingerprint(graph) if graph else ""
    for number in count(1):
        numbered = name if number == 1 else f"{name}_{number}"
        files = _files(result, numbered, complete_file)
        if graph:
            header = result.metadata(numbered, kind="") | {"personalize_model": model}
            files["checkpoints"] = partial(weights.checkpoint, graph), header
        found = {kind: _header(_path(kind, numbered)) for kind in files}
        known = found == {kind: header for kind, (_, header) in files.items()}
        if overwrite or known or not any(header is not None for header in found.values()):
            return numbered, files, known and not overwrite


def _header(path: str) -> dict[str, str] | None:
    """Return a file's header; empty where it cannot be read, `None` where there is no file."""
    if not os.path.lexists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _files(result, name: str, complete_file: bool) -> Files:
    files, token = {}, result.placeholder_token
    if result.lora:
        files["loras"] = lambda: with_diffusers_names(result.lora), result.metadata(name)
    if token in result.tokens:
        embedding = kohya.embedding(token, result.tokens[token])
        files["embeddings"] = lambda: embedding, result.metadata(name, "textual-inversion")
    if complete_file:
        tensors, header = complete(result, name)
        files["personalize"] = lambda: tensors, header
    return files


def _sentence(result, name: str, kinds: list[str], wants_checkpoint: bool) -> str:
    where = " and ".join(f"in {kind}" for kind in kinds)
    use = f"; write embedding:{name} in prompts" if "embeddings" in kinds else "; no placeholder token was learned"
    lora = "" if "loras" in kinds else f", and no LoRA: {_instead(result, kinds)}"
    if wants_checkpoint and "checkpoints" not in kinds:
        use += "; no checkpoint, which needs model, clip and vae"
    elif "checkpoints" not in kinds and any(key.endswith(".diff") for key in result.lora):
        use += "; diffusers cannot read this LoRA's whole weights: connect model, clip and vae for a checkpoint"
    return (
        f"Saved {name}.safetensors {where}{lora}{use}."
        if kinds
        else "Nothing was saved: the result contains nothing that was learned."
    )


def _instead(result, kinds: list[str]) -> str:
    if not result.adapters:
        return "only token embeddings were learned"
    if "personalize" in kinds:
        return "the adapters are in personalize"
    return "switch complete_file on to save the adapters"


def _file_name(name: str) -> str:
    name = str(name).strip()
    if not re.fullmatch(r"[\w-]{1,60}", name):
        raise ValueError(f"{quoted(name)} cannot be a file name: use 1 to 60 letters, digits, - and _ only.")
    if not is_name(name):
        raise ValueError(f"{quoted(name)} is a device of Windows and cannot be a file name there: choose another one.")
    for kind in KINDS:
        check_length(_path(kind, name), f"the file {name}.safetensors in {kind}")
    return name


def _path(kind: str, name: str) -> str:
    return os.path.join(folders.model_folder(kind), f"{name}.safetensors")


def _write(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replaced(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        name = os.path.basename(path)
        raise RuntimeError(
            f"The file {name} cannot be written ({reason(error)}): {remedy(error)} and queue again."
        ) from error
