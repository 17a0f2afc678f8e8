"""Save: what was learned, as files for stock loaders and for Load Personalized Files."""

import os
import re

from comfy_api.latest import io, ui
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..trainers.files import replaced
from ..trainers.formats import kohya
from ..trainers.text import quoted, reason
from .host import folders
from .schema import checked, valid
from .sockets import CATEGORY, ResultSocket


class Save(io.ComfyNode):
    """RESULT -> <name>.safetensors in models/loras, models/embeddings and models/personalize."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeSave",
            display_name="Save Personalized",
            category=CATEGORY,
            description="Writes a LoRA for Load LoRA, an embedding for embedding:name in prompts, and all in one file.",
            is_output_node=True,
            inputs=[
                ResultSocket.Input("result"),
                io.String.Input("name", default="my_subject", tooltip="Letters, digits, - and _ ; also the file name."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace files of that name."),
                io.Boolean.Input(
                    "complete", default=True, optional=True,
                    tooltip="Also write one file with everything that was learned, for Load Personalized Files.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="lora name"),
                io.String.Output(display_name="embedding"),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """A name that cannot be one is known before the training, not after it; one that a link brings is not."""
        return valid(_file_name, name)

    @classmethod
    @checked
    def execute(cls, result, name, overwrite, complete=True) -> io.NodeOutput:
        name = _file_name(name)
        files = _files(result, name, complete)
        paths = {kind: _target(kind, name, overwrite) for kind in files}
        for kind, (tensors, header) in files.items():
            _write(tensors, paths[kind], header)
        lora = f"{name}.safetensors" if "loras" in files else ""
        embedding = f"embedding:{name}" if "embeddings" in files else ""
        return io.NodeOutput(lora, embedding, ui=ui.PreviewText(_sentence(result, name, [*files])))


def _files(result, name: str, complete: bool) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and header of each file, by the kind of folder."""
    files, token = {}, result.placeholder_token
    if result.lora:
        files["loras"] = result.lora, result.metadata(name)
    if token in result.tokens:
        words = kohya.embedding(token, result.tokens[token])
        files["embeddings"] = words, result.metadata(name, "textual-inversion")
    if complete:
        files["personalize"] = complete(result, name)
    return files


def _sentence(result, name: str, kinds: list[str]) -> str:
    where = " and ".join(f"in {kind}" for kind in kinds)
    use = f"; write embedding:{name} in prompts" if "embeddings" in kinds else "; there is no new word among it"
    lora = "" if "loras" in kinds else f", and no LoRA: {_instead(result, kinds)}"
    return f"Saved {name}.safetensors {where}{lora}{use}." if kinds else "Nothing was learned that could be saved."


def _instead(result, kinds: list[str]) -> str:
    if not result.adapters:
        return "nothing but words was learned"
    return "the adapters are in personalize" if "personalize" in kinds else "switch complete on to keep the adapters"


def _file_name(name: str) -> str:
    name = str(name).strip()
    if not re.fullmatch(r"[\w-]{1,60}", name):
        raise ValueError(f"{quoted(name)} cannot be a file name: use 1 to 60 letters, digits, - and _ only.")
    return name


def _target(kind: str, name: str, overwrite: bool) -> str:
    folder = folders.model_folder(kind)
    path = os.path.join(folder, f"{name}.safetensors")
    if os.path.exists(path) and not overwrite:
        raise ValueError(
            f"The file {name}.safetensors already exists in {kind}: choose another name, or switch overwrite on."
        )
    os.makedirs(folder, exist_ok=True)
    return path


def _write(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    try:
        with replaced(path) as beside:
            save_file(tensors, beside, metadata=metadata)
    except (OSError, SafetensorError) as error:
        name = os.path.basename(path)
        raise RuntimeError(
            f"The file {name} cannot be written ({reason(error)}): make room and queue again."
        ) from error
