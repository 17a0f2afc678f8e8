"""Compare Methods: trains each recipe as Train does, evaluates it as Evaluate does, and reports as Report does."""

import logging
from collections.abc import Iterable

from comfy_api.latest import io

from ...trainers.evaluation.report import Report
from ...trainers.recipes import names_of
from ...trainers.recipes.base import Recipe
from ...trainers.runs.preview import Preview
from ...trainers.runs.run import Run
from ...trainers.training.memory import MemoryPlan
from .. import train
from ..apply import apply
from ..host import session
from ..host.folders import fingerprint
from ..host.models import GraphModels
from ..host.unsupported import warning
from ..schema import checked, valid
from ..sockets import EVALUATION_FOLDER, ConceptSocket, RecipeSocket
from . import plan, report, scoring
from .metric_models import DEFAULTS, metric_models_input, used
from .plan import EvaluationPlan

UNTRAINED, CLASS_ALONE = "untrained", "C"  # label and token format of the floor
NO_PREVIEWS = Preview(every=0)


class CompareMethods(io.ComfyNode):
    """Turns MODEL, CLIP, VAE, CONCEPT and RECIPEs into a comparison: table, scatter, grid and their files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeCompareMethods",
            display_name="Compare Methods",
            category=EVALUATION_FOLDER,
            description="Trains your subject with several methods, one after the other, and compares their images and "
            "scores with each other and with the untrained model.",
            search_aliases=["benchmark", "which method", "evaluate", "scatter", "compare recipes"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                ConceptSocket.Input("concept", tooltip="Subject with reference images, placeholder token, class word."),
                io.Autogrow.Input(
                    "recipes",
                    template=io.Autogrow.TemplatePrefix(RecipeSocket.Input("recipe"), prefix="recipe", min=1, max=16),
                    tooltip="Recipes to compare, of any methods, or of one method with several settings.",
                ),
                *plan.prompt_inputs(),
                *scoring.comparison_inputs(),
                *plan.sampling_inputs(),
                train.seed_input(),
                *train.memory_inputs(),
                *report.file_inputs(),
                scoring.held_out_input(),
                report.ceiling_input(),
                metric_models_input(),
            ],
            outputs=report.outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(
        cls, prompt_set=None, prompts=None, prompt_file=None, prefix=None, recipes=None, metric_models=DEFAULTS
    ) -> bool | str:
        """Check what is known before the graph runs; the host demands the name `recipes` here."""
        checks = [
            valid(lambda given: plan.check_prompts(*given), (prompt_set, prompts, prompt_file)),
            valid(report.check_prefix, prefix),
            valid(used, metric_models),
        ]
        return next((answer for answer in checks if answer is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **values) -> str:
        return fingerprint(values)

    @classmethod
    @checked
    def execute(
        cls, model, clip, vae, concept, seed, precision, micro_batch_size, prefix, recipes: dict | None = None,
        checkpoint_every=50, grid_rows=None, held_out=None, ceiling=None, metric_models=None, **widgets,
    ) -> io.NodeOutput:  # fmt: skip
        notify = session.notices(cls.hidden.unique_id)
        options = {
            "hidden": cls.hidden,
            "preview": NO_PREVIEWS,
            "memory_plan": MemoryPlan(micro_batch_size=micro_batch_size),
            "checkpoint_every": checkpoint_every,
        }
        dtype = session.training_dtype(precision)
        compared = labelled(recipe for recipe in (recipes or {}).values() if recipe is not None)
        runs = {
            label: Run(concept=concept, recipe=recipe, seed=seed, dtype=dtype) for label, recipe in compared.items()
        }
        planned = EvaluationPlan.of(model, concept, metric_models, held_out, **widgets)
        graph = GraphModels.of(model, clip, vae)
        for label, run in runs.items():  # all of them, before the first trains
            _check(label, graph, clip, run)
        floor = planned.report(model, clip, vae, CLASS_ALONE, UNTRAINED, notify)[0]
        reports = [_learned(graph, run, planned, label, notify, options) for label, run in runs.items()]
        end = f"compared {len(runs)} recipes with the untrained model"
        notify(". ".join(filter(None, [end, warning(model, clip)])))
        return report.written(report.ordered(reports, floor, ceiling), prefix, grid_rows, cls)


def _learned(graph: GraphModels, run: Run, planned: EvaluationPlan, label: str, notify, options: dict) -> Report:
    """Train a recipe, unless it was trained before, and evaluate what it learned."""

    def say(sentence: str) -> None:
        notify(f"{label}: {sentence}")

    def warn(sentence: str) -> None:
        logging.warning(sentence)
        say(sentence)

    models = graph.model, graph.clip, graph.vae
    trained_model, trained_clip = apply(*models[:2], train.find_or_train(*models, run, say, warn=warn, **options))
    return planned.report(trained_model, trained_clip, graph.vae, run.recipe.subject(run.concept), label, say)[0]


def _check(label: str, graph: GraphModels, clip, run: Run) -> None:
    try:
        train.check(graph, clip, run)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def labelled(recipes: Iterable[Recipe]) -> dict[str, Recipe]:
    """Return recipes by a name of their own each: the method, with the preset and a number where several need it.

    Raises:
        ValueError: there is none.
    """
    named = [(*names_of(recipe), recipe) for recipe in recipes]
    if not named:
        raise ValueError("There is no recipe to compare: connect the node of a method, such as TextBoost.")
    methods = [method for method, _, _ in named]
    labels = [
        method if methods.count(method) == 1 else f"{method}, {preset or 'own settings'}" for method, preset, _ in named
    ]
    return {
        label if labels.count(label) == 1 else f"{label} {labels[: i + 1].count(label)}": recipe
        for i, (label, (_, _, recipe)) in enumerate(zip(labels, named, strict=True))
    }
