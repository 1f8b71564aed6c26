"""Wrappers Denoise -> Denoise around any model's D: mixtures and windows; and interpolation of noise."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.devices import factor, send
from ldm.interfaces import Denoise


def mixture(one: Denoise, other: Denoise, weight: Tensor) -> Denoise:
    """D between those of two conditions; weight (B,) of the other."""
    return lambda x, sigma: torch.lerp(one(x, sigma), other(x, sigma), factor(weight, x))


def windows(make: Callable[[], Denoise], size: tuple[int, int], overlap: float = 0.5) -> Denoise:
    """D for latents larger than `size` (h, w): the mean of D in overlapping windows of that size (MultiDiffusion, arXiv:2302.08113), which
    count less towards their edges, so that these leave no seams (arXiv:2302.02412; here as sin^2).

    make() gives the D of a window: each has its own, as guidance may remember the steps before.
    """
    inside: dict[tuple[int, int], Denoise] = {}

    def joined(x: Tensor, sigma: Tensor) -> Tensor:
        weight = send(torch.outer(_fading(min(size[0], x.shape[2])), _fading(min(size[1], x.shape[3]))).to(x.dtype), x.device)
        total, count = torch.zeros_like(x), x.new_zeros(x.shape[2:])
        for top, left in window_starts(x.shape[2:], size, overlap):
            denoise = inside.setdefault((top, left), make())
            part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
            total[part] += weight * denoise(x[part], sigma)
            count[part[1:]] += weight
        return total / count

    return joined


def window_starts(whole: Sequence[int], part: Sequence[int], overlap: float = 0.5) -> list[tuple[int, int]]:
    """First row and column of each window of size `part` (h, w) that together cover `whole`."""

    def along(whole: int, part: int) -> list[int]:
        count = 1 if whole <= part else math.ceil((whole - part) / (part * (1 - overlap))) + 1
        return [round(i * (whole - part) / max(count - 1, 1)) for i in range(count)]

    return [(top, left) for top in along(whole[0], part[0]) for left in along(whole[1], part[1])]


def _fading(count: int) -> Tensor:
    """Weights (count,) of a window, least at its edges."""
    return torch.sin(math.pi * (torch.arange(count) + 0.5) / count).square()


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation between two draws of noise of any shape: the result's length is between theirs."""
    angle = torch.acos((F.normalize(a.flatten(), dim=0) @ F.normalize(b.flatten(), dim=0)).clamp(-1, 1))
    one, other = (torch.sin(share * angle) / torch.sin(angle) for share in (1 - weight, weight))
    return torch.where(angle < 1e-4, torch.lerp(a, b, weight), one * a + other * b)
