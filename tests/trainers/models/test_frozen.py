"""Frozen layers: the library's own values and gradients, with less memory kept for them."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from personalize.trainers.models.frozen import FrozenConv2d, FrozenGEGLU, use_frozen_layers


def unets():
    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False)  # fmt: skip
    return plain, use_frozen_layers(copy.deepcopy(plain))


def passed(unet, trained=()):
    """Output, gradient of the text, gradients of what trains, and the bytes that were kept for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in trained)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 7, 16, generator=generator).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(image, torch.tensor([10, 900]), text).sample
    output.square().sum().backward()
    own = {name: parameter.grad for name, parameter in unet.named_parameters() if name in trained}
    return output, text.grad, own, sum(size for size, _ in kept.values())


@pytest.mark.parametrize("trained", [(), ("conv_in.weight", "down_blocks.0.resnets.0.conv1.bias", "conv_out.weight")])
def test_values_and_gradients_are_the_librarys(trained):
    plain, frozen = unets()
    expected, found = passed(plain, trained), passed(frozen, trained)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys() == set(trained)
    for name in trained:
        assert torch.equal(found[2][name], expected[2][name]), name
    assert found[3] < 0.9 * expected[3]


def test_the_layers_are_exchanged_and_nothing_else():
    plain, frozen = unets()
    before, after = [[type(m) for m in unet.modules()] for unet in (plain, frozen)]
    assert {a for b, a in zip(before, after, strict=True) if a is not b} == {FrozenConv2d, FrozenGEGLU}
    assert plain.state_dict().keys() == frozen.state_dict().keys()
