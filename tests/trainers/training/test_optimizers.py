"""Optimizers: are they torch's and the libraries', does their state survive, and what is said where one is missing?"""

import dataclasses
import sys

import prodigyopt
import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.recipes.test_attndreambooth import CONCEPT, recipe, train
from personalize.tests.trainers.runs.test_resume import Killed, learned
from personalize.trainers.recipes import METHODS
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run
from personalize.trainers.training import memory, optimizers, state
from personalize.trainers.training.memory import MemoryPlan
from personalize.trainers.training.optimizers import Optimization

SENTENCE = (
    "^The optimizer {0} needs the package {1}, which cannot be loaded here{2}: set optimizer to adamw, or install {1} "
    "into the Python that runs ComfyUI.$"
)
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' kernels for CUDA")
CARD = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD])


@pytest.fixture
def eight_bits():
    """bitsandbytes' optimizers, where they are installed; older ones cannot do without a graphics card."""
    return pytest.importorskip("bitsandbytes", minversion="0.47").optim


def tensors(seed=0, device="cpu"):
    """Parameters above and below the 4096 values from which bitsandbytes keeps moments in 8 bits."""
    g, shapes = torch.Generator().manual_seed(seed), ((96, 50), (7,), (9, 3, 13, 13))
    return [torch.nn.Parameter(torch.randn(shape, generator=g).to(device)) for shape in shapes]


def step(optimizer, params, seed):
    for parameter, gradient in zip(params, tensors(seed), strict=True):
        parameter.grad = gradient.detach().to(parameter.device)
    optimizer.step()


def groups(params):
    return [{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.02}]


def plain(params, **chosen):
    return torch.optim.AdamW(groups(params), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3, **chosen)


def test_32_bits_are_torchs():
    ours, theirs = tensors(), tensors()
    for optimizer, params in (
        (optimizers.optimizer_of(groups(ours), Optimization(weight_decay=0.3)), ours),
        (plain(theirs), theirs),
    ):
        for seed in (1, 2, 3):
            step(optimizer, params, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_8_bits_are_adamw_with_the_rates_given_but_for_rounding(eight_bits):
    """Against torch's AdamW with the same betas, eps, weight decay and a rate per group; moments really in bytes."""
    ours, theirs, begun = tensors(), tensors(), tensors()
    optimizer = optimizers.adamw8bit(groups(ours), 0.3)
    assert isinstance(optimizer, eight_bits.AdamW8bit)
    for one, params in ((optimizer, ours), (plain(theirs), theirs)):
        for seed in range(1, 9):
            step(one, params, seed)
    for a, b, start in zip(ours, theirs, begun, strict=True):
        assert (a - b).norm() < 0.05 * (b - start).norm()
    kept = [{name: v.dtype for name, v in optimizer.state[p].items() if name in ("state1", "state2")} for p in ours]
    assert [{*dtypes.values()} for dtypes in kept] == [{torch.uint8}, {torch.float32}, {torch.uint8}]


def test_prodigy_is_the_librarys_with_its_authors_settings():
    """One rate for all groups, 1, whatever they ask for; and it has grown from the library's first estimate, 1e-6."""
    ours, theirs = tensors(), tensors()
    plain = prodigyopt.Prodigy(theirs, weight_decay=0.3, use_bias_correction=True, safeguard_warmup=True)
    optimizer = optimizers.optimizer_of(groups(ours), Optimization(optimizer="prodigy", weight_decay=0.3))
    for _ in range(40):
        step(optimizer, ours, 1)
        step(plain, theirs, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0] and optimizer.param_groups[0]["d"] > 1e-5


@pytest.mark.parametrize("name", optimizers.BYTES_PER_VALUE)
@pytest.mark.parametrize("device", ["cpu", CARD])
def test_a_state_from_its_file_goes_on_bit_for_bit(tmp_path, name, device, request):
    if name == "adamw8bit":
        request.getfixturevalue("eight_bits")
    whole, broken, chosen = tensors(0, device), tensors(5, device), Optimization(optimizer=name, weight_decay=0.3)
    optimizer, generator = optimizers.optimizer_of(groups(whole), chosen), torch.Generator()
    for seed in (1, 2, 3):
        step(optimizer, whole, seed)
    state.save((state.capture(3, 0.0, whole, generator, optimizer),), tmp_path / "state.safetensors")
    (saved,) = state.load(tmp_path / "state.safetensors")
    again = optimizers.optimizer_of(groups(broken), chosen)
    state.restore(saved, broken, generator, again)
    for p, q in zip(whole, broken, strict=True):
        for name, value in optimizer.state[p].items():
            other = again.state[q][name]
            assert type(other) is type(value), name
            assert torch.equal(other, value) and other.dtype == value.dtype if torch.is_tensor(value) else other == 3
    for seed in (4, 5):
        step(optimizer, whole, seed)
        step(again, broken, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole, broken, strict=True))


@pytest.mark.parametrize(("name", "stop_after"), [("adamw8bit", 1), ("adamw8bit", 3), ("adamw8bit", 6), ("prodigy", 3)])
def test_a_kill_in_every_stage_changes_nothing(tmp_path, request, name, stop_after):
    if name == "adamw8bit":
        request.getfixturevalue("eight_bits")
    train(tmp_path / "whole" / "run", optimizer=name)
    folder = tmp_path / "broken" / "run"
    with pytest.raises(Killed):
        train(folder, optimizer=name, stop_after=stop_after)
    train(folder, optimizer=name)
    assert learned(folder) == learned(tmp_path / "whole" / "run")
    train(tmp_path / "plain" / "run")
    assert learned(folder)[0] != learned(tmp_path / "plain" / "run")[0]


class Refused:
    """An import of a package that fails, as a missing or a broken one does."""

    def __init__(self, package, error):
        self.package, self.error = package, error

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            raise self.error
        return None


@pytest.mark.parametrize(
    ("name", "package", "error", "why"),
    [
        ("adamw8bit", "bitsandbytes", ModuleNotFoundError("No module named 'bitsandbytes'"), ""),
        ("adamw8bit", "bitsandbytes", OSError("libcudart.so.11"), r" \(OSError\)"),
        ("prodigy", "prodigyopt", ModuleNotFoundError("No module named 'prodigyopt'"), ""),
    ],
    ids=["missing", "broken", "prodigy"],
)
@pytest.mark.parametrize("method", METHODS)
def test_without_its_package_one_sentence_comes_first(monkeypatch, name, package, error, why, method):
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Refused(package, error), *sys.meta_path])
    for preset in METHODS[method].values():
        with pytest.raises(ValueError, match=SENTENCE.format(name, package, why)):
            dataclasses.replace(preset, optimizer=name).check(CONCEPT)
        preset.check(CONCEPT)


def test_memory_and_disk_know_what_an_optimizer_remembers(tmp_path):
    """Gradient and moments in memory, the value and moments on disk: 4 bytes and 8, or 2; with Prodigy 4 and 16."""
    size = {"trained": 10**6, "batch_size": 2, "resolution": 32}
    models = small.models()
    need = {
        name: memory.stage_bytes(models, MemoryPlan(), **size, optimizer=name) for name in optimizers.BYTES_PER_VALUE
    }
    assert need["adamw"] == memory.stage_bytes(models, MemoryPlan(), **size)
    assert [need[name] - need["adamw"] for name in ("adamw8bit", "prodigy")] == [-6 * 10**6, 8 * 10**6]
    plan = memory.fit(models, MemoryPlan(), need["adamw8bit"], **size, optimizer="adamw8bit")
    assert plan == (MemoryPlan(), need["adamw8bit"])
    params = tensors()
    optimizer = optimizers.optimizer_of(groups(params), Optimization(optimizer="prodigy"))
    step(optimizer, params, 1)
    kept = sum(v.nbytes for named in optimizer.state.values() for v in named.values() if torch.is_tensor(v))
    assert kept == (optimizers.BYTES_PER_VALUE["prodigy"] - 4) * sum(p.numel() for p in params)


def test_a_stage_says_what_its_moments_take(eight_bits, tmp_path):
    """The sentence before the stage, in megabytes of disk: half with 8 bits."""
    disk = []
    for name in ("adamw", "adamw8bit"):
        said, run = [], Run(concept=CONCEPT, recipe=recipe(optimizer=name, run_stages="1+2"))
        training.train(run, small.models(), tmp_path / name, callbacks=training.Callbacks(on_notice=said.append))
        (line,) = [sentence for sentence in said if sentence.startswith("attndreambooth 2") and "disk" in sentence]
        disk.append(float(line.split("up to ")[1].split(" MB")[0]))
    assert disk[1] == pytest.approx(disk[0] / 2, abs=0.1) and disk[0] > 1


def test_the_file_says_which_optimizer(tmp_path, eight_bits):
    result = train(tmp_path, optimizer="adamw8bit", run_stages="1")[1]
    assert result.metadata()["ss_optimizer"] == "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.01)"
