"""The encoder and decoder of LDM's published autoencoders (arXiv:2112.10752, appendix E.1)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import SelfAttention
from ldm.nn.blocks import Downsample, NormActConv, ResBlock, Upsample


def middle(width: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(width, width), SelfAttention(width, heads=1), ResBlock(width, width))


class Encoder(nn.Module):
    """x (B, in_channels, H, W) -> (B, out_channels, h, w); level i works at H / (patch * 2^i)."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, multipliers: Sequence[int], num_blocks: int,
        attention_levels: Sequence[int], patch: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = patch
        self.stem = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        layers: list[nn.Module] = []
        width = channels
        for level, multiplier in enumerate(multipliers):
            for _ in range(num_blocks):
                layers.append(ResBlock(width, width := channels * multiplier))
                if level in attention_levels:
                    layers.append(SelfAttention(width, heads=1))
            if level < len(multipliers) - 1:
                layers.append(Downsample(width, asymmetric=True))
        self.layers = nn.Sequential(*layers, middle(width))
        self.head = NormActConv(width, out_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(F.pixel_unshuffle(x, self.patch))))


class Decoder(nn.Module):
    """z (B, in_channels, h, w) -> (B, out_channels, H, W): the encoder's mirror image, one block more per level."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, multipliers: Sequence[int], num_blocks: int,
        attention_levels: Sequence[int], patch: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = patch
        width = channels * multipliers[-1]
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        layers: list[nn.Module] = [middle(width)]
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(num_blocks + 1):
                layers.append(ResBlock(width, width := channels * multiplier))
                if level in attention_levels:
                    layers.append(SelfAttention(width, heads=1))
            if level > 0:
                layers.append(Upsample(width))
        self.layers = nn.Sequential(*layers)
        self.head = NormActConv(width, out_channels * patch**2, eps=1e-6)
        self._body: list[Body] = []  # a list hides it from the parts

    def forward(self, z: Tensor) -> Tensor:
        out = self.head.conv(self._body[0](z)) if self._body else self.head(self.layers(self.stem(z)))
        return F.pixel_shuffle(out, self.patch)

    def body(self) -> "Body":
        """All but the last convolution, which is run from here on: compiled, it leaves out the layer whose gradient the adaptive weight
        asks for, which so does not run through a compiled decoder."""
        self._body = [Body(self)]
        return self._body[0]


class Body(nn.Module):
    """All of a decoder but its last convolution, as a module that can be compiled; it shares the decoder's parts."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = [decoder]

    def forward(self, z: Tensor) -> Tensor:
        decoder = self._decoder[0]
        return decoder.head.activated(decoder.layers(decoder.stem(z)))
