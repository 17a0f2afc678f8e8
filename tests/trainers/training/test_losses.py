"""Losses and timestep distributions: does each equal its formula, written out in float64?"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from personalize.trainers.models.checkpoint import scaled_linear
from personalize.trainers.training import losses, timesteps


def prediction(masks=None, preservation=(None, None)):
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 3, 4, 5, 6, generator=generator)[:, :, :4]
    tuned, frozen = preservation
    return SimpleNamespace(
        model_pred=pred,
        target=target,
        batch=SimpleNamespace(masks=masks, preservation_targets=frozen, weights=None),
        preservation=None if tuned is None else SimpleNamespace(parts=(tuned,)),
    )


def test_denoising_is_the_mean_squared_error():
    p = prediction()
    pairs = zip(p.model_pred.flatten().tolist(), p.target.flatten().tolist(), strict=True)
    squares = [(a - b) ** 2 for a, b in pairs]
    assert losses.denoising(p).item() == pytest.approx(sum(squares) / len(squares), rel=1e-6)


def test_denoising_counts_only_the_masked_area():
    masks = torch.zeros(3, 1, 5, 6)
    masks[0, 0, :2, :3] = 1.0
    masks[1, 0, 1, 1] = 0.25  # the weight within a sample is relative
    p = prediction(masks)
    error = ((p.model_pred - p.target).double() ** 2).mean(dim=1)
    first, second = error[0, :2, :3].mean(), error[1, 1, 1]
    assert losses.denoising(p).item() == pytest.approx(((first + second + 0) / 3).item(), rel=1e-6)


def test_knowledge_preservation_is_one_minus_the_cosine():
    generator = torch.Generator().manual_seed(1)
    tuned, frozen = torch.randn(2, 4, 7, 5, generator=generator)
    total = 0.0
    for h, g in zip(tuned.flatten(0, 1).tolist(), frozen.flatten(0, 1).tolist(), strict=True):
        dot = sum(a * b for a, b in zip(h, g, strict=True))
        total += 1 - dot / math.sqrt(sum(a * a for a in h) * sum(b * b for b in g))
    value = losses.knowledge_preservation(prediction(preservation=(tuned, frozen))).item()
    assert value == pytest.approx(total / 28, rel=1e-5)
    assert losses.knowledge_preservation(prediction(preservation=(frozen, frozen))).item() == pytest.approx(0, abs=1e-6)


def test_noise_schedule_is_stable_diffusions():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.allclose(scaled_linear(), theirs, atol=1e-6)


def test_snr_probabilities_equal_the_formula():
    alphas = scaled_linear()
    log_snr = [math.log(a / (1 - a)) for a in alphas.double().tolist()]
    weights = [max(log_snr) - value for value in log_snr]
    expected = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    assert torch.allclose(timesteps.snr_probabilities(alphas), expected, atol=1e-12)
    # Noisy steps more often, the cleanest never.
    assert expected[0] == 0 and expected[999] > expected[500] > expected[100] > 0


def test_samplers_follow_their_distribution():
    alphas = scaled_linear()
    drawn = timesteps.snr_weighted(alphas, torch.Generator().manual_seed(0))(40_000)
    expected = (timesteps.snr_probabilities(alphas) * torch.arange(1000)).sum().item()
    assert drawn.float().mean().item() == pytest.approx(expected, rel=0.01)
    even = timesteps.uniform(alphas, torch.Generator().manual_seed(0))(40_000)
    assert even.float().mean().item() == pytest.approx(499.5, rel=0.01)
    assert expected > 550  # later than evenly


@pytest.mark.parametrize("last", [0.0, 4.9e-8])  # ComfyUI writes the second for zero
def test_zero_terminal_snr_does_not_take_all_probability(last):
    alphas = scaled_linear()
    alphas[-1] = last
    probabilities = timesteps.snr_probabilities(alphas)
    assert probabilities.isfinite().all() and probabilities[-1] < 0.01


def test_knowledge_counts_only_the_encoders_that_train():
    """Of two encoders, joined in what was kept of the frozen ones: their mean, or one of them alone."""
    first, second, frozen = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 9)
    both = SimpleNamespace(parts=(first, second))
    p = SimpleNamespace(batch=SimpleNamespace(preservation_targets=frozen), preservation=both)

    def distance(tuned, kept):
        return (1 - F.cosine_similarity(tuned.double(), kept.double(), dim=-1)).mean().item()

    apart = distance(first, frozen[..., :4]), distance(second, frozen[..., 4:])
    assert losses.knowledge_preservation(p).item() == pytest.approx(sum(apart) / 2, rel=1e-5)
    for which, expected in ((slice(0, 1), apart[0]), (slice(-1, None), apart[1])):
        assert losses.knowledge_preservation(p, which).item() == pytest.approx(expected, rel=1e-5)
