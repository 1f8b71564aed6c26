"""An invisible watermark of 16 bits in the brightness of a picture, which survives JPEG and cropping.

A pattern with a period of 32 px, of wavelengths that JPEG keeps (5 to 13 px), is added with an amplitude of about two levels in 255.  It is
found again by folding what is left of the picture without its median-filtered version into one period and comparing with all 1,024 places
of the pattern: spread-spectrum watermarking (Cox et al. 1997, doi:10.1109/83.650120).  The package invisible-watermark wants 256 px.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.degradations import LUMA

PERIOD = 32  # px
BITS = (1, 1, -1, 1, 1, -1, -1, -1, 1, -1, 1, 1, -1, 1, -1, -1)
AMPLITUDE = 2.0  # least standard deviation of the pattern, in levels of 255
THRESHOLD = 0.45  # of the cosine; tools/watermark_rates.py says what it misses and what it sees wrongly
SMALLEST = 48  # px of the short side


class Found(NamedTuple):
    score: float  # cosine between the folded picture and the pattern at its best place
    right: int  # of the 16 bits

    @property
    def marked(self) -> bool:
        return self.score >= THRESHOLD


@cache
def _patterns() -> tuple[Tensor, Tensor]:
    """Orthonormal patterns (16,32,32), one per bit, and their band in frequency space (32,32)."""
    frequency = torch.fft.fftfreq(PERIOD, dtype=torch.float64) * PERIOD
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    band = (radius >= 2.5) & (radius <= 6.5)
    noise = torch.from_numpy(np.random.RandomState(20260).standard_normal((len(BITS), PERIOD, PERIOD)))
    q, r = torch.linalg.qr(_filtered(noise, band).flatten(1).T)
    return (q * r.diagonal().sign()).T.reshape(-1, PERIOD, PERIOD), band


def _filtered(x: Tensor, band: Tensor) -> Tensor:
    return torch.fft.ifft2(torch.fft.fft2(x) * band).real


def _texture(pixels: Tensor) -> tuple[Tensor, float]:
    """Brightness (H,W) of uint8 (C,H,W) without its median over 9 rows, then columns, and the median of that, how rough it is."""
    luma = torch.einsum("chw,c->hw", pixels[: len(LUMA)].double().expand(3, -1, -1), torch.tensor(LUMA, dtype=torch.float64))
    padded = F.pad(luma[None, None], (4, 4, 4, 4), mode="replicate")[0, 0]
    texture = luma - padded.unfold(0, 9, 1).median(-1).values.unfold(1, 9, 1).median(-1).values
    return texture, float(texture.abs().median())


def _folded(pixels: Tensor) -> Tensor:
    """One period (32,32) in the band: means over the picture, in which edges do not count."""
    texture, roughness = _texture(pixels)
    flat = texture * torch.exp(-0.5 * (texture / max(4.0, roughness)).square())
    rows, columns = (torch.arange(side) % PERIOD for side in flat.shape)
    places = (rows[:, None] * PERIOD + columns).flatten()
    sums, counts = (torch.zeros(PERIOD**2, dtype=torch.float64).index_add_(0, places, v.flatten()) for v in (flat, torch.ones_like(flat)))
    return _filtered((sums / counts.clamp(min=1)).view(PERIOD, PERIOD), _patterns()[1])


def check(pixels: Tensor) -> Found:
    """uint8 (C,H,W)."""
    patterns, _ = _patterns()
    bits, folded = torch.tensor(BITS, dtype=torch.float64), _folded(pixels)
    template = torch.einsum("k,kij->ij", bits, patterns) / len(BITS) ** 0.5
    match = torch.fft.ifft2(torch.fft.fft2(folded) * torch.fft.fft2(template).conj()).real / folded.norm().clamp(min=1e-9)
    row, column = divmod(int(match.argmax()), PERIOD)
    read = torch.einsum("kij,ij->k", patterns, torch.roll(folded, (-row, -column), (0, 1)))
    return Found(float(match.max()), int((read.sign() == bits).sum()))


def mark(pixels: Tensor) -> Tensor:
    """uint8 (C,H,W), 1 grey, 3 RGB, 4 RGBA -> the same with a watermark, up to three times louder where it would not be found; bits that
    the picture drowns get more of it."""
    height, width = pixels.shape[1:]
    if min(height, width) < SMALLEST:
        raise ValueError(f"a picture of {width}x{height} px is too small for a watermark: it needs {SMALLEST} px on each side")
    patterns, _ = _patterns()
    bits, strengths = torch.tensor(BITS, dtype=torch.float64), torch.ones(len(BITS), dtype=torch.float64)
    for louder in (1.0, 1.0, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0):
        period = torch.einsum("k,k,kij->ij", strengths, bits, patterns)
        period = period * (louder * AMPLITUDE / period.square().mean().sqrt())
        tiled = period.repeat(-(-height // PERIOD), -(-width // PERIOD))[:height, :width]
        marked = torch.cat([(pixels[:3] + tiled).round().clamp(0, 255).to(torch.uint8), pixels[3:]])
        folded = _folded(marked)
        read = bits * torch.einsum("kij,ij->k", patterns, folded) * len(BITS) ** 0.5 / folded.norm().clamp(min=1e-9)
        if read.mean() >= THRESHOLD + 0.15 and (read > 0.5 * read.mean()).all():
            break
        strengths = (strengths + 0.5 * (1 - read / read.mean().clamp(min=1e-9)).clamp(0, 2)).clamp(max=4)
    return marked
