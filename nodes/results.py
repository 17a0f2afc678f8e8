"""Save: what was learned, as files for stock loaders."""

import os
import re

import folder_paths
from comfy_api.latest import io, ui
from safetensors.torch import save_file

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
    def execute(cls, result, name, overwrite) -> io.NodeOutput:
        name = name.strip()
        if not re.fullmatch(r"[\w-]{1,80}", name):
            raise ValueError(f"{name!r} cannot be a file name: use letters, digits, - and _ only.")
        lora, embedding = (_target(kind, name, overwrite) for kind in ("loras", "embeddings"))
        vectors = result.tokens[result.placeholder_token]
        save_file(result.lora, lora, metadata=result.metadata())
        # One tensor under the placeholder's name: the host takes the first tensor, diffusers also reads the name.
        save_file({result.placeholder_token: vectors[0]}, embedding, metadata=result.metadata())
        text = f"Saved {os.path.basename(lora)} in loras and in embeddings; write embedding:{name} in prompts."
        return io.NodeOutput(os.path.basename(lora), f"embedding:{name}", ui=ui.PreviewText(text))


def _target(kind: str, name: str, overwrite: bool) -> str:
    folder = folder_paths.get_folder_paths(kind)[0]
    path = os.path.join(folder, f"{name}.safetensors")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{name}.safetensors already exists in {kind}: choose another name, or switch overwrite on.")
    os.makedirs(folder, exist_ok=True)
    return path
