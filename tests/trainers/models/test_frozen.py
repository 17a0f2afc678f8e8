"""Frozen layers: the library's own values and gradients, with less memory kept for them."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU

from personalize.trainers.models import frozen
from personalize.trainers.models.frozen import (
    FrozenConv2d,
    FrozenFeedForward,
    FrozenGEGLU,
    FrozenResnetBlock,
    FrozenTransformer,
    use_channels_last,
    use_frozen_layers,
)

# Of every kind of layer that is exchanged.
OWN = (
    "conv_in.weight",
    "down_blocks.0.resnets.0.conv1.bias",
    "conv_out.weight",
    "down_blocks.0.attentions.0.proj_in.bias",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    "up_blocks.1.attentions.0.proj_out.weight",
)


def unets(linear=False):
    """The library's, and one with exchanged layers and equal weights."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=linear,
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


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("trained", [(), OWN])
def test_values_and_gradients_are_the_librarys(trained, linear):
    plain, exchanged = unets(linear)
    expected, found = passed(plain, trained), passed(exchanged, trained)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert found[2].keys() == expected[2].keys() == set(trained)
    for name in trained:
        torch.testing.assert_close(found[2][name], expected[2][name], rtol=1e-4, atol=1e-3)
    assert found[3] < 0.9 * expected[3]


@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",)])
@pytest.mark.parametrize("kind", [FrozenConv2d, FrozenGEGLU])
def test_convolutions_and_gates_are_the_librarys_to_the_bit(kind, trained):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(8, 16, 3, padding=1) if kind is FrozenConv2d else GEGLU(8, 16)
    x, found = torch.randn(2, 8, 8, 8), []
    for each in (plain, copy.deepcopy(plain)):
        if found:
            each.__class__ = kind
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in trained)
        given = x.clone().requires_grad_()
        each(given).square().sum().backward()
        found.append([given.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert len(found[0]) == 1 + len(trained)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("linear", [False, True])
def test_wide_convolutions_in_the_layout_of_tensor_cores(linear, monkeypatch):
    """As on a card: weights and their images with channels last; what comes out lies as usual."""
    monkeypatch.setattr(frozen, "WIDE", 64)
    plain, exchanged = unets(linear)
    use_channels_last(exchanged)
    convolutions = [module for module in exchanged.modules() if isinstance(module, FrozenConv2d)]
    wide = [c for c in convolutions if c.out_channels >= 64 and c.kernel_size != (1, 1)]  # those of 1 x 1 fit both
    assert wide and wide == [c for c in convolutions if not c.weight.is_contiguous()]
    trained = ("down_blocks.1.resnets.0.conv2.weight",)
    for names in ((), trained):
        expected, found = passed(plain, names), passed(exchanged, names)
        assert found[0].is_contiguous()
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2][trained[0]], expected[2][trained[0]], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("linear", [False, True])
def test_gradient_checkpointing_changes_nothing(linear):
    _, exchanged = unets(linear)
    found = [passed(exchanged)]
    exchanged.enable_gradient_checkpointing()
    found.append(passed(exchanged.train()))
    assert torch.equal(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)
    assert found[1][3] < 0.8 * found[0][3]


def test_layers_with_a_lora_are_the_librarys():
    from peft import LoraConfig, inject_adapter_in_model

    found, targets = [], ["proj_in", "proj_out", "conv1", "ff.net.0.proj", "ff.net.2"]
    for unet in unets(linear=True):
        torch.manual_seed(3)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), unet)
        found.append(passed(unet))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-4)


def test_the_layers_are_exchanged_and_nothing_else():
    plain, exchanged = unets()
    before, after = [[type(m) for m in unet.modules()] for unet in (plain, exchanged)]
    kinds = {FrozenConv2d, FrozenGEGLU, FrozenFeedForward, FrozenResnetBlock, FrozenTransformer}
    assert {a for b, a in zip(before, after, strict=True) if a is not b} == kinds
    assert plain.state_dict().keys() == exchanged.state_dict().keys()
