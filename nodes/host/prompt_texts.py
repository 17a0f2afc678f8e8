"""Reads a graph: a node's inputs, the prompts and image sizes that follow a training, where its MODEL comes from."""

from collections.abc import Iterator
from contextvars import ContextVar

from ...trainers.data.concept import Concept
from ...trainers.data.prompts import placeholder_advice, prompts_of
from ...trainers.recipes.base import Recipe
from . import internals

# Nodes whose text follows from their inputs alone. Everything else has to run first.
TEXT_NODES = (
    "PrimitiveString", "PrimitiveStringMultiline", "StringConcatenate", "StringReplace", "StringTrim",
)  # fmt: skip
MODEL_OUTPUT, CLIP_OUTPUT, SUBJECT_OUTPUT, PLACEHOLDER_OUTPUT = 0, 1, 4, 2  # of Train, and of Load References
Source = tuple[str, int]  # a node's id and the number of one of its outputs
QUEUED: ContextVar[dict] = ContextVar("QUEUED")  # by id, as `hidden.prompt`; of each request its own


def on_prompt(request: dict) -> dict:
    """Note the graph that a client queues, before the host checks it, and return the request as it is."""
    prompt = request.get("prompt") if isinstance(request, dict) else None
    QUEUED.set(prompt if isinstance(prompt, dict) else {})
    return request


def queued_inputs(hidden) -> dict:
    """Return all inputs of a node that is being queued, links as lists, by the names that they have in the graph.

    The host hands `validate_inputs` none of those inside a preset: it would have to leave their limits to the node.
    """
    return _inputs(QUEUED.get({}).get(str(hidden.unique_id)))


def advice(hidden, concept: Concept, recipe: Recipe) -> list[str]:
    """Return what is to be said of the prompts that a graph encodes with a Train node's CLIP, before it trains."""
    node_id, prompt = str(hidden.unique_id), hidden.prompt or {}
    known = {(node_id, SUBJECT_OUTPUT): recipe.subject(concept)}
    match _inputs(prompt.get(node_id)).get("concept"):
        case [str(references), int()]:
            known[references, PLACEHOLDER_OUTPUT] = concept.placeholder_token
    subjects = {member.placeholder_token: recipe.subject(member) for member in concept.members}
    learned = {token: subject for token, subject in subjects.items() if token in subject}
    return placeholder_advice(encoded(prompt, (node_id, CLIP_OUTPUT), known), learned)


def encoded(prompt: dict, clip: Source, known: dict[Source, str]) -> list[str | None]:
    """Return the texts that are encoded with the CLIP of an output, also behind nodes that pass it on.

    Args:
        prompt: the graph as it was queued, `{id: {"class_type", "inputs"}}`; nodes that are not executed may be odd.
        known: texts of outputs that are known already.

    Returns:
        `None` stands for texts that only the run itself knows.
    """
    found = []
    for name, kind, outputs in _behind(prompt, clip, "CLIP"):
        if "CONDITIONING" in outputs:
            for text in _strings(kind, prompt[name]["inputs"]):
                found += _texts(prompt, text, known)
    return found


def size_advice(hidden, size: tuple[int, int]) -> list[str]:
    """Return a sentence about images of a graph that have less than half the pixels at which a Train node learns.

    Args:
        size: height and width of the training in pixels.
    """
    prompt, (height, width) = hidden.prompt or {}, size
    for name, _, _ in _behind(prompt, (str(hidden.unique_id), MODEL_OUTPUT), "MODEL"):
        match _inputs(prompt[name]).get("latent_image"):
            case [str(latent), int()] if 0 < 2 * _pixels(_inputs(prompt.get(latent))) < width * height:
                own = "{width} x {height}".format(**prompt[latent]["inputs"])
                return [
                    f"{_title(prompt[latent])} makes images of {own} pixels, while your subject is learned at "
                    f"{width} x {height}: set its width and height to these."
                ]
    return []


def _pixels(inputs: dict) -> int:
    """Return the pixels of the images that a node of empty latents makes; 0 where it does not tell."""
    match inputs:
        case {"width": int(width), "height": int(height)}:
            return width * height
    return 0


def _title(node: dict) -> str:
    """Return how the editor names a node; other clients may not say."""
    match node.get("_meta"):
        case {"title": str(title)}:
            return title
    return str(node.get("class_type"))


def _behind(prompt: dict, source: Source, kind: str) -> Iterator[tuple[str, type | None, list[str]]]:
    """Yield the nodes that read an output, also behind nodes that pass on its kind, with class and kinds of outputs."""
    sources, done = [source], set()
    while sources:
        source = sources.pop()
        for name in _readers(prompt, source):
            node_class = internals.node_class(prompt[name]["class_type"])
            outputs = [*getattr(node_class, "RETURN_TYPES", ())]
            if name in done:
                continue
            done.add(name)
            yield name, node_class, outputs
            if kind in outputs:
                sources.append((name, outputs.index(kind)))


def checkpoint(hidden) -> str:
    """Return the name of the file from which a node's MODEL was loaded, by the graph; "" where that does not tell."""
    node_id, prompt = str(hidden.unique_id), hidden.prompt or {}
    while inputs := _inputs(prompt.get(node_id)):
        prompt = {
            name: node for name, node in prompt.items() if name != node_id
        }  # what is not executed may have cycles
        named = [inputs[name] for name in ("ckpt_name", "unet_name") if isinstance(inputs.get(name), str)]
        if named:
            return named[0]
        match inputs.get("model"):
            case [str(node_id), int()]:
                continue
        break
    return ""


def _readers(prompt: dict, source: Source) -> list[str]:
    return [name for name, node in prompt.items() if [*source] in _inputs(node).values()]


def _inputs(node) -> dict:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _strings(kind, inputs: dict) -> Iterator[object]:
    declared = kind.INPUT_TYPES()
    for name, (io_type, *_) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        if io_type == "STRING" and name in inputs:
            yield inputs[name]


def _texts(prompt: dict, value, known: dict[Source, str]) -> list[str | None]:
    """Return the texts of an input: its own, or those that a link brings."""
    if not isinstance(value, list):
        return [str(value)]
    if len(value) != 2 or not isinstance(value[0], str):
        return [None]
    if tuple(value) in known:
        return [known[value[0], value[1]]]
    node = prompt.get(value[0])
    kind = node.get("class_type") if isinstance(node, dict) else ""
    rest = {name: other for name, other in prompt.items() if name != value[0]}  # what is not executed may have cycles
    try:
        if kind in TEXT_NODES:
            named = {name: _first(rest, each, known) for name, each in _inputs(node).items()}
            return [*internals.node_class(kind).execute(**named).args]
        if kind == "PersonalizePromptList":
            lines, file, subject = (
                _first(rest, node["inputs"][name], known) for name in ("prompts", "prompt_file", "subject")
            )
            return [*prompts_of(lines, subject), *([None] if file else [])]
    except (LookupError, TypeError, ValueError):  # not known yet; or odd, and then its node says so
        pass
    return [None]


def _first(prompt: dict, value, known: dict[Source, str]) -> str:
    text = _texts(prompt, value, known)[0]
    if text is None:
        raise LookupError
    return text
