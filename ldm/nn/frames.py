"""What mixes the frames of clips."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.blocks import group_norm, zero


class FrameMixing(nn.Module):
    """x (B*T, C, h, w) -> the same: at each position a convolution over 3 frames, at first nothing (section 3.1, arXiv:2304.08818)."""

    def __init__(self, channels: int, frames: int, eps: float) -> None:
        super().__init__()
        self.frames = frames
        self.norm = group_norm(channels, eps)
        self.conv = zero(nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(F.silu(self.norm(x)).unflatten(0, (-1, self.frames)).transpose(1, 2))
        return x + mixed.transpose(1, 2).flatten(0, 1)
