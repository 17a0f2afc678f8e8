"""Evaluate: generates the images of a prompt set with a MODEL and scores them."""

from comfy_api.latest import io

from ...trainers.evaluation.prompt_sets import check_format
from ..host import session
from ..host.folders import fingerprint
from ..schema import checked, valid
from ..sockets import EVALUATION_FOLDER, ConceptSocket
from . import plan, scoring
from .metric_models import DEFAULTS, metric_models_input, used
from .plan import EvaluationPlan


class Evaluate(io.ComfyNode):
    """Turns MODEL, CLIP, VAE and CONCEPT into a REPORT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeEvaluate",
            display_name="Evaluate",
            category=EVALUATION_FOLDER,
            description="Generates images of a prompt set and scores their identity, text alignment and diversity.",
            search_aliases=["score", "benchmark", "clip-t", "clip-i", "dino", "lpips", "dreambench", "metrics"],
            inputs=[
                io.Model.Input("model", lazy=True),
                io.Clip.Input("clip", lazy=True),
                io.Vae.Input("vae"),
                ConceptSocket.Input("concept", tooltip="Subject with reference images, placeholder token, class word."),
                *plan.prompt_inputs(),
                io.String.Input(
                    "token_format", default="V",
                    tooltip="How prompts name the subject: V is the placeholder token, C the class word, as in V C or "
                    "sks C; or any text with {} for the placeholder token; for an untrained model write C.",
                ),
                scoring.label_input(),
                *scoring.comparison_inputs(),
                *plan.sampling_inputs(),
                scoring.held_out_input(),
                metric_models_input(),
            ],
            outputs=[
                *scoring.outputs(),
                io.Image.Output(display_name="images", tooltip="All images, prompt after prompt."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, prompt_set=None, prompts=None, prompt_file=None, token_format=None, metric_models=DEFAULTS
    ) -> bool | str:
        """Check what is known before the graph runs, which may train for hours before it reaches this node.

        Without a link `metric_models` is missing and has its default; a link is `None`.
        """
        if (answer := valid(check_format, token_format)) is not True:
            return answer
        if (answer := valid(lambda given: plan.check_prompts(*given), (prompt_set, prompts, prompt_file))) is not True:
            return answer
        return valid(used, metric_models)

    @classmethod
    def check_lazy_status(cls, model=None, clip=None, metric_models=None, **others) -> list[str]:
        """Look for the metric models before the nodes behind `model` and `clip`, a training perhaps, run for them."""
        used(metric_models)
        return [name for name, value in (("model", model), ("clip", clip)) if value is None]

    @classmethod
    def fingerprint_inputs(cls, **values) -> str:
        return fingerprint(values)

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, concept, token_format, label, held_out=None, metric_models=None, **widgets
    ) -> io.NodeOutput:
        notify = session.notices(cls.hidden.unique_id if cls.hidden else "")
        planned = EvaluationPlan.of(model, concept, metric_models, held_out, **widgets)
        report, images = planned.report(model, clip, vae, token_format, label, notify)
        notify(report.summary().replace("\n", "; "))
        return io.NodeOutput(*scoring.results(report), images)
