"""Load References: pictures and words that make up a concept."""

from comfy_api.latest import io

from ..trainers.data.concept import Concept
from .host import models
from .reference_images import captions_for, chosen, connected, images_in, of_class
from .schema import checked
from .sockets import CATEGORY, ConceptSocket


class LoadReferences(io.ComfyNode):
    """Pictures of one subject -> CONCEPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadReferences",
            display_name="Load References",
            category=CATEGORY,
            description="One or more pictures of your subject, and the word that will mean it.",
            search_aliases=["training images", "dataset", "concept", "reference"],
            # Core's dataset nodes hand out lists; without this, each picture would start a training of its own.
            is_input_list=True,
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(io.Image.Input("image"), prefix="image", min=0, max=16),
                    optional=True,
                    tooltip="Pictures of the subject; batches and pictures of different sizes are fine.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where the subject is, one mask per picture, in order."),
                io.Model.Input("model", optional=True, tooltip="Only read for width and height."),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder of pictures inside ComfyUI's input folder, instead of images.",
                ),
                io.String.Input("class_word", default="dog", tooltip="What kind of thing it is, in one word."),
                io.String.Input(
                    "placeholder_token",
                    default="<concept>",
                    tooltip="The new word for your subject. Write it in prompts.",
                ),
                io.String.Input(
                    "initializer_token",
                    default="",
                    tooltip="Words to start from, such as 'corgi dog': one vector each. Empty: the class word.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="Training size in pixels; 0 = the model's own.",
                ),
                io.Combo.Input(
                    "crop",
                    options=["center", "random", "bucket"],
                    tooltip="How to cut pictures that are not square; with bucket they nearly keep their shape.",
                ),
                io.Int.Input(
                    "first", default=0, min=0, max=10000, advanced=True, tooltip="Use only the first N; 0 = all."
                ),
                io.String.Input(
                    "choose", default="", advanced=True, tooltip="Use only these pictures, counted from 1: '1, 3-5'."
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What each connected picture shows, a line each, with {} for the subject: 'A house in {}'. "
                    "Pictures of a folder have theirs in .txt files beside them.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures of other things of that kind, for methods with prior preservation; without any, "
                    "the model draws its own.",
                ),
                io.String.Input(
                    "class_folder",
                    default="",
                    optional=True,
                    tooltip="A folder of such pictures inside ComfyUI's input folder; what each shows may stand in a "
                    ".txt file beside it.",
                ),
            ],
            outputs=[
                ConceptSocket.Output(display_name="concept"),
                io.Image.Output(display_name="first image"),
                io.String.Output(display_name="placeholder"),
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, folder, class_word, placeholder_token, initializer_token, resolution, crop, first, choose,
        images=None, mask=None, model=None, captions=(), class_images=None, class_folder=("",),
    ) -> io.NodeOutput:  # fmt: skip
        pictures = connected(images)
        texts = captions_for("\n".join(captions), len(pictures))
        if folder[0].strip():
            more, beside = images_in(folder[0].strip())
            pictures, texts = pictures + more, texts + beside
        masks = [m for batch in mask or [] for m in batch.reshape(-1, *batch.shape[-2:])]
        pictures, masks, texts = chosen(pictures, masks, texts, first[0], choose[0])
        others, beside = of_class(class_images, class_folder[0].strip())
        concept = Concept(
            images=tuple(pictures),
            masks=tuple(masks) or None,
            class_word=class_word[0].strip(),
            placeholder_token=placeholder_token[0].strip(),
            initializer_token=initializer_token[0].strip(),
            resolution=resolution[0],
            crop=crop[0],
            captions=tuple(texts),
            class_images=tuple(others),
            class_captions=tuple(beside),
        )
        height, width = concept.sizes(models.resolution_of(model[0]) if model else 512)[0]
        return io.NodeOutput(concept, concept.images[0].movedim(0, -1)[None], concept.placeholder_token, width, height)
