"""A run as data: what decides its result, and the digests that name its folder. It does not train (training.py)."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbones import Choice
from .data import Concept
from .models import Models
from .settings import decisive
from .stopping import Monitor

RUN_FORMAT = 1  # raised only when the same inputs give other results; part of every digest
NOT_WORDS = ("images", "masks", "class_images")  # of a concept


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a result, except the models themselves."""

    concept: Concept
    recipe: object  # a dataclass of hyperparameters with `stages` and `subject`
    stopper: tuple[Monitor, ...] = ()
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def settings(self) -> dict:
        """All but the pictures that decides what is learned, as JSON knows it."""
        words = {f.name: getattr(self.concept, f.name) for f in dataclasses.fields(Concept)}
        if not self.concept.class_captions:  # younger than the format: without them a digest is what it was
            words.pop("class_captions")
        settings = {
            "run_format": RUN_FORMAT,
            "method": type(self.recipe).__name__,
            "recipe": decisive(self.recipe),
            "concept": {name: value for name, value in words.items() if name not in NOT_WORDS},
            "seed": self.seed,
            "precision": str(self.dtype).removeprefix("torch."),
        }
        if self.stopper:  # a run without has the digest that it had before there were any
            settings["stopper"] = [{"monitor": monitor.name, **decisive(monitor)} for monitor in self.stopper]
        return json.loads(json.dumps(settings))

    def dataset(self) -> str:
        """Digest of the reference pictures and their masks, and of class pictures if there are any."""
        classes = self.concept.class_images
        own = [*self.concept.images, *(self.concept.masks or ())]
        return digest_of([*own, *classes], [f"{len(classes)} class pictures"] if classes else [])

    def digest(self, model: str) -> str:
        """16 hexadecimal digits that name the run's folder: same digest, same result.

        Args:
            model: a fingerprint of the weights it starts from, such as `fingerprint` gives.
        """
        return digest_of([], [json.dumps(self.settings(), sort_keys=True), self.dataset(), model])

    def lineage(self, model: str) -> str:
        """What runs share that differ in their number of steps alone; empty where a method has no such number.

        Empty, too, where a monitor returns another state than the last, from which nothing can go on.
        """
        if "steps" not in self.recipe.__dataclass_fields__ or any(m.keep != "last" for m in self.stopper):
            return ""
        endless = dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, steps=0))
        return "steps " + endless.digest(model)


def judges(recipe: object, stopper: Iterable[Monitor]) -> list[Choice]:
    """The backbones that a recipe and monitors ask: those of them that have some."""
    return [choice for part in (recipe, *stopper) for choice in getattr(part, "judges", ())]


def fingerprint(models: Models) -> str:
    """A digest of the weights that a run starts from, and of what was learned earlier in the graph."""
    words = [models.family.name, models.prediction_type, models.device.type]
    words += [str(encoder.layer) for encoder in models.text_encoders]
    tensors = [models.alphas_cumprod]
    for module in (models.unet, *models.text_encoders):
        tensors += [sampled(p) for p in module.parameters()]
    for encoder in models.text_encoders:
        words += encoder.known_tokens
        tensors += encoder.known_tokens.values()
        tensors += [] if encoder.fixed_outputs is None else [encoder.fixed_outputs]
    for placeholder, adapters in models.known_adapters.items():
        words += [placeholder, *adapters]
        tensors += adapters.values()
    return digest_of(tensors, words)


def starting_point(models: Models, device: torch.device) -> str:
    """A digest of what a run starts from and of the kind of device it runs on, whoever read the models, from where."""
    return digest_of([], [fingerprint(models), device.type])


@torch.no_grad()
def encoded_sample(models: Models) -> list[float]:
    """What the autoencoder, which is a function and has no weights to look at, makes of one small picture: 16 values.

    Two libraries give the same but for rounding; two autoencoders do not.
    """
    x, y = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(1, 0, 64), indexing="xy")
    mean, _ = models.encode_images(torch.stack([x, y, x * y])[None].to(models.device))
    return mean[0, :, ::4, ::4].flatten().tolist()


def sampled(weight: Tensor, runs: int = 4, length: int = 64) -> Tensor:
    """A few stretches of a weight: enough to tell two models apart, quick for billions of parameters."""
    flat = weight.detach().flatten()
    starts = torch.linspace(0, max(0, len(flat) - length), runs).long().tolist()
    return torch.cat([flat[start : start + length] for start in starts]).float()


def digest_of(tensors: Iterable[Tensor], words: Iterable[str] = ()) -> str:
    """16 hexadecimal digits of words and of the tensors' shapes and values, as float32."""
    sha = hashlib.sha256("\n".join(words).encode())
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
