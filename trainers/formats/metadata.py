"""Headers of files, in the keys of sd-scripts (`ss_`) and of modelspec, which LoRA browsers read.

Every value is a string, as a safetensors header requires. There are no epochs here, and no times, because a run may
have been resumed.
"""

import json
from typing import Protocol

from torch import Tensor

from ..models.diffusion import Models

# By family: sd-scripts' version of the base model and modelspec's architecture, for epsilon and for v prediction.
BASES = {
    "SD 1.x": {"epsilon": ("sd_v1", "stable-diffusion-v1"), "v_prediction": ("sd_v1_v", "stable-diffusion-v1")},
    "SD 2.x": {
        "epsilon": ("sd_v2", "stable-diffusion-v2-512"),
        "v_prediction": ("sd_v2_v", "stable-diffusion-v2-768-v"),
    },
    "Flux.1": {"flow": ("flux1", "flux-1")},
    "SD 3": {"flow": ("sd3", "stable-diffusion-3")},
    "Lumina Image 2": {"flow": ("lumina2", "lumina-2")},
    "SDXL": dict.fromkeys(("epsilon", "v_prediction"), ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")),
}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # modelspec's names
PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
# A recipe's field -> sd-scripts' name of it.
FIELDS = {
    "learning_rate": "ss_learning_rate",
    "steps": "ss_max_train_steps",
    "batch_size": "ss_total_batch_size",
    "max_grad_norm": "ss_max_grad_norm",
    "lr_scheduler": "ss_lr_scheduler",
    "lr_warmup_steps": "ss_lr_warmup_steps",
    "noise_offset": "ss_noise_offset",
    "prior_weight": "ss_prior_loss_weight",
}
# A recipe's field -> the layers it holds for, and sd-scripts' name where such layers were trained.
LAYER_FIELDS = {
    "lora_learning_rate": ("lora_te", "ss_text_encoder_lr"),
    "unet_lora_learning_rate": ("lora_unet_", "ss_unet_lr"),
}
# A recipe's choice of optimizer -> sd-scripts' name of it.
OPTIMIZERS = {
    "adamw": "torch.optim.adamw.AdamW",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "prodigy": "prodigyopt.prodigy.Prodigy",
}


class Described(Protocol):
    """A training as `describe` reads it; `runs.result.RunResult` is one."""

    @property
    def settings(self) -> dict: ...

    @property
    def origin(self) -> dict[str, str]: ...

    @property
    def lora(self) -> dict[str, Tensor]: ...

    @property
    def tokens(self) -> dict[str, tuple[Tensor, ...]]: ...

    @property
    def history(self) -> list[dict]: ...

    @property
    def steps(self) -> int: ...

    @property
    def placeholder_token(self) -> str: ...


def origin(models: Models, subject: str, images: int, size: int) -> dict[str, str]:
    """Return facts of a run's begin that are not settings: the base model, the images, the layer that is read.

    Args:
        subject: how prompts write the subject, with the class word if it is learned with it.
        images: number of reference images.
        size: side of the square training images in pixels.
    """
    layer = models.text_encoders[0].layer if models.text_encoders else models.family.layer
    usual = layer == models.family.layer
    facts = {
        "ss_num_train_images": str(images),
        "ss_resolution": str((size, size)),
        "modelspec.trigger_phrase": subject,
        "ss_clip_skip": "None" if usual else str(-(layer or -1)),
        "modelspec.resolution": f"{size}x{size}",
    }
    if models.prediction_type in PREDICTIONS:
        facts["modelspec.prediction_type"] = PREDICTIONS[models.prediction_type]
    if models.family.name in BASES:
        version, architecture = BASES[models.family.name][models.prediction_type]
        facts |= {"ss_base_model_version": version, "modelspec.architecture": architecture}
        facts |= {"ss_v2": str(version.startswith("sd_v2"))}
    return facts


def describe(result: Described, name: str, kind: str) -> dict[str, str]:
    """Return the header of a file.

    Args:
        name: of the file, without its ending; empty for a run's own files.
        kind: "lora" or "textual-inversion", as modelspec calls it; empty for a whole model.
    """
    facts = {**_settings(result), **(_network(result) if kind == "lora" else {}), **result.origin}
    if result.history:
        facts["ss_steps"] = str(result.steps)
    if result.placeholder_token in result.tokens:
        facts.setdefault("modelspec.trigger_phrase", result.placeholder_token)
    if kind and "modelspec.architecture" in facts:
        facts |= {"modelspec.architecture": f"{facts['modelspec.architecture']}/{kind}"}
    title = f"{result.placeholder_token} ({result.settings['method']})".strip()
    facts |= {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": title}
    return facts | ({"ss_output_name": name} if name else {})


def _settings(result: Described) -> dict[str, str]:
    settings, recipe = result.settings, result.settings.get("recipe", {})
    facts = {ours: str(recipe[field]) for field, ours in FIELDS.items() if field in recipe}
    for field, (prefix, ours) in LAYER_FIELDS.items():
        if field in recipe and any(key.startswith(prefix) for key in result.lora):
            facts[ours] = str(recipe[field])
    if "weight_decay" in recipe:
        name = OPTIMIZERS[recipe.get("optimizer", "adamw")]
        facts["ss_optimizer"] = f"{name}(weight_decay={recipe['weight_decay']})"
    if recipe and result.origin.get("ss_num_train_images", "").isdigit():
        count = int(result.origin["ss_num_train_images"])
        phrase = result.origin.get("modelspec.trigger_phrase", result.placeholder_token)
        folder = f"1_{phrase}"  # sd-scripts' name of a folder: repeats, then the words of its images
        facts["ss_tag_frequency"] = json.dumps({folder: {phrase: count}})
        facts["ss_dataset_dirs"] = json.dumps({folder: {"n_repeats": 1, "img_count": count}})
    if "seed" in settings:
        facts["ss_seed"] = str(settings["seed"])
    if settings.get("precision") in PRECISIONS:
        facts["ss_mixed_precision"] = PRECISIONS[settings["precision"]]
    return facts


def _network(result: Described) -> dict[str, str]:
    ranks = [len(value) for key, value in result.lora.items() if key.endswith(".lora_down.weight")]
    alphas = [float(value) for key, value in result.lora.items() if key.endswith(".alpha")]
    if not ranks and result.lora:  # whole weights, which sd-scripts knows as a network of LyCORIS
        return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "full"})}
    if not ranks:
        return {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(alphas, default=max(ranks))),
    }
