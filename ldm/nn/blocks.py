"""Residual block and resampling, shared by the autoencoder and the UNet."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# by their overloads, as looking these up takes as long as a small operator
CONV_BACKWARD = torch.ops.aten.convolution_backward.default
SILU_BACKWARD = torch.ops.aten.silu_backward.default
NORM_BACKWARD = torch.ops.aten.native_group_norm_backward.default


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """32 groups as published; the largest power of two that divides, where 32 does not."""
    return nn.GroupNorm(min(32, channels & -channels), channels, eps=eps)


def zero(module: nn.Module) -> nn.Module:
    """Zero-initialise, so that a residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class NormActConv(nn.Module):
    """conv3x3(silu(norm(x))).  Training keeps only x: norm and silu are done again in backward (the convolution is not)."""

    def __init__(self, in_channels: int, out_channels: int, eps: float, dropout: float = 0.0, zero_init: bool = False) -> None:
        super().__init__()
        self.norm = group_norm(in_channels, eps)
        self.dropout = dropout
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if zero_init:
            zero(self.conv)

    def activated(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """What the convolution sees."""
        x = self.norm(x)
        if scale is not None and shift is not None:
            x = torch.addcmul(shift, x, 1 + scale)
        x = F.silu(x)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the compiler chooses what to recompute
            norm, conv = self.norm, self.conv
            return _Recomputed.apply(
                x, scale, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, self.dropout, conv.weight, conv.bias
            )
        return self.conv(self.activated(x, scale, shift))


class _Recomputed(torch.autograd.Function):
    """NormActConv for training.  An autograd function, as the hooks of torch.utils.checkpoint take longer than these operators do on small
    tensors, and a GPU runs dry."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, gain: Tensor, offset: Tensor, groups: int, eps: float,
        dropout: float, weight: Tensor, bias: Tensor,
    ) -> Tensor:  # fmt: skip
        device, half = x.device.type, None
        if torch.is_autocast_enabled(device):
            half = torch.get_autocast_dtype(device)
            weight, bias = weight.to(half), bias.to(half)
        h, mean, rstd = _normalised(x if half is None else x.float(), gain, offset, groups, eps)
        a = F.silu(h if scale is None or shift is None else torch.addcmul(shift, h, 1 + scale))
        kept = None
        if dropout:
            kept = torch.empty_like(a, dtype=torch.bool).bernoulli_(1 - dropout)
            a = a * kept / (1 - dropout)
        ctx.save_for_backward(x, scale, shift, gain, offset, weight, mean, rstd, kept)
        ctx.groups, ctx.eps, ctx.dropout, ctx.half = groups, eps, dropout, half
        return F.conv2d(a if half is None else a.to(half), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, shift, gain, offset, weight, mean, rstd, kept = ctx.saved_tensors
        needs, full = ctx.needs_input_grad, x if ctx.half is None else x.float()
        h, _, _ = _normalised(full, gain, offset, ctx.groups, ctx.eps)
        modulated = h if scale is None else torch.addcmul(shift, h, 1 + scale)
        a = F.silu(modulated)
        if kept is not None:
            a = a * kept / (1 - ctx.dropout)
        grad_a, grad_weight, grad_bias = CONV_BACKWARD(
            grad, a if ctx.half is None else a.to(ctx.half), weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [any(needs[:5]), needs[8], needs[9]],
        )  # fmt: skip
        grads: list[Any] = [None] * 5
        if grad_a is not None:
            grad_a = grad_a.to(full.dtype)
            if kept is not None:
                grad_a = grad_a * kept / (1 - ctx.dropout)
            grad_h = SILU_BACKWARD(grad_a, modulated)
            if scale is not None:
                grads[1] = (grad_h * h).sum((2, 3), keepdim=True).to(scale.dtype)
                grads[2] = grad_h.sum((2, 3), keepdim=True).to(shift.dtype)
                grad_h = grad_h * (1 + scale)
            shape = len(full), full.shape[1], full[0, 0].numel()
            wanted = [needs[0], needs[3], needs[4]]
            grads[0], grads[3], grads[4] = NORM_BACKWARD(
                grad_h.contiguous(), full.contiguous(), mean, rstd, gain, *shape, ctx.groups, wanted
            )
            grads[0] = None if grads[0] is None else grads[0].to(x.dtype)
        full_precision = gain.dtype
        return (*grads, None, None, None, *(None if g is None else g.to(full_precision) for g in (grad_weight, grad_bias)))


def _normalised(x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float) -> Any:
    """Group norm, its mean and its reciprocal deviation."""
    return torch.native_group_norm(x.contiguous(), gain, offset, len(x), x.shape[1], x[0, 0].numel(), groups, eps)


class ResBlock(nn.Module):
    """LDM/ADM residual block; with embed_dim the embedding (B, embed_dim) is added, or scales and shifts the second norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int = 0,
        dropout: float = 0.0,
        scale_shift: bool = False,
        zero_init: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.first = NormActConv(in_channels, out_channels, eps)
        self.embed = nn.Linear(embed_dim, out_channels * (1 + scale_shift)) if embed_dim else None
        self.second = NormActConv(out_channels, out_channels, eps, dropout, zero_init)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h, scale, shift = self.first(x), None, None
        if self.embed is not None and embedding is not None:
            modulation = self.embed(F.silu(embedding))[:, :, None, None]
            if self.scale_shift:
                scale, shift = modulation.chunk(2, dim=1)
            else:
                h = h + modulation
        return self.skip(x) + self.second(h, scale, shift)


class Downsample(nn.Module):
    """Strided 3x3 convolution; asymmetric padding (right, bottom) as in the published autoencoders, symmetric as in ADM."""

    def __init__(self, channels: int, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
