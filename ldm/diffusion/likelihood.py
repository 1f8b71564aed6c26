"""How probable a model thinks data is: the variational bound and the probability-flow ODE, in nats; `bits_per_dim` converts.

Both are of z0 as the schedule's lowest noise level leaves it; of latents they say nothing about the images' own likelihood.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.variance import data_variance, half_loss, step_kl, step_variance
from ldm.interfaces import Denoise


class Bins(NamedTuple):
    """The grid on which data lie, per channel, each (C,1,1): 8-bit images in [-1, 1] have bins of 2/255."""

    width: Tensor
    low: Tensor  # the lowest value, whose bin reaches down to -infinity
    high: Tensor  # the highest, whose bin reaches up to infinity


def bits_per_dim(nats: Tensor, z: Tensor) -> Tensor:
    """nats (..., B) of samples z (B,C,h,w), averaged over the batch -> (...)."""
    return nats.mean(-1) / z[0].numel() / math.log(2)


def per_sample(a: Tensor) -> Tensor:
    return a.flatten(1).sum(1)


def variational_bound(
    denoise: Denoise, z0: Tensor, sigmas: Tensor, noise: Callable[[], Tensor], bins: Bins | None = None,
    learned: Callable[[], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(T+1, B) terms of -log p(z0) <= sum, for sigmas (T,) increasing: L_0, L_1 .. L_{T-1}, L_T (Eq. 5, arXiv:2006.11239).

    learned: what a network says of the variances (B,C,h,w) at the last call of denoise (variance.py).  Without it they are the
    posterior's, and L_t is half the loss of SNR times the squared error of D (Eq. 13, arXiv:2107.00630).  L_0 is a Gaussian density, or,
    for data on a grid, the probability of a bin (Eq. 13, arXiv:2006.11239).
    """
    levels, fixed = sigmas.double(), -torch.ones_like(z0, dtype=torch.float64)

    def at(level: int) -> tuple[Tensor, Tensor]:
        """z0 - D, and what says which variance."""
        error = (z0 - denoise(z0 + float(levels[level]) * noise(), sigmas[level])).double()
        return error, fixed if learned is None else learned().double()

    steps = []
    for level, (low, high) in enumerate(pairwise(levels), 1):
        error, fraction = at(level)
        steps.append(per_sample(step_kl(error.square(), high, low, step_variance(high, low, fraction))))
    error, fraction = at(0)
    log_variance = data_variance(levels[0], levels[1], fraction) if learned is not None else (2 * levels[0].log()).expand_as(error)
    if bins is not None:
        half, edge, spread = bins.width.double() / 2, bins.width / 4, torch.exp(0.5 * log_variance)
        upper = torch.where(z0 > bins.high - edge, math.inf, error + half) / spread
        lower = torch.where(z0 < bins.low + edge, -math.inf, error - half) / spread
        inside = torch.special.ndtr(upper) - torch.special.ndtr(lower)
        start = per_sample(-inside.clamp(min=1e-12).log())
    else:
        start = per_sample(half_loss(error.square(), log_variance) + 0.5 * math.log(2 * math.pi))
    # N(a z0, 1 - a^2) against N(0, 1), a^2 = 1 / (1 + sigma_T^2)
    signal = 1 / (1 + float(levels[-1]) ** 2)
    end = per_sample(0.5 * (signal * z0.double().square() - signal - math.log1p(-signal)))
    return torch.stack([start, *steps, end])


def log_likelihood(denoise: Denoise, z0: Tensor, sigmas: Tensor, probe: Callable[[], Tensor]) -> Tensor:
    """log p(z0) (B,) by the probability-flow ODE from sigmas[0] up to sigmas[-1], Heun's method (section 4.3, arXiv:2011.13456).

    probe draws (B,C,h,w) of mean 0 and variance 1, for Hutchinson's estimate of the divergence; +-1 has the least variance.
    """
    vector, x, total = probe(), z0, torch.zeros(len(z0), dtype=torch.float64, device=z0.device)
    for low, high in pairwise(sigmas.double()):
        slope, growth = _flow(denoise, x, low, vector)
        end_slope, end_growth = _flow(denoise, x + float(high - low) * slope, high, vector)
        x = x + float(high - low) * (slope + end_slope) / 2
        total = total + float(high - low) * (growth + end_growth) / 2
    variance = 1 + float(sigmas[-1]) ** 2
    prior = -0.5 * per_sample(x.double().square() / variance + math.log(2 * math.pi * variance))
    return prior + total


def _flow(denoise: Denoise, x: Tensor, sigma: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """dx/dsigma and its divergence (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = (x - denoise(x, sigma)) / float(sigma)
        (product,) = torch.autograd.grad(slope, x, vector)
    return slope.detach(), per_sample((product * vector).double())
