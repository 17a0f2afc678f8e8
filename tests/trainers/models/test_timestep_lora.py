"""T-LoRA's layers against formulas written out: which ranks act when, what they add, and what they start from."""

import pytest
import torch

from personalize.tests.support import small
from personalize.trainers.models.timestep_lora import (
    RankSchedule,
    TimestepLoRA,
    add_timestep_lora,
    restore_timestep_lora,
    schedule_of,
)

TARGETS = ["attn1.to_q", "attn2.to_k"]
SCHEDULE = RankSchedule(rank=6, min_rank=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def models():
    return small.models()


def layers(unet):
    return {path: layer for path, layer in unet.named_modules() if isinstance(layer, TimestepLoRA)}


def predict(unet, timesteps):
    g = generator(1)
    latents, context = (
        torch.randn(len(timesteps), 4, 8, 8, generator=g),
        torch.randn(len(timesteps), 5, 32, generator=g),
    )
    with torch.no_grad():
        return unet(sample=latents, timestep=torch.tensor(timesteps), encoder_hidden_states=context).sample


def test_the_rank_falls_with_the_noise():
    """`int((T - t) / T * (r - r_min)) + r_min`, T = 1000: the authors' 64 and 32, by hand."""
    active = RankSchedule(rank=64, min_rank=32).active()
    assert [active[t].item() for t in (0, 1, 31, 32, 500, 968, 969, 999)] == [64, 63, 63, 62, 48, 33, 32, 32]
    masks = SCHEDULE.masks()
    assert masks[0].tolist() == [1.0] * 12 and masks[999].tolist() == [1, 1, 0, 0, 0, 0] * 2
    assert (RankSchedule(rank=5, min_rank=5).masks() == 1).all()


def test_the_rank_falls_with_the_noise_level_of_flow_matching():
    """`int((1 - s) * (r - r_min)) + r_min` of 64 and 32, by hand; 31 / 32 is the first level with 33."""
    sigmas = torch.tensor([0.0, 0.001, 0.25, 0.5, 0.75, 31 / 32, 0.97, 1.0])
    masks = RankSchedule(rank=64, min_rank=32).masks_at(sigmas)
    assert masks.sum(dim=1).tolist() == [2 * ranks for ranks in (64, 63, 56, 48, 40, 33, 32, 32)]
    assert SCHEDULE.masks_at(torch.tensor([0.9])).tolist() == [[1, 1, 0, 0, 0, 0] * 2]


def test_at_the_start_nothing_is_added(models):
    before = predict(models.unet, [3, 801])
    add_timestep_lora(models, TARGETS, SCHEDULE, generator())
    assert len(layers(models.unet)) == 14  # both attentions of the seven blocks
    torch.testing.assert_close(predict(models.unet, [3, 801]), before, atol=1e-5, rtol=0)


def test_factors_start_orthonormal_with_the_last_singular_values(models):
    """Of a matrix `normal(0, 1 / rank)`: their sum of squares over all 32 is its squared norm, 32 * 32 / rank^2."""
    add_timestep_lora(models, TARGETS, SCHEDULE, generator())
    for layer in layers(models.unet).values():
        torch.testing.assert_close(layer.lora_down @ layer.lora_down.T, torch.eye(6))
        torch.testing.assert_close(layer.lora_up.T @ layer.lora_up, torch.eye(6))
        assert (layer.lora_scale.diff() <= 0).all() and (layer.lora_scale > 0).all()
    shapes = [tuple(layer.base_layer.weight.shape) for layer in layers(models.unet).values()]
    drawn = torch.stack([torch.linalg.svdvals(torch.randn(shapes[0], generator=generator(i)) / 6) for i in range(200)])
    mean, deviation = drawn[:, -6:].mean(dim=0), drawn[:, -6:].std(dim=0)
    (first, *_) = layers(models.unet).values()
    assert ((first.lora_scale - mean).abs() < 4 * deviation).all()
    assert drawn[:, 0].min() > 2 * first.lora_scale.max()  # the first ones are others


def test_what_a_layer_adds_is_the_formula(models):
    """Two samples of two timesteps in one batch, with dense matrices."""
    add_timestep_lora(models, TARGETS, SCHEDULE, generator())
    caught = {}
    for path, layer in layers(models.unet).items():
        start = [part.detach().clone() for part in (layer.lora_down, layer.lora_scale, layer.lora_up)]
        for part in (layer.lora_down, layer.lora_scale, layer.lora_up):
            part.data += 0.1 * torch.randn(part.shape, generator=generator(2))
        layer.register_forward_hook(lambda m, args, y, path=path: caught.update({path: (args[0], y)}))
        layer.start = start
    predict(models.unet, [3, 801])
    for path, layer in layers(models.unet).items():
        x, y = caught[path]
        for row, t in enumerate((3, 801)):
            ranks = int((1000 - t) / 1000 * 4) + 2
            mask = torch.diag(torch.tensor([1.0] * ranks + [0.0] * (6 - ranks)))
            now, before = (
                up @ torch.diag(scale) @ mask @ down
                for down, scale, up in ((layer.lora_down, layer.lora_scale, layer.lora_up), layer.start)
            )
            weight = layer.base_layer.weight + now - before
            expected = torch.nn.functional.linear(x[row], weight, layer.base_layer.bias)
            torch.testing.assert_close(y[row], expected, atol=1e-5, rtol=1e-5)


def test_restored_layers_compute_the_same_bits(models):
    fresh = small.models()
    for part in add_timestep_lora(models, TARGETS, SCHEDULE, generator()):
        part.data += 0.1 * torch.randn(part.shape, generator=generator(2))
    factors = {path: tuple(part.detach() for part in layer.factors()) for path, layer in layers(models.unet).items()}
    restore_timestep_lora(fresh, SCHEDULE, factors)
    assert torch.equal(predict(fresh.unet, [3, 801]), predict(models.unet, [3, 801]))
    assert schedule_of(fresh.unet) == SCHEDULE and schedule_of(small.models().unet) is None


def test_a_rank_that_fits_no_layer(models):
    with pytest.raises(ValueError, match="The LoRA rank 40 is more than the width of a layer: use 32 or less"):
        add_timestep_lora(models, TARGETS, RankSchedule(rank=40, min_rank=2), generator())


def test_numbers_of_a_file_that_are_no_schedule():
    assert RankSchedule.read((6, 2)) == SCHEDULE
    for ranks in ((2, 6), (6, 0), (6,), (1, 2, 3)):
        with pytest.raises(ValueError):
            RankSchedule.read(ranks)
