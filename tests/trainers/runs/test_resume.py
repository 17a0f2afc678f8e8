"""Does a run survive whatever ends it: bit for bit the same as one that nothing disturbed? Small models on the CPU."""

import dataclasses
import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from personalize.tests.support import small
from personalize.trainers.data.concept import Concept
from personalize.trainers.recipes.textboost import TextBoost
from personalize.trainers.runs import train as training
from personalize.trainers.runs import trainer
from personalize.trainers.runs.checkpoints import CheckpointWriter
from personalize.trainers.runs.folder import RunFolder
from personalize.trainers.runs.preview import Preview
from personalize.trainers.runs.run import Run
from personalize.trainers.training import memory, state
from personalize.trainers.training.memory import MemoryPlan
from personalize.trainers.training.objective import Objective
from personalize.trainers.training.stage import Diverged

FAST = TextBoost(steps=7, batch_size=4, views=8, captions=small.CAPTIONS)


class Killed(BaseException):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStages(TextBoost):
    """TextBoost twice: first the words, then the LoRA. Like AttnDreamBooth, the second draws before it begins."""

    def stages(self, models, concept, generator, context):
        (stage,) = super().stages(models, concept, generator, context)
        yield dataclasses.replace(stage, name="words", steps=4, params=stage.params[:1], after_step=lambda: None)
        torch.randn(3, generator=generator)
        yield dataclasses.replace(stage, name="lora", steps=3, params=stage.params[1:], after_step=lambda: None)


def train(folder, recipe=FAST, *, crop="center", stop_after=None, models=None, **options):
    """A run with a checkpoint every two steps; `stop_after` breaks it off as a user's cancel does."""

    def on_step(report):
        if stop_after and len((folder / "steps.jsonl").read_text().splitlines()) == stop_after:
            raise Killed

    picture = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(5))
    concept = Concept(images=(picture, picture.flip(1), picture.flip(2).mT), resolution=32, crop=crop)
    run = Run(concept=concept, recipe=recipe)
    options = {"checkpoint_every": 2, "callbacks": training.Callbacks(on_step=on_step)} | options
    return training.train(run, models or small.models(), folder, **options)


def learned(folder):
    """Every bit that a run learned, and what its steps said but for the clock."""
    files = [load_file(folder / f"{name}.safetensors") for name in ("lora", "clip")]
    tensors = {key: value.numpy().tobytes() for file in files for key, value in file.items()}
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in step.items() if k not in ("seconds", "steps")} for step in steps]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(recipe)`: what a run learns that nothing disturbs, and what its steps say."""

    @functools.cache
    def learned_whole(recipe=FAST):
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(folder, recipe)
        return learned(folder)

    return learned_whole


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    "recipe",
    [FAST, dataclasses.replace(FAST, views=0), TwoStages(**vars(FAST))],
    ids=["pool", "fresh views", "two stages"],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(whole, tmp_path, recipe, stop_after):
    folder = tmp_path / "broken" / "run"
    with pytest.raises(Killed):
        train(folder, recipe, stop_after=stop_after)
    partial = RunFolder(folder).result(partial=True)
    assert not partial.complete and len(partial.history) == stop_after and str(stop_after) in partial.stop_reason
    assert RunFolder(folder).result() is None
    result = train(folder, recipe)
    assert learned(folder) == whole(recipe)
    assert [step["step"] for step in result.history] == list(range(1, 8))
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("stop_after", [1, 3])
@pytest.mark.parametrize("views", [0, 8])
def test_images_of_two_sizes_go_on_as_undisturbed_ones(tmp_path, monkeypatch, views, stop_after):
    """After a cancel, and after a kill, which takes the run back to its last checkpoint: the sizes come as before."""
    recipe, shapes = dataclasses.replace(FAST, views=views), []

    def sizes(folder, **options):
        models = small.models()
        models.unet.register_forward_pre_hook(
            lambda module, args, named: shapes.append(tuple(named["sample"].shape[-2:])), with_kwargs=True
        )
        shapes.clear()
        train(folder, recipe, crop="bucket", models=models, **options)
        return list(shapes)

    whole = sizes(tmp_path / "whole" / "run")
    assert set(whole) == {(5, 3), (3, 5)}
    for how in ("cancelled", "killed"):
        if how == "killed":
            monkeypatch.setattr(training.Trainer, "_break_off", lambda self, stages: None)
        folder = tmp_path / how / "run"
        with pytest.raises(Killed):
            sizes(folder, stop_after=stop_after)
        done = stop_after if how == "cancelled" else stop_after // 2 * 2
        assert sizes(folder) == whole[done:]
        assert learned(folder) == learned(tmp_path / "whole" / "run")


def test_a_process_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    """Nothing is written after the kill: the newest checkpoint is of step 4, the log is longer and ends in mid-line."""
    train(tmp_path / "whole" / "run")
    monkeypatch.setattr(training.Trainer, "_break_off", lambda self, stages: None)
    folder = tmp_path / "killed" / "run"
    with pytest.raises(Killed):
        train(folder, stop_after=5)
    with (folder / "steps.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    assert [f.name for f in sorted((folder / "checkpoints").iterdir())] == [
        "step_000002.safetensors",
        "step_000004.safetensors",
    ]
    train(folder)
    assert learned(folder) == learned(tmp_path / "whole" / "run")


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_not_used(whole, tmp_path, damage, damaged):
    folder = tmp_path / "damaged" / "run"
    with pytest.raises(Killed):
        train(folder, stop_after=6)
    files = sorted((folder / "checkpoints").iterdir(), reverse=True)
    for file in files[:damaged]:
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        changed = {"cut": data[: len(data) // 2], "bit": data, "empty": b"", "text": b"no tensors in here"}
        file.write_bytes(changed[damage])
    trainer = RunFolder(folder).last_state()
    assert [s.step for s in trainer] == ([4] if damaged == 1 else [])
    train(folder)
    assert learned(folder) == whole()


def test_a_run_keeps_its_name_when_it_goes_on(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, stop_after=3)
    RunFolder(tmp_path).note(name="Rex")
    assert RunFolder(tmp_path).info().name == "Rex"
    train(tmp_path)
    assert RunFolder(tmp_path).info().name == "Rex" and RunFolder(tmp_path).info().complete


def test_more_steps_go_on_where_fewer_ended(tmp_path):
    """Exactly from a broken-off run; from a finished one, whose optimizer is gone, with new moments, and it says so."""
    whole = dataclasses.replace(FAST, steps=9)
    train(tmp_path / "whole" / "run", whole)
    with pytest.raises(Killed):
        train(tmp_path / "broken" / "short", stop_after=5)
    steps = []
    callbacks = training.Callbacks(on_step=lambda report: steps.append(report.step))
    train(tmp_path / "broken" / "long", whole, callbacks=callbacks)
    assert steps == [6, 7, 8, 9]
    assert learned(tmp_path / "broken" / "long") == learned(tmp_path / "whole" / "run")

    steps.clear()
    train(tmp_path / "finished" / "short")
    train(tmp_path / "finished" / "long", whole, callbacks=callbacks)
    assert steps == [8, 9]
    about = RunFolder(tmp_path / "finished" / "long").info()
    assert about.continued_from == "step 7 of run short, with new optimizer moments"
    assert learned(tmp_path / "finished" / "long")[1][:7] == learned(tmp_path / "whole" / "run")[1][:7]


def test_a_run_that_its_user_ended_trains_on_when_asked(tmp_path):
    def lines():
        return [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]

    early = training.Callbacks(finish=lambda: len(lines()) == 3)
    ended = train(tmp_path, callbacks=early)
    assert ended.complete and ended.steps == 3 and "finished by hand" in ended.stop_reason
    folder, before = RunFolder(tmp_path), lines()
    folder.reopen()
    assert folder.result() is None and folder.result(partial=True).steps == 3  # it can still be loaded
    result = train(tmp_path)
    assert result.complete and result.stop_reason == "all 7 steps done" and lines()[:3] == before and len(lines()) == 7
    assert any(not torch.equal(result.lora[name], ended.lora[name]) for name in ended.lora)
    with pytest.raises(RuntimeError, match="cannot train on: only one that Finish now ended can"):
        folder.reopen()


def test_another_run_is_no_ancestor(tmp_path):
    train(tmp_path / "short")
    steps = []
    callbacks = training.Callbacks(on_step=lambda report: steps.append(report.step))
    train(tmp_path / "other", dataclasses.replace(FAST, steps=8, lora_rank=2), callbacks=callbacks)
    assert steps == list(range(1, 9))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with RunFolder(tmp_path).lock():
        with pytest.raises(RuntimeError, match="already running"):
            train(tmp_path)
        with pytest.raises(RuntimeError, match="already running"):
            RunFolder(tmp_path).delete()
    train(tmp_path)
    RunFolder(tmp_path).delete()
    assert not tmp_path.exists()


@pytest.mark.parametrize("inner", ["", "checkpoints", "images/00.png"])
def test_a_link_is_neither_read_nor_written_nor_emptied(tmp_path, inner):
    """A run's folder that is a link to another place, or that has one in it, is no run."""
    train(tmp_path / "run")
    theirs = tmp_path / "theirs"
    if inner:
        (tmp_path / "run" / inner).rename(theirs) if inner.endswith("png") else theirs.mkdir()
        (tmp_path / "run" / inner).symlink_to(theirs)
    else:
        (tmp_path / "run").rename(theirs)
        (tmp_path / "run").symlink_to(theirs, target_is_directory=True)
    before = sorted((path, path.stat().st_mtime) for path in theirs.rglob("*"))
    assert RunFolder(tmp_path / "run").result() is None
    for act in (lambda: train(tmp_path / "run"), RunFolder(tmp_path / "run").delete):
        with pytest.raises(
            RuntimeError, match=rf"^The link 'run/?{inner}' leads to files that are not the run's: remove"
        ):
            act()
    assert sorted((path, path.stat().st_mtime) for path in theirs.rglob("*")) == before and theirs.exists()


def diverge_at(step, monkeypatch):
    """From `step` on the loss is no number."""
    calls, forward = [], Objective.forward

    def broken(self, *batch):
        calls.append(1)
        terms = forward(self, *batch)
        return {name: term * float("nan") for name, term in terms.items()} if len(calls) >= step else terms

    monkeypatch.setattr(Objective, "forward", broken)


@pytest.mark.parametrize(("nan_at", "kept"), [(4, 2), (5, 2), (6, 4), (7, 4)])
def test_a_loss_that_is_no_number_restores_the_last_good_state(tmp_path, monkeypatch, nan_at, kept):
    """The loss of step n is that of the state after step n - 1: a checkpoint of that very state is not trusted."""
    train(tmp_path / "good" / "run", dataclasses.replace(FAST, steps=kept))
    diverge_at(nan_at, monkeypatch)
    result = train(tmp_path / "bad" / "run")
    assert result.stop_reason == f"the loss was no number at step {nan_at}; this is the state after step {kept}"
    assert learned(tmp_path / "bad" / "run")[1] == learned(tmp_path / "good" / "run")[1]
    good = RunFolder(tmp_path / "good" / "run").result()
    assert all(torch.equal(result.lora[key], good.lora[key]) for key in good.lora)
    assert all(torch.equal(result.tokens[key][0], good.tokens[key][0]) for key in good.tokens)


def test_divergence_before_the_first_checkpoint_is_an_error(tmp_path, monkeypatch):
    diverge_at(2, monkeypatch)
    with pytest.raises(Diverged, match="at step 2: lower the learning rates"):
        train(tmp_path)


def test_where_memory_runs_out_less_goes_through_at_once(tmp_path, monkeypatch):
    """More than one image at once fails from step 5 on: the run goes on from step 4 with less, at last with 1."""
    sizes, forward = [], Objective.forward

    def limited(self, batch, noise, timesteps):
        sizes.append(len(batch))
        if len(sizes) > 4 and len(batch) > 1:
            raise torch.cuda.OutOfMemoryError("out of memory, on purpose")
        return forward(self, batch, noise, timesteps)

    said = []
    monkeypatch.setattr(Objective, "forward", limited)
    result = train(tmp_path / "limited", callbacks=training.Callbacks(on_notice=said.append))
    assert sizes == [4] * 5 + [2, 4, 2] + [1] * 12
    assert [step["step"] for step in result.history] == list(range(1, 8))
    assert "memory ran out: continuing with micro-batch size 1 of 4, gradient checkpointing" in said
    monkeypatch.setattr(Objective, "forward", forward)
    whole = train(tmp_path / "other" / "whole")
    assert all(torch.allclose(result.lora[key], whole.lora[key], atol=1e-5) for key in whole.lora)


def test_memory_that_never_suffices_is_one_sentence(tmp_path, monkeypatch):
    def never(self, *batch):
        raise torch.cuda.OutOfMemoryError("out of memory, on purpose")

    monkeypatch.setattr(Objective, "forward", never)
    with pytest.raises(MemoryError, match="lower the resolution"):
        train(tmp_path)


@pytest.mark.parametrize("shape", [(8, 8), (4, 16)])
def test_what_autograd_keeps_lies_within_the_margin_of_the_count(shape):
    """Counted without memory, for a square; here for any shape of that area, with real tensors and fused attention,
    which keeps a few more of them.
    """
    models = small.models()
    models.unet.requires_grad_(False)
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in models.unet.parameters()}
    context = torch.randn(1, 77, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        models.unet(torch.randn(1, 4, *shape), torch.zeros(1).long(), context)
    real = sum(size for size, _ in kept.values())
    counted = memory.activation_bytes(models, 8, False)
    assert counted <= real <= memory.MARGIN * counted


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = train(tmp_path / "plain" / "run")
    twice = train(tmp_path / "twice" / "run", memory_plan=MemoryPlan(micro_batch_size=4, gradient_checkpointing=True))
    assert all(torch.allclose(plain.lora[key], twice.lora[key], atol=1e-6) for key in plain.lora)


def test_a_full_disk_is_known_before_the_first_step(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(RuntimeError, match="make room"):
        train(tmp_path)


def test_a_state_survives_its_file(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    saved = state.capture(1, 2.5, [parameter], torch.Generator().manual_seed(1), optimizer)
    begun = state.capture(0, 0.0, [parameter], torch.Generator())
    state.save((saved, dataclasses.replace(begun, step=3)), tmp_path / "state.safetensors")
    first, second = state.load(tmp_path / "state.safetensors")
    assert first.step == 1 and first.seconds == 2.5 and torch.equal(first.params[0], parameter)
    assert torch.equal(first.optimizer[0]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    assert second.step == 3 and second.optimizer == {}
    assert state.load(tmp_path / "nowhere.safetensors") is None


def test_a_checkpoint_of_other_shapes_names_its_run(tmp_path):
    """One that somebody put into a run of the same lineage: it would have stopped all of them, in Python's words."""
    train(tmp_path / "short")
    last = state.load(tmp_path / "short" / "last.safetensors")
    odd = [dataclasses.replace(one, params=tuple(p[..., :1].contiguous() for p in one.params)) for one in last]
    state.save(tuple(odd), tmp_path / "short" / "last.safetensors")
    with pytest.raises(ValueError, match=r"^The checkpoint of run short does not fit this training: delete that run"):
        train(tmp_path / "long", dataclasses.replace(FAST, steps=8))


PREVIEWED = Preview(prompts=("a {}",), every=2, steps=1)


def previews(folder):
    return {file.name: file.read_bytes() for file in (folder / "previews").iterdir()}


@pytest.mark.parametrize("recipe", [FAST, TwoStages(**vars(FAST))], ids=["one stage", "two stages"])
@pytest.mark.parametrize("stop_after", [4, 7])
def test_a_run_killed_at_a_stages_last_step_ends_with_the_same_files(tmp_path, recipe, stop_after):
    """Also what is kept to train on from: no moments, which an undisturbed run does not keep either."""
    train(tmp_path / "whole" / "run", recipe, preview=PREVIEWED)
    folder = tmp_path / "broken" / "run"
    with pytest.raises(Killed):
        train(folder, recipe, stop_after=stop_after, preview=PREVIEWED)
    train(folder, recipe, preview=PREVIEWED)
    ours, theirs = (load_file(run / "last.safetensors") for run in (folder, tmp_path / "whole" / "run"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert previews(folder) == previews(tmp_path / "whole" / "run")


@pytest.mark.parametrize("how", ["killed behind the checkpoint", "cancelled while it is drawn"])
def test_no_preview_is_lost(tmp_path, monkeypatch, how):
    train(tmp_path / "whole" / "run", preview=PREVIEWED)
    folder, drawn, write = tmp_path / "broken" / "run", [], CheckpointWriter.write
    with monkeypatch.context() as patch:
        if how.startswith("killed"):

            def written(self, *given):
                write(self, *given)
                raise Killed

            patch.setattr(training.Trainer, "_break_off", lambda self, stages: None)
            patch.setattr(CheckpointWriter, "write", written)
        else:
            original = trainer.draw_if_it_fits

            def draw(*given):
                drawn.append(given)
                if len(drawn) == 2:  # of step 2
                    raise Killed
                return original(*given)

            patch.setattr(trainer, "draw_if_it_fits", draw)
        with pytest.raises(Killed):
            train(folder, preview=PREVIEWED)
    assert (folder / "checkpoints" / "step_000002.safetensors").exists()
    train(folder, preview=PREVIEWED)
    assert previews(folder) == previews(tmp_path / "whole" / "run")
    assert learned(folder) == learned(tmp_path / "whole" / "run")
