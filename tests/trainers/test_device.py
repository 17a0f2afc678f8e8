"""What a device computes in: precision by the host's rules or the card's name, and which attention."""

import pytest
import torch

from personalize.trainers.device import SingleDevice, has_bfloat16, training_dtype, works_in_half

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "bfloat16", "float16", "expected"),
    [
        ("auto", True, True, torch.bfloat16),
        ("auto", True, False, torch.bfloat16),
        ("auto", False, True, torch.float16),
        ("auto", False, False, torch.float32),
        ("float16", True, False, torch.float16),
        ("float32", True, True, torch.float32),
    ],
)
def test_the_best_that_works(name, bfloat16, float16, expected):
    assert training_dtype(name, CUDA, lambda device: bfloat16, lambda device: float16) == expected


def test_the_processor_computes_in_float32():
    assert training_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_none(monkeypatch, native):
    """On a GTX 1080 torch emulates it, and calls it supported unless asked so."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert has_bfloat16(CUDA) == native


@pytest.mark.parametrize(
    ("name", "major", "works"),
    [
        ("Tesla V100-SXM2-16GB", 7, True),
        ("NVIDIA GeForce RTX 2060", 7, True),
        ("NVIDIA GeForce GTX 1660 Ti", 7, False),
        ("NVIDIA GeForce GTX 1080 Ti", 6, False),
        ("Tesla T4", 7, True),
    ],
)
def test_cards_without_bfloat16(name, major, works):
    assert works_in_half(name, major) == works


@pytest.mark.comfy
def test_the_graph_asks_the_host(monkeypatch):
    """The tests' host runs with --force-fp32, as conftest.py sets it, and then no card computes in less."""
    from personalize.nodes.host import session

    monkeypatch.setattr(session, "training_device", lambda: CUDA)
    assert session.training_dtype("auto") == torch.float32
    assert session.training_dtype("bfloat16") == torch.bfloat16


@pytest.mark.comfy
def test_directml_is_refused_in_one_sentence(monkeypatch):
    from personalize.nodes.host import session

    monkeypatch.setattr(session, "training_device", lambda: torch.device("privateuseone", 0))
    for name in ("auto", "float32"):
        with pytest.raises(ValueError, match="does not run on DirectML") as caught:
            session.training_dtype(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("steps", "allowed", "expected"), [(499, True, False), (500, True, True), (500, False, False)])
def test_short_trainings_do_without_cudnns_attention(steps, allowed, expected):
    enabled, allow = torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp
    before = enabled()
    allow(allowed)
    try:
        with pytest.raises(KeyError), SingleDevice(device=torch.device("cpu")).attention(steps):
            assert enabled() == expected
            raise KeyError
        assert enabled() == allowed
    finally:
        allow(before)
