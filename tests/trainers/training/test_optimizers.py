"""AdamW with moments of 8 bits: is it bitsandbytes', does its state survive, and what is said where it is missing?"""

import sys

import pytest
import torch

from personalize.tests.support import small
from personalize.tests.trainers.recipes.test_attndreambooth import CONCEPT, recipe, train
from personalize.tests.trainers.runs.test_resume import Killed, learned
from personalize.trainers.runs import train as training
from personalize.trainers.runs.run import Run
from personalize.trainers.training import memory, optimizers, state
from personalize.trainers.training.memory import MemoryPlan

SENTENCE = (
    "^The optimizer adamw8bit needs the package bitsandbytes, which cannot be loaded here{}: set optimizer to adamw "
    r"\(and fine_tuning to lora where memory is short\), or install bitsandbytes into the Python that runs ComfyUI.$"
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
    for optimizer, params in ((optimizers.adamw(groups(ours), 0.3), ours), (plain(theirs), theirs)):
        for seed in (1, 2, 3):
            step(optimizer, params, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_8_bits_are_adamw_with_the_rates_given_but_for_rounding(eight_bits):
    """Against torch's AdamW with the same betas, eps, weight decay and a rate per group; moments really in bytes."""
    ours, theirs, begun = tensors(), tensors(), tensors()
    optimizer = optimizers.adamw(groups(ours), 0.3, 8)
    assert isinstance(optimizer, eight_bits.AdamW8bit)
    for one, params in ((optimizer, ours), (plain(theirs), theirs)):
        for seed in range(1, 9):
            step(one, params, seed)
    for a, b, start in zip(ours, theirs, begun, strict=True):
        assert (a - b).norm() < 0.05 * (b - start).norm()
    kept = [{name: v.dtype for name, v in optimizer.state[p].items() if name in ("state1", "state2")} for p in ours]
    assert [{*dtypes.values()} for dtypes in kept] == [{torch.uint8}, {torch.float32}, {torch.uint8}]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("device", ["cpu", CARD])
def test_a_state_from_its_file_goes_on_bit_for_bit(tmp_path, bits, device, request):
    if bits == 8:
        request.getfixturevalue("eight_bits")
    whole, broken = tensors(0, device), tensors(5, device)
    optimizer, generator = optimizers.adamw(groups(whole), 0.3, bits), torch.Generator()
    for seed in (1, 2, 3):
        step(optimizer, whole, seed)
    state.save((state.capture(3, 0.0, whole, generator, optimizer),), tmp_path / "state.safetensors")
    (saved,) = state.load(tmp_path / "state.safetensors")
    again = optimizers.adamw(groups(broken), 0.3, bits)
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


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_kill_in_every_stage_changes_nothing_with_8_bits(eight_bits, tmp_path, stop_after):
    train(tmp_path / "whole" / "run", optimizer="adamw8bit")
    folder = tmp_path / "broken" / "run"
    with pytest.raises(Killed):
        train(folder, optimizer="adamw8bit", stop_after=stop_after)
    train(folder, optimizer="adamw8bit")
    assert learned(folder) == learned(tmp_path / "whole" / "run")
    train(tmp_path / "plain" / "run")
    assert learned(folder)[0] != learned(tmp_path / "plain" / "run")[0]


class Refused:
    """An import of bitsandbytes that fails, as a missing or a broken one does."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            raise self.error
        return None


@pytest.mark.parametrize(
    ("error", "why"),
    [(ModuleNotFoundError("No module named 'bitsandbytes'"), ""), (OSError("libcudart.so.11"), r" \(OSError\)")],
    ids=["missing", "broken"],
)
@pytest.mark.parametrize("stages", ["all", "1"])
def test_without_bitsandbytes_one_sentence_comes_first(monkeypatch, error, why, stages):
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refused(error), *sys.meta_path])
    with pytest.raises(ValueError, match=SENTENCE.format(why)):
        recipe(optimizer="adamw8bit", run_stages=stages).check(CONCEPT)
    recipe(run_stages=stages).check(CONCEPT)


def test_memory_and_disk_know_the_size_of_the_moments(tmp_path):
    """Gradient and two moments in memory, the value and two moments on disk: 12 bytes, or 6."""
    size = {"trained": 10**6, "batch_size": 2, "resolution": 32}
    models = small.models()
    plain, small_moments = (memory.stage_bytes(models, MemoryPlan(), **size, moment_bits=bits) for bits in (32, 8))
    assert plain == memory.stage_bytes(models, MemoryPlan(), **size) and plain - small_moments == 6 * 10**6
    assert memory.fit(models, MemoryPlan(), small_moments, **size, moment_bits=8) == (MemoryPlan(), small_moments)
    assert [optimizers.bytes_per_value(bits) for bits in (32, 8)] == [12, 6]


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
