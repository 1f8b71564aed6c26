"""Invisible watermark of 16 bits in the luma of a picture, which survives JPEG and cropping.

The pattern has a period of 32 px: 4x4 blocks of 8x8 px, in each one cosine of JPEG's, whose sign is a bit.
On flat ground it changes a pixel by one level of 255, in texture by more (perceptual masking).  It is found
by folding what a median filter takes away, weighted with its inverse variance, into one period and comparing
with all 1,024 places of the pattern: spread-spectrum watermarking (Cox et al. 1997, doi:10.1109/83.650120).
docs/watermark.md says how often it is found, and what it promises.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.degradations import LUMA
from ldm.errors import UserError

PERIOD = 32  # px
BITS = (1, 1, -1, 1, 1, -1, -1, -1, 1, -1, 1, 1, -1, 1, -1, -1)
SMALLEST = 48  # px of the short side: 2.25 cells of the period squared
# Of the cosine.  By chance it is exceeded once in a million pictures: the tail of a cosine of two vectors of
# 284 numbers, as many as _weights lets pass, times 1,024 places.
THRESHOLD = 0.35
# The same chance for the place where `mark` begins, which only cropping and outpainting change.
ORIGIN_THRESHOLD = 0.28
# Of the 16 bits.  Two or three cosines in an otherwise flat JPEG can reach the thresholds: not in 13 blocks.
MIN_RIGHT = 13
# From here on what is left of a mark says where a new one is put.  By chance one picture in 10,000 has it.
_TRACE = 0.3

# Vertical and horizontal index of the DCT-II of each block (JPEG, ITU-T T.81, A.3.3), with steps of at most 6
# levels in JPEG's luma table at quality 80, so that even half a level survives.  Of 24,000 random orders this
# one is the least like itself elsewhere (test_the_pattern_is_unlike_itself_elsewhere).
_COSINES = (
    *((0, 2), (3, 0), (2, 1), (1, 1)),
    *((1, 1), (2, 0), (1, 2), (2, 2)),
    *((2, 2), (0, 2), (0, 3), (2, 1)),
    *((2, 0), (0, 3), (3, 0), (1, 2)),
)
_BLOCK = 8  # px
# Amplitudes, in levels on flat ground and in standard deviations of texture, and the score from which they
# are enough: the first that are.  Half a level, on one side only, does where much of the picture is flat.
_AMPLITUDES = ((0.5, 0.1, 0.7), *((1.0, rough, 0.6) for rough in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)))
_LOUDEST = 8.0  # levels
# Median of nine numbers: what to put in order, one after the other (Devillard 1998, opt_med9); it ends in 4.
_EXCHANGES = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)


class Found(NamedTuple):
    """Result of a search for the watermark."""

    score: float  # cosine between the folded picture and the pattern at its place, at most 1
    right: int  # of the 16 bits
    place: tuple[int, int]  # row, column of the pattern's first pixel, in [0, 32)

    @property
    def marked(self) -> bool:
        """Whether the picture has the watermark."""
        threshold = ORIGIN_THRESHOLD if self.place == (0, 0) else THRESHOLD
        return self.score >= threshold and self.right >= MIN_RIGHT


def check(pixels: Tensor) -> Found:
    """Search a picture, uint8 (C,H,W) of 1 (grey), 3 (RGB) or 4 (RGBA) channels, for the watermark."""
    spectrum = torch.fft.fft2(_folded(_luma(pixels))) * _weights()
    pattern = torch.fft.fft2(_pattern()) * _weights()
    norm = (spectrum.norm() * pattern.norm()).clamp(min=1e-6)
    cosines = torch.fft.ifft2(spectrum * pattern.conj()).real * (PERIOD**2 / norm)
    row, column = divmod(int(cosines.argmax()), PERIOD)
    if cosines[row, column] < THRESHOLD and cosines[0, 0] >= ORIGIN_THRESHOLD:
        row, column = 0, 0
    cell = torch.roll(torch.fft.ifft2(spectrum).real, (-row, -column), (0, 1))
    signs = torch.einsum("kij,ij->k", _patterns(), cell).sign()
    return Found(float(cosines[row, column]), int((signs == torch.tensor(BITS)).sum()), (row, column))


def mark(pixels: Tensor, where: Tensor | None = None) -> Tensor:
    """Return a picture, uint8 (C,H,W) of 1 (grey), 3 (RGB) or 4 (RGBA) channels, with the watermark.

    where: bool (H,W), the pixels that may change (made anew); all others stay bit-equal, as does alpha.
    The picture itself is returned if it has the watermark, and if it cannot be made to be found in it.
    Raises UserError for pictures of less than 48 px on a side.
    """
    height, width = pixels.shape[1:]
    if min(height, width) < SMALLEST:
        needed = f"it needs {SMALLEST} px on each side"
        raise UserError(f"a picture of {width}x{height} px is too small for a watermark: {needed}")
    if where is not None and where.shape != pixels.shape[1:]:
        raise ValueError(f"where has the shape {tuple(where.shape)}, the picture has {height}x{width} px")
    before = check(pixels)
    if before.marked:
        return pixels
    # An outpainted picture has moved against the period: what is left of its mark is continued where it is.
    cell = torch.roll(_pattern(), before.place if before.score >= _TRACE else (0, 0), (0, 1))
    pattern = cell.repeat(-(-height // PERIOD), -(-width // PERIOD))[:height, :width] * PERIOD
    luma = _luma(pixels)
    texture = _texture(luma)
    best, found = pixels, before
    for flat, rough, enough in _AMPLITUDES:
        amplitude = (flat + rough * texture).clamp(max=_LOUDEST)
        change = _change(pattern, amplitude, luma)
        change = change if where is None else change * where
        marked = torch.cat([(pixels[:3] + change).round().clamp(0, 255).to(torch.uint8), pixels[3:]])
        now = check(marked)
        if (now.marked, now.score) > (found.marked, found.score):
            best, found = marked, now
        if found.score >= enough:
            break
    return best if found.marked else pixels


def _change(pattern: Tensor, amplitude: Tensor, luma: Tensor) -> Tensor:
    """Change of each pixel in levels, float (H,W), for a pattern of unit variance and amplitudes, (H,W)."""
    # Nearly square waves: of all waves with this amplitude they have the largest JPEG coefficient.
    wave = (2 * pattern).clamp(-1, 1) * amplitude
    # Less than a level either way is one level on one side only: where there is room for it, so that white
    # gets darker and black brighter.
    one_sided = torch.where(luma < 128, (pattern > 0).float(), -(pattern < 0).float())
    return torch.where(amplitude < 1, one_sided, wave)


@cache
def _patterns() -> Tensor:
    """Orthonormal patterns (16,32,32), one per bit: one cosine in one block of 8x8 px each."""
    side, middle = PERIOD // _BLOCK, torch.arange(_BLOCK) + 0.5
    patterns = torch.zeros(len(BITS), side, _BLOCK, side, _BLOCK)
    for bit, (v, u) in enumerate(_COSINES):
        rows, columns = (torch.cos(math.pi / _BLOCK * index * middle) for index in (v, u))
        cosine = rows[:, None] * columns
        patterns[bit, bit // side, :, bit % side] = cosine / cosine.norm()
    return patterns.reshape(-1, PERIOD, PERIOD)


@cache
def _pattern() -> Tensor:
    """One period (32,32) of the watermark, of norm 1."""
    return torch.einsum("k,kij->ij", torch.tensor(BITS, dtype=torch.float32), _patterns()) / len(BITS) ** 0.5


@cache
def _weights() -> Tensor:
    """Weight (32,32) of each frequency in the comparison: the band of the pattern, whitened.

    The higher the frequency, the less of natural pictures is in the residue of a median filter.
    """
    frequency = torch.fft.fftfreq(PERIOD) * PERIOD
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    return radius.sqrt() * ((radius >= 1.5) & (radius <= 9.5))


def _luma(pixels: Tensor) -> Tensor:
    """Luma float (H,W) of uint8 (C,H,W); alpha does not count."""
    return torch.einsum("chw,c->hw", pixels[:3].float().expand(3, -1, -1), torch.tensor(LUMA))


def _folded(luma: Tensor) -> Tensor:
    """One period (32,32): sums over the picture (H,W) of what a median filter takes away, over its variance.

    The weights are those of a matched filter in noise of local variance, to which 0.5 is added: on flat
    ground the mark and rounding are all that is measured.
    """
    residue = luma - _median(_median(luma, 0), 1)
    variance = _mean(residue.square(), 5) + 0.5
    # Where a pixel sticks out of its surroundings it is an edge: that much says no more about the mark.
    deviation = variance.sqrt()
    weighted = residue.clamp(-deviation, deviation) / variance
    height, width = luma.shape
    cells = F.pad(weighted, (0, -width % PERIOD, 0, -height % PERIOD))
    return cells.unflatten(1, (-1, PERIOD)).unflatten(0, (-1, PERIOD)).sum((0, 2))


def _texture(luma: Tensor) -> Tensor:
    """Standard deviation (H,W) in 3x3 px of luma (H,W), the least within 3 px.

    The least, since the flat side of an edge hides nothing: only what is rough all around does.
    """
    deviation = (_mean(luma.square(), 3) - _mean(luma, 3).square()).clamp(min=0).sqrt()
    return -F.max_pool2d(-F.pad(deviation[None], (3, 3, 3, 3), mode="replicate"), 7, 1)[0]


def _mean(x: Tensor, size: int) -> Tensor:
    """Mean over size x size px (H,W) of x (H,W), whose border is repeated."""
    return F.avg_pool2d(F.pad(x[None], (size // 2,) * 4, mode="replicate"), size, 1)[0]


def _median(x: Tensor, axis: int) -> Tensor:
    """Median over nine pixels along an axis (H,W) of x (H,W), whose border is repeated."""
    # torch.median over windows takes five times as long.
    padding = (0, 0, 4, 4) if axis == 0 else (4, 4, 0, 0)
    padded = F.pad(x[None], padding, mode="replicate")[0]
    shifted = [padded.narrow(axis, offset, x.shape[axis]) for offset in range(9)]
    for low, high in _EXCHANGES:
        shifted[low], shifted[high] = (
            torch.minimum(shifted[low], shifted[high]),
            torch.maximum(shifted[low], shifted[high]),
        )
    return shifted[4]
