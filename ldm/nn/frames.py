"""What mixes the frames of clips."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import attend, timestep_embedding
from ldm.nn.blocks import zero


class FrameMixing(nn.Module):
    """x (B*T, C, h, w) -> the same: at each position a convolution over 3 frames, then attention over all T (heads 0: none).

    Both begin as nothing, so that a UNet of images becomes one of clips which at first makes the same (section 3.1, arXiv:2304.08818).
    """

    def __init__(self, channels: int, frames: int, heads: int) -> None:
        super().__init__()
        self.frames, self.heads = frames, heads
        self.norm_conv = nn.LayerNorm(channels)
        self.conv = zero(nn.Conv1d(channels, channels, 3, padding=1))
        if heads:
            self.norm = nn.LayerNorm(channels)
            self.qkv = nn.Linear(channels, 3 * channels)
            self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = x.unflatten(0, (-1, self.frames)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B*h*w, T, C)
        tokens = tokens + self.conv(F.silu(self.norm_conv(tokens)).transpose(1, 2)).transpose(1, 2)
        if self.heads:
            places = timestep_embedding(tokens.new_ones(self.frames).cumsum(0), tokens.shape[2]).to(tokens)
            q, k, v = self.qkv(self.norm(tokens) + places).chunk(3, dim=2)
            tokens = tokens + self.out(attend(q, k, v, self.heads))
        return tokens.unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2).flatten(0, 1)
