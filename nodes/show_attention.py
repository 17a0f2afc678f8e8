"""Show Attention: heat maps of the U-Net's cross-attention to words of a prompt."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainers.reports import attention_maps
from ..trainers.text import any_of, quoted
from .host import clip_attachment, internals, models
from .host.attention_recorder import Recorder
from .reference_images import connected
from .schema import checked, valid
from .sockets import EVALUATION_FOLDER

SMALLEST = 64  # pixels per side: 8 latents, which the U-Net halves three times


class ShowAttention(io.ComfyNode):
    """Turns MODEL, CLIP, VAE and an image into a sheet of heat maps, one row per word."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeShowAttention",
            display_name="Show Attention",
            category=EVALUATION_FOLDER,
            description="Shows cross-attention maps: where in an image each word of its prompt acts.",
            search_aliases=["attention map", "heat map", "daam", "cross-attention"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.Image.Input("image", tooltip="Image that the model generated; of a batch the first is used."),
                io.String.Input(
                    "prompt", default="a photo of <concept>", multiline=True, tooltip="Prompt of the image."
                ),
                io.String.Input(
                    "words",
                    default="<concept>",
                    tooltip="Words of the prompt to show, separated by commas; 'red dog' makes one map.",
                ),
                io.Float.Input(
                    "noise_level",
                    default=0.5,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    tooltip="Position in the noise schedule at which attention is read; 1 would be pure noise.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the noise that is added.",
                ),
                io.Model.Input(
                    "base_model", optional=True, tooltip="Untrained model, to show its maps next to the trained one's."
                ),
                io.Clip.Input("base_clip", optional=True, tooltip="Untrained CLIP, for the base model's maps."),
                io.String.Input(
                    "base_words",
                    default="",
                    optional=True,
                    tooltip="Text that replaces placeholder tokens for the untrained model, such as the class word.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="A heat map per word over the image."),
                io.Mask.Output(display_name="maps", tooltip="The maps as masks, one per word."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, words: str | None = None) -> bool | str:
        return valid(_split, words)

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, image, prompt, words, noise_level, seed, base_model=None, base_clip=None, base_words="",
    ) -> io.NodeOutput:  # fmt: skip
        readings = [Reading("", model, clip, prompt, _split(words))]
        if base_model or base_clip:
            readings.append(_of_base(readings[0], base_model or model, base_clip or clip, base_words.strip()))
        places = _places(readings, vae)
        pixels = _first_image(image, vae)
        latent = vae.encode(pixels[None])
        sides = [read_attention(*each, latent, noise_level, seed) for each in zip(readings, places, strict=True)]
        maps = attention_maps.normalised(attention_maps.everywhere(sides[0].layers, *pixels.shape[:2]))
        return io.NodeOutput(attention_maps.sheet(pixels, readings[0].words, sides)[None], maps)


@dataclass(frozen=True)
class Reading:
    """Holds a prompt, the MODEL and CLIP that read it, and the words to show."""

    heading: str
    model: object
    clip: object
    prompt: str
    words: list[str]

    def places(self) -> list[list[int]]:
        """Return the positions of each word's tokens in the prompt.

        Raises:
            ValueError: a word is not in the prompt.
        """
        places = [positions(self.clip, self.prompt, word) for word in self.words]
        for word, tokens in zip(self.words, places, strict=True):
            if not tokens:
                raise ValueError(f"The word {quoted(word)} is not in the prompt: write it as it is written there.")
        return places


def _places(readings: list[Reading], vae) -> list[list[list[int]]]:
    """Return the positions of each reading's words; raise `ValueError`, before anything runs, for what does not fit."""
    found = [models.check_fit(reading.model, reading.clip, vae) for reading in readings]
    families = [family.name for family in found]
    if without := [family.name for family in found if not family.text_encoders]:
        raise ValueError(
            f"{without[0]} models have no cross-attention to show: connect a model of SD 1.x, SD 2.x or SDXL."
        )
    if len({*families}) > 1:
        raise ValueError(
            f"The base model is {families[1]}, but the model is {families[0]}: connect the one it was trained from."
        )
    return [reading.places() for reading in readings]


def _split(words: str) -> list[str]:
    listed = [*dict.fromkeys(word.strip() for word in words.split(",") if word.strip())]
    if not listed:
        raise ValueError("There is no word to show: write words of the prompt, separated by commas.")
    return listed


def _of_base(trained: Reading, model, clip, base_words: str) -> Reading:
    """Return the untrained model's reading, with `base_words` in place of placeholder tokens that it never learned."""
    known = clip_attachment.of(trained.clip).tokens
    learned = re.findall(any_of(known), trained.prompt) if known else []
    if learned and not base_words:
        raise ValueError(
            f"The untrained model has not learned {learned[0]}: write its replacement, such as the class word, as "
            "base_words."
        )
    prompt, *words = [
        re.sub(any_of(learned), lambda found: base_words, text) if learned else text
        for text in (trained.prompt, *trained.words)
    ]
    return Reading("base", model, clip, prompt, words)


def positions(clip, prompt: str, word: str) -> list[int]:
    """Return the positions of the tokens of `word` in the prompt, for every occurrence, counted across chunks of 77."""
    name = models.encoder_names(clip)[-1].removeprefix("clip_")
    placed, wanted = _tokens(clip, name, prompt), [token for _, token in _tokens(clip, name, word)]
    found: list[int] = []
    for start in range(len(placed) - len(wanted) + 1):
        here = placed[start : start + len(wanted)]
        if wanted and all(_same(token, other) for (_, token), other in zip(here, wanted, strict=True)):
            found += [place for place, _ in here]
    return [*dict.fromkeys(found)]


def _tokens(clip, name: str, text: str) -> list[tuple[int, int | Tensor]]:
    """Return position and token, without start, end and padding, which the host gives the word number 0."""
    chunks = clip.tokenize(text, return_word_ids=True)[name]
    places = enumerate(token for chunk in chunks for token in chunk)
    return [(place, token) for place, (token, _, number) in places if number]


def _same(one: int | Tensor, other: int | Tensor) -> bool:
    """Compare two tokens: ids, or the embeddings of learned tokens."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return not torch.is_tensor(one) and not torch.is_tensor(other) and one == other


def _first_image(image: Tensor, vae) -> Tensor:
    """Return the first image, `[h, w, 3]`, cropped to a size that the VAE takes.

    Raises:
        ValueError: there is none, it is too small, or it contains NaN or infinite values.
    """
    images = connected({"image": image[:1]})
    if not images:
        raise ValueError("There is no image to show attention for: connect at least one.")
    pixels = vae.vae_encode_crop_pixels(images[0].movedim(0, -1)[None])[0]
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"The image is only {width} x {height} pixels: use one with at least {SMALLEST} pixels per side."
        )
    if not pixels.isfinite().all():
        raise ValueError("The image contains NaN or infinite values: connect another one.")
    return pixels


def read_attention(
    reading: Reading, places: list[list[int]], latent: Tensor, noise_level: float, seed: int
) -> attention_maps.Attention:
    """Return the words' probabilities in every cross-attention for one pass of the noisy latents through the U-Net.

    The rest is the host's sampling: the noise schedule, its treatment of prompts, and the graph's patches.
    """
    recorder = Recorder(places)
    model = recorder.on(reading.model)
    sigmas = model.get_model_object("model_sampling").sigmas
    level = torch.stack([sigmas[round(noise_level * (len(sigmas) - 1))], torch.zeros_like(sigmas[0])])
    prompt = reading.clip.encode_from_tokens_scheduled(reading.clip.tokenize(reading.prompt))
    denoise(model, prompt, latent, level, seed)
    return attention_maps.Attention(reading.heading, [*recorder.maps.values()], latent.shape[-2])


def denoise(model, prompt: list, latent: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """Return the model's denoised latents after adding the first sigma's noise, conditioned on the prompt alone."""
    sampler = internals.KSAMPLER(_once)
    noise = internals.prepare_noise(latent, seed)
    return internals.sample_custom(
        model, noise, 1.0, sampler, sigmas, prompt, prompt, latent, disable_pbar=True, seed=seed
    )


def _once(model: Callable, x: Tensor, sigmas: Tensor, extra_args: dict, callback=None, disable=None) -> Tensor:
    return model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)
