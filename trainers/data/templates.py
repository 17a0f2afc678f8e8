"""Prompts around a subject, with `{}` for it."""

# The "small ImageNet" photo templates of Textual Inversion (arXiv 2208.01618), used by TextBoost's benchmark.
IMAGENET_SMALL = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
PLAIN = ("{}", "a {}", "one {}", "the {}", "photo of a {}")
# IMAGENET_SMALL, and its templates that begin with "a photo of" with "an illustration of" and "a depiction of" instead:
# the distinct ones of Textual Inversion's full list, which DVAR's code trains with (arXiv 2302.04841).
IMAGENET = IMAGENET_SMALL + tuple(
    template.replace("a photo of", kind)
    for kind in ("an illustration of", "a depiction of")
    for template in IMAGENET_SMALL
    if template.startswith("a photo of")
)
# Textual Inversion's 19 templates for styles, which TextBoost's and DVAR's code have, too; two of them count twice.
STYLE = tuple(
    f"{work} in the style of {{}}"
    for work in (
        *("a painting", "a rendering", "a cropped painting", "the painting"),
        *(f"a {quality} painting" for quality in ("clean", "dirty", "dark")),
        "a picture",
        *(f"a {quality} painting" for quality in ("cool", "close-up", "bright", "cropped", "good", "close-up")),
        "a rendition",
        *(f"a {quality} painting" for quality in ("nice", "small", "weird", "large")),
    )
)
TEMPLATES = {"imagenet_small": IMAGENET_SMALL, "plain": PLAIN, "imagenet": IMAGENET, "style": STYLE}
