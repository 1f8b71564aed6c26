"""The ADM/LDM UNet (arXiv:2105.05233, arXiv:2112.10752)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError, require_at_least
from ldm.frames import merge_frames, split_frames
from ldm.interfaces import Cond, Network, required
from ldm.nn.attention import SelfAttention, SpatialTransformer, timestep_embedding
from ldm.nn.blocks import Downsample, NormActConv, ResBlock, Upsample
from ldm.nn.frames import FrameMixing

EPS = 1e-5


class Stage(nn.Module):
    """A residual block, attention where the level has it, mixing of frames in clips, and a resampling where the level ends."""

    def __init__(
        self, block: ResBlock, attention: nn.Module | None, resample: nn.Module | None = None, frames: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block, self.attention, self.resample, self.frames = block, attention, resample, frames

    def forward(self, x: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        x = self.block(x, embedding)
        if isinstance(self.attention, SpatialTransformer):
            x = self.attention(x, cond.tokens, cond.mask)
        elif self.attention is not None:
            x = self.attention(x)
        if self.frames is not None:
            x = self.frames(x)
        return x if self.resample is None else self.resample(x)


def descent(
    channels: int, multipliers: Sequence[int], num_blocks: int, stage: Callable[[int, int, int], Stage]
) -> tuple[nn.ModuleList, list[int]]:
    """The UNet's way down, and the widths of all feature maps on it, the stem's first.  stage takes widths in and out, and the level."""
    layers, widths = nn.ModuleList(), [channels]
    for level, multiplier in enumerate(multipliers):
        for _ in range(num_blocks):
            layers.append(stage(widths[-1], channels * multiplier, level))
            widths.append(channels * multiplier)
        if level < len(multipliers) - 1:
            layers.append(Downsample(widths[-1], asymmetric=False))
            widths.append(widths[-1])
    return layers, widths


class UNet(Network):
    """F(x, t, cond): x (B, in_channels, h, w) [+ cond.concat], h and w divisible by patch * 2^(levels - 1).

    channels * multipliers[i]: width of level i; attention_levels: the i with attention (the middle always has it);
    token_dim > 0: spatial transformers on cond.tokens; vector_dim > 0: cond.vector joins the time embedding;
    patch: the stem works on patch x patch unshuffled pixels, patch^2 times cheaper; heads > 0: so many everywhere (SD 1: 8), instead of
    heads of head_channels; recompute: stages keep only their input and run again in backward.
    frames: T > 1 for clips (B, T * in_channels, h, w): self-attention sees all frames, FrameMixing ends every stage, and the time
    embedding says which frame it is; the last two begin as nothing, so that frames that are alike come out as by a UNet of images.
    DiffusionStage fills in what is None: in_channels, vector_dim, token_dim, concat_channels, frames.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (1, 2),
        head_channels: int = 64,
        vector_dim: int | None = None,
        token_dim: int | None = None,
        concat_channels: int | None = None,
        scale_shift: bool = True,
        dropout: float = 0.0,
        patch: int = 1,
        heads: int = 0,
        learn_variance: bool = False,
        recompute: bool = False,
        frames: int | None = None,
    ) -> None:
        super().__init__()
        in_channels, frames = required(in_channels, "the UNet's in_channels"), 1 if frames is None else frames
        vector_dim, token_dim, concat_channels = vector_dim or 0, token_dim or 0, concat_channels or 0
        if bad := [level for level in attention_levels if not 0 <= level < len(multipliers)]:
            raise UserError(f"attention_levels has {bad[0]}; the UNet's levels are 0 to {len(multipliers) - 1}")
        require_at_least(1, frames=frames, multipliers=min(multipliers, default=0), patch=patch, num_blocks=num_blocks)
        require_at_least(1, channels=channels, head_channels=head_channels, heads=heads or 1)
        self.in_channels, self.concat_channels, self.frames = in_channels * frames, concat_channels * frames, frames
        self.vector_dim, self.token_dim, self.channels, self.patch = vector_dim, token_dim, channels, patch
        self.learn_variance, self.recompute = learn_variance, recompute
        self.multiple = patch * 2 ** (len(multipliers) - 1)
        embed_dim, area = 4 * channels, patch**2
        self.time_embed = nn.Sequential(nn.Linear(channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.vector_embed = nn.Linear(vector_dim, embed_dim) if vector_dim else None
        self.frame_embed = nn.Parameter(torch.zeros(frames, embed_dim)) if frames > 1 else None

        def attention(width: int, count: int) -> nn.Module:
            if token_dim:
                return SpatialTransformer(width, count, token_dim, dropout=dropout, frames=frames)
            return SelfAttention(width, count, zero_init=True, eps=EPS, frames=frames)

        def stage(ins: int, outs: int, attends: bool, upsample: bool = False) -> Stage:
            count = (heads or max(1, outs // head_channels)) if attends else 0
            return Stage(
                ResBlock(ins, outs, embed_dim, dropout, scale_shift, zero_init=True, eps=EPS),
                attention(outs, count) if attends else None,
                Upsample(outs) if upsample else None,
                FrameMixing(outs, frames, EPS) if frames > 1 else None,
            )

        self.stem = nn.Conv2d((in_channels + concat_channels) * area, channels, 3, padding=1)
        self.down, skips = descent(channels, multipliers, num_blocks, lambda ins, outs, level: stage(ins, outs, level in attention_levels))
        width = skips[-1]
        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for index in range(num_blocks + 1):
                ins, width = width + skips.pop(), channels * multiplier
                self.up.append(stage(ins, width, level in attention_levels, upsample=index == num_blocks and level > 0))
        self.head = NormActConv(width, in_channels * (1 + learn_variance) * area, EPS, zero_init=True)

    def run(self, stage: nn.Module, h: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        if not isinstance(stage, Stage):
            return stage(h)
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(stage, h, embedding, cond, use_reentrant=False)
        return stage(h, embedding, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if x.shape[-1] % self.multiple or x.shape[-2] % self.multiple:
            raise UserError(
                f"latents of {x.shape[-1]}x{x.shape[-2]} do not divide by {self.multiple}, which this UNet needs: "
                "choose another image size or fewer multipliers"
            )
        embedding = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))
        if self.vector_embed is not None:
            embedding = embedding + self.vector_embed(cond.vector)
        parts = [x] if cond.concat is None else [x, cond.concat.expand(len(x), -1, *x.shape[2:])]
        if self.frame_embed is not None:  # from here on each frame is a sample
            parts = [split_frames(part, self.frames) for part in parts]
            embedding, cond = (embedding[:, None] + self.frame_embed).flatten(0, 1), cond.repeat(self.frames)
        h = self.stem(F.pixel_unshuffle(torch.cat(parts, dim=1), self.patch))
        skips = [h]
        for layer in self.down:
            h = self.run(layer, h, embedding, cond)
            skips.append(h)
        for stage in self.middle:
            h = self.run(stage, h, embedding, cond)
        for stage in self.up:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), embedding, cond)
        out = F.pixel_shuffle(self.head(h), self.patch)
        if self.frames == 1:
            return out
        return torch.cat([merge_frames(part, self.frames) for part in out.chunk(1 + self.learn_variance, dim=1)], dim=1)
