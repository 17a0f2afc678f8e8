"""Load References: the images, masks and tokens that make up a concept."""

from comfy_api.latest import io

from ..trainers.data.concept import Concept, check_class_word, check_word
from ..trainers.images import ImageFile
from ..trainers.text import as_lines, left_out
from .host import models, session
from .host.folders import fingerprint
from .reference_images import captions_for, chosen, connected, files_in, masked, of_class
from .schema import checked, valid
from .sockets import CATEGORY, ConceptSocket


class LoadReferences(io.ComfyNode):
    """Turns reference images of one subject into a CONCEPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadReferences",
            display_name="Load References",
            category=CATEGORY,
            description="Loads one or more reference images of your subject, and names the placeholder token for it.",
            search_aliases=["training images", "dataset", "concept", "reference images", "instance images"],
            # Core's dataset nodes return lists; without this, each image would start a training of its own.
            is_input_list=True,
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(io.Image.Input("image"), prefix="image", min=0, max=16),
                    optional=True,
                    tooltip="Reference images of the subject, also batches and different sizes.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Masks of the subject, one per image, in their order."),
                io.Model.Input(
                    "model", optional=True, tooltip="Model to read the resolution for width and height from."
                ),
                io.String.Input(
                    "folder",
                    default="",
                    advanced=True,
                    tooltip="Folder of reference images inside ComfyUI's input folder, added to connected images.",
                ),
                io.String.Input(
                    "class_word",
                    default="dog",
                    tooltip="Class word of the subject: one word such as dog, mug or backpack.",
                ),
                io.String.Input(
                    "placeholder_token",
                    default="<concept>",
                    tooltip="Placeholder token that stands for your subject in prompts.",
                ),
                io.String.Input(
                    "initializer_token",
                    default="",
                    advanced=True,
                    tooltip="Words whose embeddings initialize the placeholder token, such as 'corgi dog'; empty: the "
                    "class word.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    advanced=True,
                    tooltip="Training resolution in pixels; 0 = the model's own.",
                ),
                io.Combo.Input(
                    "crop",
                    options=["auto", "center", "random", "bucket"],
                    advanced=True,
                    tooltip="How to crop images that are not square: auto as the method's authors do; bucket nearly "
                    "keeps their aspect ratio.",
                ),
                io.Int.Input(
                    "max_images",
                    default=0,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Use only the first N images; 0 = all.",
                ),
                io.String.Input(
                    "select_images",
                    default="",
                    advanced=True,
                    tooltip="Use only the images with these numbers, counted from 1, such as '1, 3-5'.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Captions of the connected images, one per line, with {} for the subject: 'A house in {}'; "
                    "images of a folder take theirs from .txt files of the same name.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Class images for methods with prior preservation; without any, the model generates them.",
                ),
                io.String.Input(
                    "class_folder",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Folder of class images inside ComfyUI's input folder, optionally with captions in .txt "
                    "files of the same name.",
                ),
                io.Boolean.Input(
                    "invert_mask",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Invert the connected masks, for cut-outs: of these, Load Image masks the transparent "
                    "background, which becomes white.",
                ),
            ],
            outputs=[
                ConceptSocket.Output(
                    display_name="concept", tooltip="Your subject, for Train, Evaluate and Compare Methods."
                ),
                io.Image.Output(display_name="first image", tooltip="The first reference image, as it is trained."),
                io.String.Output(display_name="placeholder", tooltip="The placeholder token, to put into prompts."),
                io.Int.Output(display_name="width", tooltip="Width in pixels at which the first image is trained."),
                io.Int.Output(display_name="height", tooltip="Height in pixels at which the first image is trained."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, folder=(None,), class_folder=(None,), class_word=(None,), placeholder_token=(None,), images=None
    ) -> bool | str:
        """Check what is known before the graph runs; the host passes its sockets, too, without images."""
        checks = [(_files, folder), (_files, class_folder), (check_class_word, class_word), (_token, placeholder_token)]
        answers = [valid(check, *value) for check, value in checks]
        return next((answer for answer in answers if answer is not True), True)

    @classmethod
    def fingerprint_inputs(cls, folder="", class_folder="", **others) -> str:
        return fingerprint({"folder": folder, "class_folder": class_folder})

    @classmethod
    @checked
    def execute(
        cls, folder, class_word, placeholder_token, initializer_token, resolution, crop, max_images, select_images,
        images=None, mask=None, model=None, captions=(), class_images=None, class_folder=("",),
        invert_mask=(False,),
    ) -> io.NodeOutput:  # fmt: skip
        references = connected(images)
        texts = captions_for(as_lines(captions), len(references))
        (files, others), (class_files, more) = _files(*folder), _files(*class_folder)
        masks = [m for batch in mask or [] for m in batch.reshape(-1, *batch.shape[-2:])]
        references, masks, texts = chosen(
            references, texts, files, masks, max_images[0], select_images[0], inverted=invert_mask[0]
        )
        of_its_class, class_captions = of_class(class_images, class_files)
        concept = Concept(
            images=tuple(references),
            masks=tuple(masks) or None,
            class_word=class_word[0].strip(),
            placeholder_token=placeholder_token[0].strip(),
            initializer_token=initializer_token[0].strip(),
            resolution=resolution[0],
            crop=crop[0],
            captions=tuple(texts),
            class_images=tuple(of_its_class),
            class_captions=tuple(class_captions),
        )
        if names := others + more:
            session.notices(cls.hidden.unique_id if cls.hidden else "")(left_out(names))
        height, width = concept.sizes(models.resolution_of(model[0]) if model else 512)[0]
        first = concept.images[0].movedim(0, -1)[None]
        shown = session.preview(masked(first, concept.masks[0]), cls) if concept.masks else None
        return io.NodeOutput(concept, first, concept.placeholder_token, width, height, ui=shown)


def _files(folder: str) -> tuple[list[ImageFile], list[str]]:
    """Return `files_in` a folder; nothing for an empty name."""
    return files_in(folder.strip()) if folder.strip() else ([], [])


def _token(placeholder: str) -> None:
    check_word(placeholder.strip())
