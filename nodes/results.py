"""Save: what was learned, as files for stock loaders."""

import os
import re

import folder_paths
from comfy_api.latest import io, ui
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..trainers.files import replaced
from ..trainers.sentences import quoted, reason
from .schema import checked, valid
from .sockets import CATEGORY, ResultSocket


class Save(io.ComfyNode):
    """RESULT -> models/loras/<name>.safetensors and models/embeddings/<name>.safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeSave",
            display_name="Save Personalized",
            category=CATEGORY,
            description="Writes a LoRA for Load LoRA and an embedding for embedding:name in prompts.",
            is_output_node=True,
            inputs=[
                ResultSocket.Input("result"),
                io.String.Input("name", default="my_subject", tooltip="Letters, digits, - and _ ; also the file name."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace files of that name."),
            ],
            outputs=[
                io.String.Output(display_name="lora name"),
                io.String.Output(display_name="embedding"),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """A name that cannot be one is known before the training, not after it; one that a link brings is not."""
        return valid(_file_name, name)

    @classmethod
    @checked
    def execute(cls, result, name, overwrite) -> io.NodeOutput:
        name = _file_name(name)
        lora, embedding = (_target(kind, name, overwrite) for kind in ("loras", "embeddings"))
        vectors = result.tokens[result.placeholder_token]
        _write(result.lora, lora, result.metadata())
        # One tensor under the placeholder's name: the host takes the first tensor, diffusers also reads the name.
        _write({result.placeholder_token: vectors[0]}, embedding, result.metadata())
        text = f"Saved {os.path.basename(lora)} in loras and in embeddings; write embedding:{name} in prompts."
        return io.NodeOutput(os.path.basename(lora), f"embedding:{name}", ui=ui.PreviewText(text))


def _file_name(name: str) -> str:
    name = str(name).strip()
    if not re.fullmatch(r"[\w-]{1,60}", name):
        raise ValueError(f"{quoted(name)} cannot be a file name: use 1 to 60 letters, digits, - and _ only.")
    return name


def _target(kind: str, name: str, overwrite: bool) -> str:
    folder = folder_paths.get_folder_paths(kind)[0]
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
