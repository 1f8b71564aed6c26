"""The classifier of noisy latents: the UNet's way down (section 4.1, arXiv:2105.05233)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm import interfaces
from ldm.interfaces import Cond, required
from ldm.nn.attention import SelfAttention, timestep_embedding
from ldm.nn.blocks import ResBlock, group_norm
from ldm.nn.unet import EPS, Stage, descent


class UNetClassifier(interfaces.Classifier):
    """Logits of x (B, in_channels, h, w), h and w divisible by 2^(levels - 1), of the last map's mean.  Arguments as the UNet's."""

    def __init__(
        self,
        in_channels: int | None = None,
        num_classes: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 1,
        attention_levels: Sequence[int] = (1, 2),
        head_channels: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        in_channels = required(in_channels, "the classifier's in_channels")
        num_classes = required(num_classes, "the classifier's num_classes")
        self.in_channels, self.num_classes, self.channels = in_channels, num_classes, channels
        embed_dim = 4 * channels

        def stage(ins: int, outs: int, level: int) -> Stage:
            block = ResBlock(ins, outs, embed_dim, dropout, scale_shift=True, zero_init=True, eps=EPS)
            count = max(1, outs // head_channels)
            return Stage(block, SelfAttention(outs, count, zero_init=True, eps=EPS) if level in attention_levels else None)

        self.time_embed = nn.Sequential(nn.Linear(channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, widths = descent(channels, multipliers, num_blocks, stage)
        self.class_head = "head"  # its module with a row per class
        self.norm, self.head = group_norm(widths[-1], EPS), nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding, h = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype)), self.stem(x)
        for layer in self.down:
            h = layer(h, embedding, Cond()) if isinstance(layer, Stage) else layer(h)
        return self.head(F.silu(self.norm(h)).mean((2, 3)))
