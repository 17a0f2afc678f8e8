"""Join Concepts: several subjects as one concept, for one training."""

from comfy_api.latest import io

from ..trainers.data.joint import joined
from .schema import checked
from .sockets import CATEGORY, ConceptSocket


class JoinConcepts(io.ComfyNode):
    """Turns several CONCEPTs into one whose subjects are learned together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeJoinConcepts",
            display_name="Join Concepts",
            category=CATEGORY,
            description="Joins several subjects, which one training then learns together, each with its own token.",
            search_aliases=["multi-concept", "several subjects", "concepts list"],
            inputs=[
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(ConceptSocket.Input("concept"), prefix="concept", min=2, max=8),
                    tooltip="Concepts of Load References, each with another placeholder token; the first one is what "
                    "{} stands for in previews.",
                ),
            ],
            outputs=[ConceptSocket.Output(display_name="concept", tooltip="All subjects as one concept, for Train.")],
        )

    @classmethod
    @checked
    def execute(cls, concepts: io.Autogrow.Type) -> io.NodeOutput:
        return io.NodeOutput(joined([concept for concept in concepts.values() if concept is not None]))
