"""The preview sampler: does it equal diffusers' DPM-Solver++ (2M), and does a seed mean the same image?"""

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.models import sampler


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # between numpy and torch, in the scheduler
@pytest.mark.parametrize("steps", [1, 2, 12])
@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_equals_diffusers(steps, prediction, zero_snr):
    from diffusers import DPMSolverMultistepScheduler

    models = small.models(prediction)
    options = dict(solver_order=2, final_sigmas_type="zero", prediction_type=prediction)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr, **options
    )
    models.alphas_cumprod = scheduler.alphas_cumprod
    assert (models.alphas_cumprod[-1] < 1e-7) == zero_snr
    timesteps = sampler.schedule(models.alphas_cumprod, steps)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    start = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def output(x, t):
        return torch.sin(3 * x + t.item() / 300) + 0.5 * x  # any smooth field

    theirs = start.clone()
    for t in scheduler.timesteps:
        theirs = scheduler.step(output(theirs, t), t, theirs).prev_sample
    ours = sampler.dpm_solver_2m(
        models.alphas_cumprod, start, lambda x, t: sampler.clean(models, x, output(x, t), t), steps
    )
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_v_prediction_gives_the_same_clean_image():
    x, noise = torch.randn(2, 1, 4, 2, 2)
    epsilon_model, v_model, t = small.models(), small.models("v_prediction"), torch.tensor([600])
    noisy = epsilon_model.add_noise(x, noise, t)
    for models in (epsilon_model, v_model):
        assert torch.allclose(sampler.clean(models, noisy, models.target(x, noise, t), t[0]), x, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_divides_by_nothing(prediction):
    models = small.models(prediction)
    models.alphas_cumprod[-1] = 0.0
    assert sampler.sample(models, ["a dog"], [7], size=(32, 32), steps=3).isfinite().all()
    noise = torch.randn(1, 4, 2, 2)
    x = sampler.dpm_solver_2m(models.alphas_cumprod, noise, lambda x, t: sampler.clean(models, x, x, t), 4)
    assert x.isfinite().all()


def test_the_size_of_all_images_is_bounded_before_one_is_made():
    """As of a preview of many prompts."""
    models = small.models()
    with pytest.raises(
        ValueError, match="^The 5000 images to generate at once have 1310 million pixels together, more"
    ):
        sampler.sample(models, ["a dog"] * 5000, range(5000), size=(512, 512), steps=1)


def test_a_image_depends_on_its_seed_alone():
    models = small.models()
    alone = sampler.sample(models, ["a dog"], [7], size=(32, 32), steps=3)
    torch.manual_seed(5)
    beside = sampler.sample(models, ["a cat", "a dog", "a dog"], [1, 7, 8], size=(32, 32), steps=3, batch_size=2)
    assert torch.allclose(alone[0], beside[1], atol=1e-5)
    assert not torch.allclose(beside[1], beside[2], atol=1e-3)
    assert alone.shape == (1, 3, 32, 32)
