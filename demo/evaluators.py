"""The demo world's two metric models: a small open_clip model (CLIP-T, CLIP-I) and an instance encoder (identity).

Both are ordinary models for the code that loads real ones, trainers/metrics/: this file tells open_clip and timm
their architectures, writes the token rows that are not stored, and adds what only the drawn world can have: probes
that read an individual's details, and identity split into what captions can name and what they never do. Trained by
train_evaluators.py.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .world import COLOURS, EXTRAS, PATTERNS, SUBJECTS, Instance

# "demo" and "trainers" are top-level packages on the command line and parts of the pack inside a host.
TRAINERS = __package__.removesuffix("demo") + "trainers."
feature_extractors = import_module(TRAINERS + "metrics.feature_extractors")
metrics = import_module(TRAINERS + "metrics.metrics")

WEIGHTS = Path(__file__).parent / "weights"
CLIP_NAME, CLIP_CONFIG = "demo_world_clip", Path(__file__).parent / "demo_world_clip.json"
ENCODER_NAME, FEATURES, PARTS = "demo_world_instance", 256, 128
ROWS = "token_embedding.weight"
# What the probes read, and the answers they choose from.
ATTRIBUTES = {
    "subject": SUBJECTS,
    "colour": tuple(COLOURS),
    "second": tuple(COLOURS),
    "pattern": PATTERNS,
    "extra": EXTRAS,
    "extra_colour": tuple(COLOURS),
    "period": (2, 3),
}


def register():
    """Make both architectures known to timm and open_clip.

    For the demo, the tests and the benchmarks; never for users.
    """
    import open_clip

    from . import evaluator_models  # noqa: F401  (registers with timm when first imported)

    if CLIP_NAME not in open_clip.list_models():
        open_clip.add_model_config(CLIP_CONFIG)


def visible(thing: Instance, attribute: str) -> bool:
    """Whether an image of the individual can show the attribute at all."""
    if attribute == "extra_colour":
        return thing.extra != "none"
    return attribute != "period" or thing.pattern != "plain"


class Heads(nn.Module):
    """Linear readings of the instance encoder's features: one probe per attribute, and the two parts of identity."""

    def __init__(self):
        super().__init__()
        self.named = nn.Linear(FEATURES, PARTS)
        self.unnamed = nn.Linear(FEATURES, PARTS)
        self.probes = nn.ModuleDict({name: nn.Linear(FEATURES, len(answers)) for name, answers in ATTRIBUTES.items()})


def expand_clip(packed: Path, full: Path) -> Path:
    """Write the file that open_clip loads.

    Rows of words that the world never uses are seeded noise, as they were in training.
    """
    state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(packed).items()}
    ids, rows = state.pop("used_ids"), state.pop("used_rows")
    state[ROWS] = unused_rows(rows.shape[1]).index_copy(0, ids, rows)
    save_file(state, full)
    return Path(full)


def unused_rows(width: int) -> Tensor:
    return torch.randn(49408, width, generator=torch.Generator().manual_seed(0)) * 0.09


@dataclass(frozen=True, kw_only=True)
class Evaluators:
    """The two loaded metric models.

    Images are PIL images of any size (the world's are 128 px); every score is a tensor on the CPU.
    """

    clip: "feature_extractors.Backbone"
    encoder: "feature_extractors.Backbone"
    heads: Heads

    def clip_text(self, images: Sequence, prompts: Sequence[str]) -> Tensor:
        """CLIP-T of each image with its own prompt, [images]."""
        return metrics.clip_text(self.clip, images, prompts)

    def clip_image(self, images: Sequence, references: Sequence) -> Tensor:
        """CLIP-I, [images]: mean cosine to the references."""
        return metrics.clip_image(self.clip, images, references)

    def identity(self, images: Sequence, references: Sequence) -> Tensor:
        """Mean cosine of the instance encoder's features to the references', [images]: DINO's score with this world's
        encoder.
        """
        return metrics.image_similarity(self.encoder, images, references).mean(1)

    def identity_named(self, images: Sequence, references: Sequence) -> Tensor:
        """The part of identity that captions can name (class, colour, pattern, accessory and its colour), [images]."""
        return self._part(self.heads.named, images, references)

    def identity_unnamed(self, images: Sequence, references: Sequence) -> Tensor:
        """The part that captions never name (second colour and its shade, proportions, period), [images]."""
        return self._part(self.heads.unnamed, images, references)

    @torch.no_grad()
    def attributes(self, images: Sequence) -> list[dict]:
        """What the probes read in each image, by the names of ATTRIBUTES."""
        features = metrics.features(self.encoder.image_features, images)
        answers = {name: probe(features).argmax(1).tolist() for name, probe in self.heads.probes.items()}
        return [{name: ATTRIBUTES[name][answers[name][i]] for name in ATTRIBUTES} for i in range(len(images))]

    @torch.no_grad()
    def _part(self, head, images, references) -> Tensor:
        parts = [
            F.normalize(head(metrics.features(self.encoder.image_features, some)), dim=-1)
            for some in (images, references)
        ]
        return (parts[0] @ parts[1].T).mean(1)


def load(device: str = "cpu", weights: Path = WEIGHTS) -> Evaluators:
    """Both metric models from their weight files, through the same loaders as any user's backbone."""
    register()
    with tempfile.TemporaryDirectory() as folder:
        full = expand_clip(weights / "evaluator_clip.safetensors", Path(folder) / "clip.safetensors")
        clip = feature_extractors.load_clip(CLIP_NAME, full, device)
    encoder = feature_extractors.load_image_encoder(ENCODER_NAME, weights / "evaluator_instance.safetensors", device)
    heads = Heads()
    heads.load_state_dict(load_file(weights / "evaluator_heads.safetensors"))
    return Evaluators(clip=clip, encoder=encoder, heads=heads.float().eval())
