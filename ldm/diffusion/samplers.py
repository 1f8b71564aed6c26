"""Samplers: one frozen dataclass each, a loop over D(x, sigma) in x = z0 + sigma * eps.  More of them: multistep.py.

In these coordinates the probability-flow ODE is dx/dsigma = eps(x, sigma) = (x - D) / sigma, and in lambda = -log sigma it is
d(x/sigma)/dlambda = D / sigma: DDIM is Euler's method in either.  The last noise level may be 0; nothing is evaluated there.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interfaces import Denoise, Noise, Sampler


def ancestral_split(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step to noise level `down`, then add `up` of new noise (Eq. 16, arXiv:2010.02502); eta 0 adds none."""
    up = eta * s_next * math.sqrt(max(0.0, 1 - (s_next / s) ** 2))
    return math.sqrt(max(0.0, s_next**2 - up**2)), up


def levels(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    """Pairs of successive noise levels."""
    return pairwise(sigmas.double().tolist())


@dataclass(frozen=True)
class Stochastic(Sampler):
    """Solvers that may add noise: `eta` of that of the reverse SDE."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}; allowed is 0 (no new noise) to 1")

    @property
    def ancestral(self) -> bool:
        return self.eta == 1


@dataclass(frozen=True)
class Ancestral(Stochastic):
    """eta = 0: DDIM; eta = 1 over all T steps: DDPM (Eqs. 12 and 16, arXiv:2010.02502).  One call per step."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        for i, (s, s_next) in enumerate(levels(sigmas)):
            down, up = ancestral_split(s, s_next, self.eta)
            x = torch.lerp(denoise(x, sigmas[i]), x, down / s)
            if up > 0:
                x = x + up * noise()
            yield x


@dataclass(frozen=True)
class DDIM(Ancestral):
    """Ancestral under its best known name: deterministic by default (arXiv:2010.02502)."""


@dataclass(frozen=True)
class DDPM(Ancestral):
    """Ancestral under its best known name: all of the posterior's noise by default (arXiv:2006.11239)."""

    eta: float = 1.0


@dataclass(frozen=True)
class LCM(Sampler):
    """Multistep consistency sampling (Algorithm 1, arXiv:2303.01469): denoise wholly, noise again.  For distilled models."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        for i, (_, s_next) in enumerate(levels(sigmas)):
            x = denoise(x, sigmas[i])
            if s_next > 0:
                x = x + s_next * noise()
            yield x


@dataclass(frozen=True)
class Churned(Sampler):
    """Solvers that may add noise before a step (Algorithm 2, arXiv:2206.00364): `churn` is S_churn, between levels low and high."""

    churn: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise_scale: float = 1.0

    @abstractmethod
    def step(self, denoise: Denoise, x: Tensor, s: float, s_next: float) -> Tensor: ...

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        gamma = min(self.churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        for s, s_next in levels(sigmas):
            raised = s * (1 + gamma) if self.low <= s <= self.high else s
            if raised > s:
                x = x + math.sqrt(raised**2 - s**2) * self.noise_scale * noise()
            x = self.step(denoise, x, raised, s_next)
            yield x


@dataclass(frozen=True)
class Euler(Churned):
    """Euler's method on dx/dsigma; without churn it is DDIM.  One call per step."""

    def step(self, denoise: Denoise, x: Tensor, s: float, s_next: float) -> Tensor:
        return torch.lerp(denoise(x, _level(s)), x, s_next / s)


@dataclass(frozen=True)
class Heun(Churned):
    """Second-order Heun on dx/dsigma (Algorithm 1, arXiv:2206.00364).  Two calls per step, one in the last."""

    def step(self, denoise: Denoise, x: Tensor, s: float, s_next: float) -> Tensor:
        slope = (x - denoise(x, _level(s))) / s
        end = x + (s_next - s) * slope
        if s_next > 0:
            slope = (slope + (end - denoise(end, _level(s_next))) / s_next) / 2
        return x + (s_next - s) * slope


def _level(s: float) -> Tensor:
    return torch.tensor(s, dtype=torch.float64)


@dataclass(frozen=True)
class DPMSolverPP2S(Stochastic):
    """DPM-Solver++(2S), the midpoint method in lambda (Algorithm 1, arXiv:2211.01095); eta > 0: its SDE form, with new noise in both
    halves of a step.  Two calls per step, one in the last."""

    ancestral = False  # noise comes in halves

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        for i, (s, s_next) in enumerate(levels(sigmas)):
            z0 = denoise(x, sigmas[i])
            if s_next > 0:
                middle = math.sqrt(s * s_next)
                h = _gap(s, middle)
                kept, added = math.exp(-h * (1 + self.eta)), math.sqrt(-math.expm1(-2 * self.eta * h))
                early = middle * added * noise() if self.eta else 0 * x
                z0 = denoise(torch.lerp(z0, x, kept) + early, _level(middle))
                x = torch.lerp(z0, x, kept**2) + kept * early  # the noise of the first half is part of the whole step's
                x = x + s_next * added * noise() if self.eta else x
            else:
                x = z0
            yield x


@dataclass(frozen=True)
class DPMSolverPP2M(Stochastic):
    """DPM-Solver++(2M) (Algorithm 2, arXiv:2211.01095) in lambda; eta > 0: its SDE form (appendix of the same).  One call per step."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        before, h_before = x, 0.0
        for i, (s, s_next) in enumerate(levels(sigmas)):
            z0, h = denoise(x, sigmas[i]), _gap(s, s_next)
            estimate = z0
            if i > 0 and s_next > 0:
                estimate = torch.lerp(before, z0, 1 + h / (2 * h_before))
            x = _relax(x, estimate, h, self.eta, s_next, noise)
            before, h_before = z0, h
            yield x


@dataclass(frozen=True)
class DPMSolverPP3M(Stochastic):
    """The third-order multistep solver of the same family: a parabola through the last three D; eta > 0: SDE.  One call per step.

    The published code (also in diffusers and k-diffusion) takes half of the parabola's second derivative and so converges with order 2.
    """

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        past: list[tuple[Tensor, float]] = []  # D and the step before it, newest first
        for i, (s, s_next) in enumerate(levels(sigmas)):
            z0, h = denoise(x, sigmas[i]), _gap(s, s_next)
            correction = self._curvature(z0, past, h * (1 + self.eta)) if past and s_next > 0 else 0
            x = _relax(x, z0, h, self.eta, s_next, noise) + correction
            past = [(z0, h), *past[:1]]
            yield x

    def _curvature(self, z0: Tensor, past: list[tuple[Tensor, float]], h: float) -> Tensor:
        """What the first and second derivative of D add; h includes the SDE's factor 1 + eta."""
        h1 = past[0][1] * (1 + self.eta)
        phi2 = math.expm1(-h) / h + 1
        first = (z0 - past[0][0]) * (h / h1)
        if len(past) == 1:
            return phi2 * first
        h2 = past[1][1] * (1 + self.eta)
        older = (past[0][0] - past[1][0]) * (h / h2)
        second = (first - older) * (h / (h1 + h2))
        slope = first + second * (h1 / h)
        return phi2 * slope + (1 - 2 * phi2 / h) * second


def _gap(s: float, s_next: float) -> float:
    """The step in lambda = -log sigma."""
    return math.log(s / s_next) if s_next > 0 else math.inf


def _relax(x: Tensor, z0: Tensor, h: float, eta: float, s_next: float, noise: Noise) -> Tensor:
    """The exact solution over a step h of lambda for a constant D, with eta of the SDE's noise."""
    x = torch.lerp(z0, x, math.exp(-h * (1 + eta)))
    return x + s_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise() if eta and s_next > 0 else x


@dataclass(frozen=True)
class RePaint(Sampler):
    """Each step of another sampler `times` times, noised again in between (Algorithm 1, arXiv:2201.09865, jumps of one step): what is
    inpainted comes to agree with what is known.  `times` calls per call of the other."""

    sampler: Sampler = field(default_factory=lambda: Ancestral(1.0))
    times: int = 5

    def __post_init__(self) -> None:
        if self.times < 1:
            raise UserError(f"RePaint's times is {self.times}; allowed is 1 or more")

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        for i, (s, s_next) in enumerate(levels(sigmas)):
            for _ in range(self.times - 1 if s_next > 0 else 0):
                x = self.sampler.sample(denoise, x, sigmas[i : i + 2], noise) + math.sqrt(s**2 - s_next**2) * noise()
            x = self.sampler.sample(denoise, x, sigmas[i : i + 2], noise)
            yield x


def inverted(sigmas: Tensor) -> Tensor:
    """The noise levels of a sampling run, upwards: with them a deterministic sampler turns an image's latents into noise (DDIM inversion,
    appendix F of arXiv:2105.05233).  The first is the lowest level above 0, at which z0 itself stands in for x."""
    return sigmas[sigmas > 0].flip(0)
