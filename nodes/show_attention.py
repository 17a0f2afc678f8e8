"""Show Attention: where in a picture words of its prompt act, read from the host's U-Net while it looks at it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainers.reports import attention_maps as pictures
from ..trainers.text import quoted
from .host import clip_attachment, internals, models
from .host.attention_recorder import Recorder
from .reference_images import connected
from .schema import checked, valid
from .sockets import CATEGORY

SMALLEST = 64  # pixels on a side: 8 latents, which the U-Net halves three times


class ShowAttention(io.ComfyNode):
    """MODEL, CLIP, VAE and a picture -> a sheet of heat maps, a row per word."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeShowAttention",
            display_name="Show Attention",
            category=CATEGORY,
            description="Shows where in a picture words of its prompt act, beside the untrained model's if you like.",
            search_aliases=["attention", "heat map", "daam", "cross-attention"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.Image.Input("image", tooltip="The picture drawn with them; of several the first."),
                io.String.Input(
                    "prompt", default="a photo of <concept>", multiline=True, tooltip="What it was drawn from."
                ),
                io.String.Input(
                    "words",
                    default="<concept>",
                    tooltip="Words of the prompt, with commas between them; 'red dog' is one map.",
                ),
                io.Float.Input(
                    "noise",
                    default=0.5,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    tooltip="At which part of the noise schedule the picture is looked at.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the noise that is added.",
                ),
                io.Model.Input("base_model", optional=True, tooltip="The untrained model, to be shown beside it."),
                io.Clip.Input("base_clip", optional=True, tooltip="The untrained CLIP."),
                io.String.Input(
                    "base_words",
                    default="",
                    optional=True,
                    tooltip="What the untrained model reads in place of learned words, such as the class word.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image"), io.Mask.Output(display_name="maps")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, words: str | None = None) -> bool | str:
        return valid(_split, words)

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, image, prompt, words, noise, seed, base_model=None, base_clip=None, base_words="",
    ) -> io.NodeOutput:  # fmt: skip
        readings = [Reading("", model, clip, prompt, _split(words))]
        if base_model or base_clip:
            readings.append(_of_base(readings[0], base_model or model, base_clip or clip, base_words.strip()))
        places = _places(readings, vae)
        picture = _picture(image, vae)
        latent = vae.encode(picture[None])
        sides = [look(*each, latent, noise, seed) for each in zip(readings, places, strict=True)]
        maps = pictures.normalised(pictures.everywhere(sides[0].layers, *picture.shape[:2]))
        return io.NodeOutput(pictures.sheet(picture, readings[0].words, sides)[None], maps)


@dataclass(frozen=True)
class Reading:
    """A prompt, as one MODEL and CLIP read it, and the words of it that are asked for."""

    heading: str
    model: object
    clip: object
    prompt: str
    words: list[str]

    def places(self) -> list[list[int]]:
        """Where the tokens of each word stand in the prompt.

        Raises:
            ValueError: a word that does not.
        """
        found = [positions(self.clip, self.prompt, word) for word in self.words]
        for word, tokens in zip(self.words, found, strict=True):
            if not tokens:
                raise ValueError(f"The word {quoted(word)} is not in the prompt: write it as it stands there.")
        return found


def _places(readings: list[Reading], vae) -> list[list[list[int]]]:
    """Where each reading's words stand; whatever does not fit is said here, before anything runs."""
    families = [models.check_fit(reading.model, reading.clip, vae).name for reading in readings]
    if len({*families}) > 1:
        raise ValueError(
            f"The base model is {families[1]}, the model {families[0]}: connect the one it was trained from."
        )
    return [reading.places() for reading in readings]


def _split(words: str) -> list[str]:
    found = [*dict.fromkeys(word.strip() for word in words.split(",") if word.strip())]
    if not found:
        raise ValueError("There is no word to look for: write words of the prompt, with commas between them.")
    return found


def _of_base(trained: Reading, model, clip, base_words: str) -> Reading:
    """The untrained model's reading: other words where it cannot know the learned ones."""
    learned = [word for word in clip_attachment.of(trained.clip).tokens if word in trained.prompt]
    if learned and not base_words:
        raise ValueError(
            f"The untrained model does not know {learned[0]}: write in base_words what to call it there, such as the "
            "class word."
        )
    texts = [trained.prompt, *trained.words]
    for word in sorted(learned, key=len, reverse=True):
        texts = [text.replace(word, base_words) for text in texts]
    return Reading("base", model, clip, texts[0], texts[1:])


def positions(clip, prompt: str, word: str) -> list[int]:
    """Where the tokens of `word` stand in the prompt, wherever it occurs; chunks of 77 tokens follow each other."""
    name = models.encoder_names(clip)[-1].removeprefix("clip_")
    placed, wanted = _tokens(clip, name, prompt), [token for _, token in _tokens(clip, name, word)]
    found: list[int] = []
    for start in range(len(placed) - len(wanted) + 1):
        here = placed[start : start + len(wanted)]
        if wanted and all(_same(token, other) for (_, token), other in zip(here, wanted, strict=True)):
            found += [place for place, _ in here]
    return [*dict.fromkeys(found)]


def _tokens(clip, name: str, text: str) -> list[tuple[int, int | Tensor]]:
    """Place and token, without start, end and padding: the host gives those the word number 0."""
    chunks = clip.tokenize(text, return_word_ids=True)[name]
    places = enumerate(token for chunk in chunks for token in chunk)
    return [(place, token) for place, (token, _, number) in places if number]


def _same(one: int | Tensor, other: int | Tensor) -> bool:
    """Ids, or the vectors of learned words."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return not torch.is_tensor(one) and not torch.is_tensor(other) and one == other


def _picture(image: Tensor, vae) -> Tensor:
    """The first picture `[h, w, 3]`, cut to what the VAE takes."""
    found = connected({"image": image[:1]})
    if not found:
        raise ValueError("There is no picture to look at: connect an image that holds one.")
    picture = vae.vae_encode_crop_pixels(found[0].movedim(0, -1)[None])[0]
    height, width = picture.shape[:2]
    if min(height, width) < SMALLEST:
        raise ValueError(f"The picture is {width} x {height} pixels: use one with {SMALLEST} or more on a side.")
    if not picture.isfinite().all():
        raise ValueError("The picture holds values that are no numbers: connect another one.")
    return picture


def look(reading: Reading, places: list[list[int]], latent: Tensor, noise: float, seed: int) -> pictures.Attention:
    """The words' probabilities in every cross-attention, while the U-Net sees the noisy latents once.

    Everything else is the host's sampling: the noise level, what it does with prompts, and what the graph patched.
    """
    recorder = Recorder(places)
    model = recorder.on(reading.model)
    sigmas = model.get_model_object("model_sampling").sigmas
    level = torch.stack([sigmas[round(noise * (len(sigmas) - 1))], torch.zeros_like(sigmas[0])])
    prompt = reading.clip.encode_from_tokens_scheduled(reading.clip.tokenize(reading.prompt))
    denoise(model, prompt, latent, level, seed)
    return pictures.Attention(reading.heading, [*recorder.maps.values()], latent.shape[-2])


def denoise(model, prompt: list, latent: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """What the model makes of the latents with the first sigma's noise, guided by the prompt alone."""
    sampler = internals.KSAMPLER(_once)
    noise = internals.prepare_noise(latent, seed)
    return internals.sample_custom(
        model, noise, 1.0, sampler, sigmas, prompt, prompt, latent, disable_pbar=True, seed=seed
    )


def _once(model: Callable, x: Tensor, sigmas: Tensor, extra_args: dict, callback=None, disable=None) -> Tensor:
    return model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)
