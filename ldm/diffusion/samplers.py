"""Samplers: one frozen dataclass each, a loop over D(x, sigma) in x = z0 + sigma * eps.  A new one touches only this file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.interfaces import Denoise, Noise, Sampler


@dataclass(frozen=True)
class Ancestral(Sampler):
    """eta = 0: DDIM; eta = 1 over all T steps: DDPM (Eqs. 12 and 16, arXiv:2010.02502).  One call per step."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; allowed is 0 (DDIM) to 1 (DDPM)")

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        for s, s_next in pairwise(sigmas):
            z0 = denoise(x, s)
            up = self.eta * s_next * (1 - (s_next / s) ** 2).sqrt()
            down = (s_next**2 - up**2).sqrt()
            x = torch.lerp(z0, x, float(down / s))
            if up > 0:
                x = x + float(up) * noise()
            yield x


@dataclass(frozen=True)
class Heun(Sampler):
    """Second-order Heun on dx/dsigma = (x - D) / sigma (Algorithm 1, arXiv:2206.00364).  Two calls per step, one in the last."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        for s, s_next in pairwise(sigmas):
            step = float(s_next - s)
            slope = (x - denoise(x, s)) / float(s)
            end = x + step * slope
            if s_next > 0:
                slope = (slope + (end - denoise(end, s_next)) / float(s_next)) / 2
            x = x + step * slope
            yield x


@dataclass(frozen=True)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M) (Algorithm 2, arXiv:2211.01095) in lambda = -log sigma.  One call per step."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        before, h_before = None, None
        for s, s_next in pairwise(sigmas):
            z0, h = denoise(x, s), (s / s_next).log()
            estimate = z0
            if before is not None and h_before is not None and s_next > 0:
                estimate = torch.lerp(before, z0, float(1 + h / (2 * h_before)))
            x = torch.lerp(estimate, x, float(s_next / s))
            before, h_before = z0, h
            yield x
