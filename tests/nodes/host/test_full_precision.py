"""Exact application where the host has dynamic VRAM, which leaves wrappers out of small modules."""

import pytest
import torch

pytestmark = pytest.mark.comfy

BLOCK = "diffusion_model.input_blocks.1.1.transformer_blocks.0."
KEYS = {"norm": BLOCK + "norm1.weight", "whole": BLOCK + "ff.net.0.proj.weight"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_nothing_is_dropped(tmp_path, monkeypatch, dynamic):
    from personalize.nodes.host import full_precision, session, weights
    from personalize.tests.support import random_sd

    patcher = random_sd.graph(tmp_path)[0].clone()
    monkeypatch.setattr(patcher, "is_dynamic", lambda: dynamic)
    shapes = {name: patcher.model.get_parameter(key).shape for name, key in KEYS.items()}
    assert 4 * 2 * shapes["norm"].numel() <= full_precision.SMALL < 4 * shapes["whole"].numel()
    lora = {f"{name}.diff": torch.randn(shape) for name, shape in shapes.items()}
    lora["norm.diff_b"] = torch.randn(shapes["norm"])
    with session.training_session():
        before = weights.effective_state_dict(patcher, BLOCK)
        assert full_precision.add(patcher, lora, KEYS, 0.5) == 3
        after = weights.effective_state_dict(patcher, BLOCK)
    learned = {"norm1.weight": "norm.diff", "norm1.bias": "norm.diff_b", "ff.net.0.proj.weight": "whole.diff"}
    for key, value in after.items():
        change = 0.5 * lora[learned[key]] if key in learned else 0.0
        assert torch.allclose(value, before[key] + change, atol=1e-6)
    small = {BLOCK + "norm1.weight", BLOCK + "norm1.bias"}
    assert set(patcher.patches) == (small if dynamic else set())
    assert set(patcher.weight_wrapper_patches) == {KEYS["whole"]} | (set() if dynamic else small)
