"""Several concepts as one, to be learned in one training."""

from collections.abc import Sequence

from torch import Tensor

from .concept import Concept


def joined(concepts: Sequence[Concept]) -> Concept:
    """Return one concept with the images of all, each under its own subject's words; the first's stand for `{}`.

    Raises:
        ValueError: two have the same placeholder token, or differ in what holds for all images.
    """
    members = [member for concept in concepts for member in concept.members]
    tokens = [member.placeholder_token for member in members]
    if repeated := [token for token in tokens if tokens.count(token) > 1]:
        raise ValueError(f"Two concepts have the placeholder {repeated[0]}: give each one of its own.")
    for name in ("resolution", "crop"):
        if len({getattr(member, name) for member in members}) > 1:
            raise ValueError(f"The concepts differ in their {name}: set the same one for all.")
    if len({bool(concept.class_images) for concept in concepts}) > 1:
        raise ValueError("Only some concepts have class images: give class images to all, or to none.")
    images = [image for member in members for image in member.images]
    return Concept(
        images=tuple(images),
        masks=tuple(mask for member in members for mask in _masks(member)) if any(m.masks for m in members) else None,
        class_word=members[0].class_word,
        placeholder_token=members[0].placeholder_token,
        initializer_token=members[0].initializer_token,
        resolution=members[0].resolution,
        crop=members[0].crop,
        captions=tuple(m.caption(i) for m in members for i in range(len(m.images))) if _captioned(members) else (),
        class_images=tuple(image for concept in concepts for image in concept.class_images),
        class_captions=tuple(prompt for concept in concepts for prompt in concept.class_prompts()),
        placeholder_tokens=tuple(member.placeholder_token for member in members for _ in member.images),
        class_words=tuple(member.class_word for member in members for _ in member.images),
        initializer_tokens=tuple(member.initializer_token for member in members for _ in member.images),
    )


def _masks(member: Concept) -> Sequence[Tensor]:
    """Return a member's masks; of one without them, all of each image."""
    return member.masks or [image.new_ones(1, *image.shape[-2:]) for image in member.images]


def _captioned(members: Sequence[Concept]) -> bool:
    return any(member.captions for member in members)
