"""Residual block and resampling, shared by the autoencoder and the UNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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

    def _forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return self.conv(self.activated(x, scale, shift))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the compiler chooses what to recompute
            # the recomputation stops at the last tensor that backward needs: the convolution's input
            return checkpoint(self._forward, x, scale, shift, use_reentrant=False, preserve_rng_state=self.dropout > 0)
        return self._forward(x, scale, shift)


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
