"""What captions of the demo world say, and every word they can use.

Named always: the class. Named in part of the cases: primary colour, pattern, accessory with its colour, background,
framing. Named never: second colour, exact shades, proportions, pattern period.
"""

import random

from .backgrounds import BACKGROUNDS
from .world import COLOURS, EXTRAS, PATTERNS, SUBJECTS, Instance, Scene

# Wordings of a photo in the manner of textual inversion's 27 short templates; "{}" is the subject without its article.
NEUTRAL = (
    "a photo of a {}",
    "a rendering of a {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the weird {}",
    "a photo of a cool {}",
    "a photo of the small {}",
    "a photo of the large {}",
    "a photo of a small {}",
)
CROPPED = ("a cropped photo of the {}", "a cropped photo of a {}")
CLOSE = ("a close-up photo of a {}", "a close-up photo of the {}")
DARK, BRIGHT = ("a dark photo of the {}",), ("a bright photo of the {}",)
TEMPLATES = NEUTRAL + CROPPED + CLOSE + DARK + BRIGHT


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _noun(thing: Instance, rng, colour: float, pattern: float, extra: float) -> str:
    words = [thing.subject]
    if rng.random() < pattern:
        words.insert(0, thing.pattern)
    if rng.random() < colour:
        words.insert(0, thing.colour)
    tail = thing.extra != "none" and rng.random() < extra
    return " ".join(words) + (f" with {with_article(f'{thing.extra_colour} {thing.extra}')}" if tail else "")


def describe(thing: Instance) -> str:
    """A noun phrase with all details that captions can name: "a black striped cat with a red hat"."""
    return with_article(_noun(thing, random.Random(0), 1, 1, 1))


def _fill(template: str, noun: str) -> str:
    return template.replace("a {}", with_article(noun)).replace("{}", noun)


def _opening(scene: Scene, noun: str, rng) -> str:
    """The style and the subject, in one of the many wordings that are true of the scene."""
    if scene.collage:
        return (
            f"a photo collage of {with_article(noun)}"
            if rng.random() < 0.6
            else f"photo collage of {with_article(noun)}"
        )
    if scene.style != "photo":
        return f"a {scene.style} of {with_article(noun)}"
    special = {"dark": DARK, "bright": BRIGHT}.get(scene.light, ())
    special += CROPPED if scene.cropped else CLOSE if scene.distance == "close up" else ()
    chance = rng.random()
    if special and chance < 0.5:
        return _fill(rng.choice(special), noun)
    if chance < 0.62:
        return f"a photo of {with_article(noun)}"
    return with_article(noun) if chance < 0.7 else _fill(rng.choice(NEUTRAL), noun)


def _details(scene: Scene, opening: str, rng) -> list:
    words = [
        scene.distance,
        scene.side,
        "horizontally flipped" if scene.flip else "",
        "grayscale" if scene.gray else "",
    ]
    words.append("cropped" if scene.cropped and "cropped" not in opening else "")
    words = [word for word in words if word and rng.random() < 0.85]
    rng.shuffle(words)
    return words


def caption(thing: Instance, scene: Scene, rng: random.Random, colour=0.65, pattern=0.45, extra=0.5, place=0.88) -> str:
    """A true caption; the four numbers are the shares of captions that name colour, pattern, accessory and place."""
    opening = _opening(scene, _noun(thing, rng, colour, pattern, extra), rng)
    ground = f" {scene.background}" if rng.random() < place else ""
    return ", ".join([opening + ground, *_details(scene, opening, rng)])


def every_word() -> str:
    """One long text that holds every word a caption can use, for collecting the tokens to train."""
    extras = " ".join(("with", *EXTRAS[1:], *PATTERNS, *COLOURS, *SUBJECTS, *BACKGROUNDS))
    framing = "far away, close up, on the left, on the right, horizontally flipped, grayscale, cropped"
    openings = " ".join(TEMPLATES).replace("{}", " ")
    return f"{openings} an a painting of a sketch of photo collage of {extras} {framing}"
