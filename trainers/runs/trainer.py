"""One run under way: its stages one after the other, what is written meanwhile, and how it goes on after a kill."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from ..data.context import Context
from ..device import SingleDevice
from ..formats import kohya, metadata
from ..models import timestep_lora
from ..models.diffusion import Models
from ..stopping import monitor as stopping
from ..stopping.monitor import StageContext, StageMonitors
from ..text import quoted, size_of, unknown_tokens
from ..training import causal_adapters, state
from ..training.loop import train_stage
from ..training.memory import MemoryBudget, trained_values
from ..training.optimizers import BYTES_PER_VALUE
from ..training.stage import Diverged, Stage, StepReport
from ..training.state import StageState
from ..training.trainables import not_finite
from .callbacks import Callbacks
from .checkpoints import CheckpointWriter, Pace
from .folder import CHECKPOINTS_KEPT, RunFolder, StepLog, total_steps
from .info import RunInfo
from .preview import Preview, draw_if_it_fits
from .result import RunResult
from .run import Run, advice


@dataclass(kw_only=True)
class Trainer:
    """One run under way: its stages one after the other, and what is written meanwhile."""

    run: Run
    models: Models
    folder: RunFolder
    model: str
    device: SingleDevice
    room: MemoryBudget
    preview: Preview
    checkpoint_every: int
    callbacks: Callbacks
    context: Context
    done: tuple[StageState, ...] = ()  # stages that are finished
    stops: list[dict] = dataclasses.field(default_factory=list)
    endings: list[str] = dataclasses.field(default_factory=list)

    def go(self) -> RunResult:
        for sentence in advice(self.run, self.models):
            self.callbacks.on_warning(sentence)
        earlier = self._begin()
        self.models.to(self.device.device, self.run.dtype)
        generator = torch.Generator().manual_seed(self.run.seed)
        try:
            reason = self._stages(earlier, generator)
        finally:
            self.writer.close()
            self.log.close()
        last = len(self.log)
        if not self.preview.due(last, -1):
            self._show(last, last)
        return self._finish(self.done, reason or f"all {last} steps done")

    def _stages(self, earlier: tuple[StageState, ...], generator: torch.Generator) -> str:
        """All stages one after the other; returns why it stopped before the end, if it did."""
        stages = self.run.recipe.stages(self.models, self.run.concept, generator, self.context)
        for number, stage in enumerate(stages):
            if number < len(earlier) and not state.fits(earlier[number], stage.parameters()):
                raise ValueError(
                    f"The checkpoint of run {self.source.path.name} does not fit this training: delete that run and "
                    "queue again."
                )
            if number + 1 < len(earlier):
                state.restore(earlier[number], stage.parameters(), generator)
                self._end(stage, earlier[number])
                continue
            try:
                with self.device.attention(stage.steps):
                    self._announce(stage)
                    if not len(self.log):
                        self._warn_of_unknown()
                        self._show(0)
                    start = earlier[number] if number < len(earlier) else None
                    self._end(stage, self._train(stage, generator, start))
            except Diverged as error:
                return self._step_back(stage, generator, error)
        return "; ".join(filter(None, self.endings))

    def _begin(self) -> tuple[StageState, ...]:
        """The stages that an earlier process got through, here or in a run with fewer steps."""
        settings, lineage = self.run.settings(), self.run.lineage(self.model)
        concept, continued, known = self.run.concept, "", self.folder.info()
        source, earlier = self.folder, self.folder.last_state()
        if not earlier:
            source, earlier = self.folder.ancestor(lineage, self.run.recipe.steps if lineage else 0)
        if source is not self.folder:
            moments = "" if earlier[-1].optimizer else ", with new optimizer moments"
            continued = f"step {total_steps(earlier)} of run {source.path.name}{moments}"
        elif known:
            continued = known.continued_from
        self.source = source
        subject, size = self.run.recipe.subject(concept), concept.at_resolution(self.models.resolution)
        origin = metadata.origin(self.models, subject, len(concept.images), size)
        self.info = RunInfo(
            settings=settings, dataset=self.run.dataset(), model=self.model, lineage=lineage, origin=origin,
            continued_from=continued, name=known.name if known else "",
        )  # fmt: skip
        self.folder.start(self.info, concept)
        self.writer = CheckpointWriter(self.folder)
        self.log = StepLog(self.folder, source.history(total_steps(earlier)))
        if earlier:
            self.callbacks.on_notice(f"going on after step {len(self.log)}")
        return earlier

    def _announce(self, stage: Stage) -> None:
        """Say what the stage will take; stop here if the disk or the memory cannot hold it."""
        kept = BYTES_PER_VALUE[stage.optimization.optimizer] * (CHECKPOINTS_KEPT + 1)  # one being written
        watching = stopping.of_stage(self.run.stopper, stage.number).values()
        kept += sum(4 * -(-stage.steps // monitor.every) for monitor in watching if monitor.keep == "all")
        most = kept * trained_values(stage)
        free = shutil.disk_usage(self.folder.path).free
        sizes = f"{size_of(most)} of disk for checkpoints, {size_of(free)} are free"
        if most > free:
            raise RuntimeError(f"The stage {stage.name} needs up to {sizes}: make room, or delete old runs.")
        self.callbacks.on_notice(f"{stage.name}: {stage.steps} steps, up to {sizes}")
        self.pace = Pace(size=BYTES_PER_VALUE[stage.optimization.optimizer] * trained_values(stage))
        for sentence in filter(None, (self.pace.words() if self.checkpoint_every else "", self.room.make(stage))):
            self.callbacks.on_notice(f"{stage.name}: {sentence}")

    def _warn_of_unknown(self) -> None:
        """Say which words of the preview's prompts look like placeholder tokens and are none of this training."""
        encoders = self.models.text_encoders
        known = encoders[0].tokenizer.placeholders if encoders else {}
        for prompt in self.preview.used_prompts if known else ():
            for word, nearest in unknown_tokens(prompt, known).items():
                self.callbacks.on_warning(
                    f"The preview prompt {quoted(prompt)} has {word}, which is not trained here: write {nearest}."
                )

    def _train(self, stage: Stage, generator: torch.Generator, start: StageState | None) -> StageState:
        """The stage from `start` to its end; where memory runs out, once more from the last state with less at once."""
        begin = start or state.capture(0, 0.0, stage.parameters(), generator)
        if self.done and not start:  # so that a later stage can always be taken back to its beginning
            self.writer.write((*self.done, begin), self.pace)
        self._watch(stage, generator, begin)
        if begin.step and not self.folder.has(_preview(len(self.log))):  # it was killed or cancelled before that
            self._show(len(self.log))
        while not (begin.step and self.watch.acts(self.log.entries[-1])):
            self.models.save_memory(self.room.memory_plan.gradient_checkpointing)
            try:
                begin = train_stage(
                    stage, self.models, self.device, generator,
                    micro_batch_size=self.room.memory_plan.micro_batch_size, start=begin,
                    earlier=(total_steps(self.done), sum(stage.seconds for stage in self.done)),
                    on_step=self._after_step,
                    should_stop=self._should_stop, notice=self.context.notice,
                )  # fmt: skip
                break
            except (MemoryError, RuntimeError) as error:
                begin = self._try_smaller(stage, begin, error)
                self.watch.best = begin.best
        # A run that was killed at its last step begins with that step's moments: a finished stage has none.
        params = self.watch.best or begin.params
        return dataclasses.replace(begin, params=params, optimizer={}, scaler={}, groups=(), best=())

    def _watch(self, stage: Stage, generator: torch.Generator, begin: StageState) -> None:
        """Set the monitors on a stage, and let them see it before its first step."""
        concept = self.run.concept.members[0]  # the one that prompts with {} are about
        stage_context = StageContext(
            models=self.models, stage=stage, concept=concept, device=self.device, generator=generator,
            subject=self.run.recipe.subject(concept), context=self.context,
        )  # fmt: skip
        state.restore(begin, stage.parameters(), generator)
        self.watch = StageMonitors(self.run.stopper, stage_context, self._entries(), begin.best)
        self.watch.start = self.device.agreed(self.watch.start)
        for monitor in self.watch.monitors.values():
            if sentence := monitor.warning(stage):
                self.callbacks.on_warning(sentence)

    def _end(self, stage: Stage, end: StageState) -> None:
        """Note how a stage ended; what it returns is what the models hold from here on."""
        entries = self._entries()[: end.step]
        found = stopping.stops(self.run.stopper, stage, entries)
        self.stops += found
        self.endings.append(stopping.ending(self.run.stopper, stage, entries, found))
        self.done += (end,)
        state.put(end.params, stage.parameters())

    def _entries(self) -> list[dict]:
        """The lines of the log since the stages that are finished."""
        return self.log.entries[total_steps(self.done) :]

    def _try_smaller(self, stage: Stage, begin: StageState, error: Exception) -> StageState:
        """Where to begin again with less at once."""
        if not self.device.alone:
            raise error  # the others have gone on
        self.callbacks.on_notice(self.room.shrink(stage, error))
        self.writer.settle()
        stages = self.folder.last_state()
        if len(stages) == len(self.done) + 1:
            begin = stages[-1]
        self.log.rewind(total_steps(self.done) + begin.step)
        return begin

    def _after_step(self, report: StepReport, capture: Callable[[], StageState]) -> None:
        measures = self.device.agreed(self.watch.evaluate(report.stage_step, self._entries()))
        start = self.watch.start if report.stage_step == 1 else {}
        report = dataclasses.replace(report, measures=measures, start=start)
        self.log.append(report.entry())
        self.watch.keep(self._entries())

        def whole() -> StageState:
            return dataclasses.replace(capture(), best=self.watch.best)

        if self.watch.keeps(report):  # before any checkpoint of this step: who goes on from there needs it
            self.folder.save_result(self._result(report.seconds, "", False), len(self.log))
        try:
            self._show(len(self.log))  # before the checkpoint: who goes on from there needs it
            if self.checkpoint_every and len(self.log) % self.checkpoint_every == 0 and self.pace.due():
                self.writer.write((*self.done, whole()), self.pace)
            self.callbacks.on_step(report)
        except BaseException:
            with contextlib.suppress(OSError, SafetensorError):  # a full disk must not hide what happened
                self._break_off((*self.done, whole()))
            raise

    def _should_stop(self, report: StepReport) -> bool:
        return self.device.agreed(self.watch.acts(self.log.entries[-1]) or self.callbacks.finish())

    def _break_off(self, stages: tuple[StageState, ...]) -> None:
        self.writer.settle()
        self.folder.save_state(stages)
        self._finish(stages, f"broken off after step {total_steps(stages)}", complete=False)

    def _step_back(self, stage: Stage, generator: torch.Generator, error: Diverged) -> str:
        """Restore the newest state whose own loss was a number, and say so."""
        step = total_steps(self.done) + error.step
        self.writer.settle()
        stages = self.folder.last_state(before=step - 2)  # the loss of step n is that of the state after step n - 1
        if len(stages) != len(self.done) + 1:
            if error.step == 1 and (name := not_finite(self.models)):
                raise ValueError(
                    f"The model has NaN or infinite values before it is trained, in the {name}: load it again, or "
                    "without the LoRA that is applied to it."
                ) from error
            raise error
        state.restore(stages[-1], stage.parameters(), generator)
        self.done = stages
        self.log.rewind(total_steps(stages))
        reason = f"the loss was no number at step {step}; this is the state after step {total_steps(stages)}"
        self.callbacks.on_notice(reason)
        return reason

    def _show(self, step: int, last: int = -1) -> None:
        if self.preview.due(step, last):
            picture = draw_if_it_fits(self.models, self.run, self.preview)
            if picture is None:
                return self.callbacks.on_notice("there was no memory to draw a preview")
            self.folder.save_picture(picture, _preview(step))
            self.callbacks.on_preview(step, picture)

    def _finish(self, stages: tuple[StageState, ...], reason: str, complete: bool = True) -> RunResult:
        result = self._result(sum(stage.seconds for stage in stages), reason, complete)
        self.folder.finish(result, stages, self.info)
        return result

    def _result(self, seconds: float, reason: str, complete: bool) -> RunResult:
        """What the models have learned by now."""
        encoders = self.models.text_encoders
        return RunResult(
            folder=self.folder.path,
            settings=self.info.settings,
            dataset=self.info.dataset,
            lora=kohya.lora(self.models),
            tokens=kohya.token_vectors(self.models),
            fixed_outputs=tuple(e.fixed_outputs.cpu() for e in encoders if e.fixed_outputs is not None),
            adapters=causal_adapters.tensors(self.models),
            rank_schedule=timestep_lora.schedule_of(self.models.unet),
            history=self.log.entries,
            stop_reason=reason,
            seconds=seconds,
            complete=complete,
            origin=self.info.origin,
            stops=self.stops,
        )


def _preview(step: int) -> str:
    """Return the name of a preview in a run's folder."""
    return f"previews/step_{step:04d}.png"
