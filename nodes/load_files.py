"""Load Personalized Files: reads this pack's files, and other programs' LoRAs, embeddings and folders, as a RESULT."""

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
from ..trainers.text import quoted, reason, text_of
from ..trainers.training.trainables import check_placeholder
from . import diffusers_folder
from .apply import FULL_PRECISION, apply
from .host import folders, weights
from .host.models import family_of
from .host.session import notices
from .schema import checked, valid
from .sockets import CATEGORY, learned_outputs, result_output

NONE = "none"
KINDS = {"personalized": "personalize", "lora": "loras", "embedding": "embeddings"}  # input -> kind of folder


class LoadFiles(io.ComfyNode):
    """Turns files into a MODEL and a CLIP with their contents applied, and a RESULT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05, "optional": True}
        return io.Schema(
            node_id="PersonalizeLoadFiles",
            display_name="Load Personalized Files",
            category=CATEGORY,
            description="Loads a file that Save Personalized wrote, or a LoRA and an embedding of another program.",
            search_aliases=["import", "load lora", "embedding", "textual inversion", "kohya", "diffusers", "peft"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Combo.Input(
                    "personalized", options=names("personalized"),
                    tooltip="File in models/personalize, with everything that a training learned.",
                ),
                io.Combo.Input(
                    "lora", options=names("lora"), optional=True,
                    tooltip="LoRA of kohya's scripts, diffusers or PEFT, to load instead.",
                ),
                io.Combo.Input(
                    "embedding", options=names("embedding"), optional=True,
                    tooltip="Embedding of A1111 or diffusers, as safetensors, to load alone or with the LoRA.",
                ),
                io.String.Input(
                    "placeholder_token", default="<concept>", optional=True,
                    tooltip="Placeholder token for the embedding; a personalized file brings its own.",
                ),
                io.Float.Input("strength_unet", **strength, tooltip="Strength of the U-Net's part."),
                io.Float.Input(
                    "strength_text_encoder", **strength,
                    tooltip="Strength of the text encoder's part; the token embedding is always applied in full.",
                ),
                io.Boolean.Input("full_precision", default=False, advanced=True, optional=True, tooltip=FULL_PRECISION),
                io.Combo.Input(
                    "diffusers", options=names("diffusers"), optional=True,
                    tooltip="Folder in models/diffusers of a model that was trained from this one, to load instead.",
                ),
            ],
            outputs=[
                *learned_outputs(),
                result_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, personalized: str | None = None, lora: str | None = None, embedding: str | None = None,
        diffusers: str | None = None,
    ) -> bool | str:  # fmt: skip
        """Check the files as they are now; the host's own check compares with an earlier list."""
        chosen = {"personalized": personalized, "lora": lora, "embedding": embedding, "diffusers": diffusers}
        answers = [valid(partial(path_of, name), value) for name, value in chosen.items()]
        return next((answer for answer in answers if answer is not True), True)

    @classmethod
    def fingerprint_inputs(
        cls, personalized: str = NONE, lora: str = NONE, embedding: str = NONE, diffusers: str = NONE, **others
    ) -> str:
        chosen = {"personalized": personalized, "lora": lora, "embedding": embedding, "diffusers": diffusers}
        paths = [path for name, value in chosen.items() if value is not None and (path := path_of(name, value))]
        paths = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*/*")))]
        return folders.digest_of_files(*paths, *filter(Path.is_file, map(_adapter_config, paths)))

    @classmethod
    @checked
    def execute(
        cls, model, clip, personalized, lora=NONE, embedding=NONE, placeholder_token="<concept>", strength_unet=1.0,
        strength_text_encoder=1.0, full_precision=False, diffusers=NONE,
    ) -> io.NodeOutput:  # fmt: skip
        chosen = {"personalized": personalized, "lora": lora, "embedding": embedding, "diffusers": diffusers}
        paths = {name: path for name, value in chosen.items() if (path := path_of(name, value or NONE))}
        encoders = family_of(model, clip).text_encoders
        if paths.keys() == {"diffusers"}:
            result = diffusers_folder.read(paths["diffusers"], model, clip, encoders)
        else:
            result = read(paths, encoders, clip, placeholder_token.strip())
        tokens = ", ".join(result.tokens) or "no placeholder token"
        zero = ", all zero, so that it changes nothing" if result.lora and _is_zero(result.lora) else ""
        notices(cls.hidden.unique_id)(f"{tokens}; {len(result.lora)} LoRA tensors{zero}")
        return io.NodeOutput(*apply(model, clip, result, strength_unet, strength_text_encoder, full_precision), result)


def _is_zero(lora: dict[str, Tensor]) -> bool:
    """Return whether a LoRA adds nothing anywhere, as of a training that learned nothing."""
    return not any(tensor.any() for key, tensor in lora.items() if not key.endswith((".lora_down.weight", ".alpha")))


def names(kind: str) -> list[str]:
    """Return the names of files, or of folders, that an input offers."""
    if kind == "diffusers":
        return [NONE, *sorted(folders.diffusers_folders())]
    listed = folders.model_files(KINDS[kind])
    return [NONE, *(name for name in listed if name.endswith(".safetensors"))]


def path_of(kind: str, name: object) -> Path | None:
    """Return the file or folder that an input names, within the host's folders; `None` where none is chosen.

    Raises:
        ValueError: it does not exist, or is not a safetensors file.
    """
    name = str(name)  # the host does not see to it that a choice is text
    if name == NONE:
        return None
    if kind == "diffusers":
        if name not in (known := folders.diffusers_folders()):
            raise ValueError(
                f"There is no folder {quoted(name)} with unet/*.safetensors in models/diffusers: choose one from the "
                "list (press R to refresh it)."
            )
        return known[name]
    if not name.endswith(".safetensors"):
        raise ValueError(f"The file {quoted(name)} is not a safetensors file: convert it, or choose another.")
    plain = "\0" not in name and ".." not in re.split(r"[\\/]", name)
    path = folders.model_file(KINDS[kind], name) if plain else None
    if path is None:
        raise ValueError(
            f"There is no file {quoted(name)} in {KINDS[kind]}: choose one from the list (press R to refresh it)."
        )
    return path


def read(paths: dict[str, Path], encoders: tuple[str, ...], clip, token: str) -> RunResult:
    """Return the RESULT of the chosen files.

    Raises:
        ValueError: they cannot be read, or cannot be combined.
    """
    if not paths:
        raise ValueError("No file is chosen: choose a personalized file, or a LoRA, an embedding or both.")
    for kind, what in (("personalized", "personalized file"), ("diffusers", "diffusers folder")):
        if kind in paths and len(paths) > 1:
            raise ValueError(f"A {what} cannot be combined with a LoRA or an embedding: load those with another node.")
    contents = {kind: _contents(path) for kind, path in paths.items()}
    if "personalized" in contents:
        return read_complete(*contents["personalized"], paths["personalized"])
    embeddings = {token: contents["embedding"][0]} if "embedding" in contents else {}
    lora, header = {}, {}
    if "lora" in contents:
        tensors, header = contents["lora"]
        tensors, bundled = foreign.unbundled(tensors)
        lora = foreign.lora(tensors, header, _settings(paths["lora"])) if tensors or not bundled else {}
        embeddings = embeddings | {word: bundled[word] for word in bundled.keys() - embeddings.keys()}
    tokens = {}
    if embeddings and not encoders:
        raise ValueError(
            "This model's text encoders read no embedding: load it with a model of SD 1.x, SD 2.x or SDXL."
        )
    for word, state in embeddings.items():
        check_word(word)
        check_placeholder(weights.tokenizer_of(clip, encoders[0]), word)
        tokens[word] = foreign.embedding(state, _widths(clip, encoders))
    return from_other_programs(" + ".join(path.stem for path in paths.values()), lora, header, tokens)


def _adapter_config(path: Path) -> Path:
    """Return the settings that PEFT writes next to a LoRA."""
    return path.with_name("adapter_config.json")


def _settings(path: Path) -> str:
    config = _adapter_config(path)
    return text_of(config, f"The file {quoted(config.name)}", "download it again") if config.is_file() else ""


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, header = files.tensors(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The file {quoted(path.name)} cannot be read ({reason(error)}): download or save it again."
        ) from None
    if name := next((name for name, tensor in tensors.items() if not tensor.float().isfinite().all()), ""):
        raise ValueError(
            f"The file {quoted(path.name)} has NaN or infinite values in {quoted(name)}: download or save it again."
        )
    return tensors, header


def _widths(clip, encoders: tuple[str, ...]) -> dict[str, int]:
    modules = {name: getattr(clip.cond_stage_model, name).transformer for name in encoders}
    return {name: module.get_input_embeddings().weight.shape[1] for name, module in modules.items()}
