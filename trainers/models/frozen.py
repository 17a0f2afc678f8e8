"""Layers of a frozen U-Net that keep for their backward pass only what it reads, and ask a card for less.

Values and gradients are those of the layers they replace, to rounding. PyTorch's convolution keeps its input for the
gradient of its weight even where the weight is frozen; the feed-forward's hidden layer, eight times as wide as its
input, is quickly computed again. Diffusers' blocks divide by factors that are 1 here, and copy images into rows of
tokens and back, which a matrix product can read and write as they lie. A convolution or a feed-forward whose own
weights train is PyTorch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

WIDE = 1280  # output channels of convolutions whose weights are larger than their images, at common sizes


def use_frozen_layers(unet: nn.Module) -> nn.Module:
    """Exchange the layers of a diffusers U-Net in place, and return it."""
    exchanged: dict[type, Any] = {
        nn.Conv2d: FrozenConv2d, GEGLU: FrozenGEGLU, FeedForward: FrozenFeedForward, ResnetBlock2D: FrozenResnetBlock,
        Transformer2DModel: FrozenTransformer,
    }  # fmt: skip
    for module in unet.modules():
        kind = exchanged.get(type(module))
        if kind in (FrozenConv2d, FrozenGEGLU) or (kind and kind.fits(module)):
            module.__class__ = kind
    return unet


def use_channels_last(unet: nn.Module) -> None:
    """Give wide convolutions' weights the layout that tensor cores read, in place; a card copies others at each use."""
    for module in unet.modules():
        if isinstance(module, FrozenConv2d) and module.out_channels >= WIDE:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _runs_as_it_is(x: Tensor, *weights: Tensor) -> bool:
    """Return whether weights are frozen and of the input's precision, which no autocast changes."""
    casts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return not casts and all(weight.dtype == x.dtype and not weight.requires_grad for weight in weights)


class FrozenConv2d(nn.Conv2d):
    """A convolution that forgets its input unless its weight or its bias trains."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, c, h, w]`."""
        return self.convolved(x, self.bias)

    def convolved(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with another bias, or none; the output lies in memory as usual, whatever the weight's layout is."""
        settings = self.stride, self.padding, self.dilation, self.groups
        trains = self.weight.requires_grad or (bias is not None and bias.requires_grad)
        if trains or not torch.is_grad_enabled():
            return _convolved(x, self.weight, bias, *settings)
        return _FrozenConvolution.apply(x, self.weight, bias, *settings)


class FrozenGEGLU(GEGLU):
    """A gated GELU that keeps the output of its projection alone."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return `a * gelu(b)`, with `a, b` the halves of the projection's last axis."""
        return _GatedGELU.apply(self.proj(x))


class FrozenFeedForward(FeedForward):
    """A gated GELU between two linear layers that keeps its input alone."""

    @staticmethod
    def fits(layer: FeedForward) -> bool:
        """Return whether a layer can be exchanged."""
        return isinstance(layer.net[0], GEGLU) and isinstance(layer.net[2], nn.Linear) and len(layer.net) == 3

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the output `[..., d]` for `[..., d]`."""
        first, last = self.net[0].proj, self.net[2]
        if type(first) is type(last) is nn.Linear and torch.is_grad_enabled():
            weights = first.weight, first.bias, last.weight, last.bias
            if _runs_as_it_is(x, *weights):
                return _FrozenFeedForward.apply(x, *weights)
        return super().forward(x)


class FrozenResnetBlock(ResnetBlock2D):
    """A residual block that adds its first convolution's bias and the time at once, and divides by nothing."""

    @staticmethod
    def fits(block: ResnetBlock2D) -> bool:
        """Return whether a block can be exchanged."""
        plain = block.upsample is None and block.downsample is None and block.output_scale_factor == 1
        reads_time = block.time_embedding_norm == "default" and block.time_emb_proj is not None
        return plain and reads_time and not block.skip_time_act and isinstance(block.nonlinearity, nn.SiLU)

    def forward(self, x: Tensor, temb: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return `[B, c', h, w]` for `[B, c, h, w]` and the embedded time `[B, t]`."""
        hidden, shift = F.silu(self.norm1(x)), self.time_emb_proj(F.silu(temb))
        if type(self.conv1) is FrozenConv2d:
            hidden = self.conv1.convolved(hidden) + (shift + self.conv1.bias)[:, :, None, None]
        else:  # it has a LoRA
            hidden = self.conv1(hidden) + shift[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class FrozenTransformer(Transformer2DModel):
    """A transformer over an image's positions, which are not copied into rows of tokens and back."""

    @staticmethod
    def fits(layer: Transformer2DModel) -> bool:
        """Return whether a layer can be exchanged."""
        return layer.is_input_continuous

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
        """Return the output `[B, c, h, w]`, alone in a tuple, for `[B, c, h, w]` and the text `[B, m, e]`."""
        first, last = self.proj_in, self.proj_out
        if not {type(first), type(last)} <= {FrozenConv2d, nn.Linear}:  # one has a LoRA
            return super().forward(x, encoder_hidden_states, *args, **kwargs | {"return_dict": False})
        columns = self.norm(x).flatten(2)  # [B, c, h * w]
        tokens = torch.baddbmm(first.bias, columns.mT, first.weight.flatten(1).T.expand(len(x), -1, -1))
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, None, encoder_hidden_states)
            else:
                tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        columns = torch.baddbmm(last.bias[:, None], last.weight.flatten(1).expand(len(x), -1, -1), tokens.mT)
        return (columns.unflatten(2, x.shape[2:]) + x,)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *rest):
        ctx.shape, ctx.rest = x.shape, rest
        ctx.save_for_backward(weight)
        return _convolved(x, weight, bias, *rest)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, _laid_as(weight, grad), *ctx.rest).contiguous(), *[None] * 6


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor:
    return F.conv2d(_laid_as(weight, x), weight, bias, *rest).contiguous()


def _laid_as(weight: Tensor, x: Tensor) -> Tensor:
    """Return images in a weight's layout."""
    return x if weight.is_contiguous() else x.contiguous(memory_format=torch.channels_last)


class _GatedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=-1)
        return a * F.gelu(b)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        a, b = x.chunk(2, dim=-1)
        return torch.cat([grad * F.gelu(b), torch.ops.aten.gelu_backward(grad * a, b)], dim=-1)


class _FrozenFeedForward(torch.autograd.Function):
    """Computes both halves of the hidden layer on their own: halves of one tensor would be read in strides."""

    @staticmethod
    def forward(ctx, x, first, first_bias, last, last_bias):
        ctx.save_for_backward(x, first, first_bias, last)
        a, b = _halves(x, first, first_bias)
        return F.linear(F.gelu(b).mul_(a), last, last_bias)

    @staticmethod
    def backward(ctx, grad):
        x, first, first_bias, last = ctx.saved_tensors
        a, b = _halves(x, first, first_bias)
        grad = (grad @ last).flatten(0, -2)
        of_b = torch.ops.aten.gelu_backward(a.flatten(0, -2).mul_(grad), b.flatten(0, -2))
        of_a = grad.mul_(F.gelu(b).flatten(0, -2))
        for_a, for_b = first.chunk(2)
        return torch.addmm(of_a @ for_a, of_b, for_b).view_as(x), *[None] * 4


def _halves(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [F.linear(x, w, b) for w, b in zip(weight.chunk(2), bias.chunk(2), strict=True)]
