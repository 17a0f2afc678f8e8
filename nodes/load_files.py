"""Load Files: what this pack saved, and LoRAs and embeddings of other programs, as a RESULT."""

import os
import re
from functools import partial
from pathlib import Path

from comfy_api.latest import io
from safetensors import SafetensorError
from torch import Tensor

from ..trainers import files
from ..trainers.data.concept import check_word
from ..trainers.formats import foreign
from ..trainers.runs.result import RunResult, from_other_programs, read_complete
from ..trainers.text import quoted, reason
from ..trainers.training.trainables import check_placeholder
from .apply import EXACT, apply
from .host import folders, weights
from .host.models import family_of
from .host.session import notices
from .schema import checked, valid
from .sockets import CATEGORY, ResultSocket

NONE = "none"
KINDS = {"personalized": "personalize", "lora": "loras", "embedding": "embeddings"}  # input -> kind of folder


class LoadFiles(io.ComfyNode):
    """Files -> MODEL and CLIP that know what is in them, and a RESULT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05, "optional": True}
        return io.Schema(
            node_id="PersonalizeLoadFiles",
            display_name="Load Personalized Files",
            category=CATEGORY,
            description="Loads what Save Personalized wrote, or a LoRA and an embedding of another program.",
            search_aliases=["import", "load lora", "embedding", "textual inversion", "kohya", "diffusers", "peft"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Combo.Input(
                    "personalized", options=names("personalized"),
                    tooltip="A file of models/personalize: everything that a training learned.",
                ),
                io.Combo.Input(
                    "lora", options=names("lora"), optional=True,
                    tooltip="Instead: a LoRA of kohya's scripts, of diffusers or PEFT.",
                ),
                io.Combo.Input(
                    "embedding", options=names("embedding"), optional=True,
                    tooltip="Instead, or with the LoRA: an embedding of A1111 or diffusers, as safetensors.",
                ),
                io.String.Input(
                    "placeholder_token", default="<concept>", optional=True,
                    tooltip="The word that the embedding gets. A personalized file brings its own.",
                ),
                io.Float.Input("strength_unet", **strength, tooltip="Of what belongs to the U-Net."),
                io.Float.Input(
                    "strength_text_encoder", **strength,
                    tooltip="Of the text encoder's LoRA. The new word itself is always whole.",
                ),
                io.Boolean.Input("exact", default=False, advanced=True, optional=True, tooltip=EXACT),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                ResultSocket.Output(display_name="result"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, personalized: str | None = None, lora: str | None = None, embedding: str | None = None
    ) -> bool | str:
        """Instead of the host's own check, which knows the lists as they were."""
        chosen = {"personalized": personalized, "lora": lora, "embedding": embedding}
        answers = [valid(partial(path_of, name), value) for name, value in chosen.items()]
        return next((answer for answer in answers if answer is not True), True)

    @classmethod
    def fingerprint_inputs(
        cls, personalized: str = NONE, lora: str = NONE, embedding: str = NONE, **others
    ) -> list[float]:
        chosen = {"personalized": personalized, "lora": lora, "embedding": embedding}
        paths = [path_of(name, value) for name, value in chosen.items() if value is not None]
        return [os.path.getmtime(path) for path in paths if path]

    @classmethod
    @checked
    def execute(
        cls, model, clip, personalized, lora=NONE, embedding=NONE, placeholder_token="<concept>", strength_unet=1.0,
        strength_text_encoder=1.0, exact=False,
    ) -> io.NodeOutput:  # fmt: skip
        chosen = {"personalized": personalized, "lora": lora, "embedding": embedding}
        paths = {name: path for name, value in chosen.items() if (path := path_of(name, value or NONE))}
        result = read(paths, family_of(model, clip).text_encoders, clip, placeholder_token.strip())
        words = ", ".join(result.tokens) or "no word"
        notices(cls.hidden.unique_id)(f"{words}; {len(result.lora)} entries of a LoRA")
        return io.NodeOutput(*apply(model, clip, result, strength_unet, strength_text_encoder, exact), result)


def names(kind: str) -> list[str]:
    """What an input offers."""
    listed = folders.model_files(KINDS[kind])
    return [NONE, *(name for name in listed if name.endswith(".safetensors"))]


def path_of(kind: str, name: object) -> Path | None:
    """The file that an input names, within the host's folders of that kind.

    Raises:
        ValueError: there is none, or it is no safetensors file.
    """
    name = str(name)  # the host does not see to it that a choice is text
    if name == NONE:
        return None
    if not name.endswith(".safetensors"):
        raise ValueError(f"The file {quoted(name)} is no safetensors file: convert it, or choose another.")
    plain = "\0" not in name and ".." not in re.split(r"[\\/]", name)
    path = folders.model_file(KINDS[kind], name) if plain else None
    if path is None:
        raise ValueError(f"There is no file {quoted(name)} in {KINDS[kind]}: choose one of the list (press R).")
    return path


def read(paths: dict[str, Path], encoders: tuple[str, ...], clip, token: str) -> RunResult:
    """The RESULT that the chosen files make.

    Raises:
        ValueError: they cannot be read, or do not go together.
    """
    if not paths:
        raise ValueError("No file is chosen: choose a personalized file, or a LoRA, an embedding or both.")
    if "personalized" in paths and len(paths) > 1:
        raise ValueError("A personalized file brings its own LoRA and words: load other files in a node of their own.")
    contents = {kind: _contents(path) for kind, path in paths.items()}
    if "personalized" in contents:
        return read_complete(*contents["personalized"], paths["personalized"])
    lora = foreign.lora(*contents["lora"]) if "lora" in contents else {}
    vectors = ()
    if "embedding" in contents:
        check_word(token)
        check_placeholder(weights.tokenizer_of(clip, encoders[0]), token)
        vectors = foreign.embedding(contents["embedding"][0], _widths(clip, encoders))
    header = contents["lora"][1] if "lora" in contents else {}
    name = " + ".join(path.stem for path in paths.values())
    return from_other_programs(name, lora, header, token if vectors else "", vectors)


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return files.tensors(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The file {quoted(path.name)} cannot be read ({reason(error)}): download or save it again."
        ) from None


def _widths(clip, encoders: tuple[str, ...]) -> dict[str, int]:
    modules = {name: getattr(clip.cond_stage_model, name).transformer for name in encoders}
    return {name: module.get_input_embeddings().weight.shape[1] for name, module in modules.items()}
