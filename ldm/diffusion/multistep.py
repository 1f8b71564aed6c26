"""Samplers that fit polynomials to earlier evaluations: UniPC, LMS, DEIS, PLMS.  One call per step each."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.samplers import levels
from ldm.errors import UserError
from ldm.interfaces import Denoise, Noise, Sampler


@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC-p with B(h) = e^h - 1 (arXiv:2302.04867): the D at a new point also corrects the step that led there.  One call per step."""

    order: int = 2

    def __post_init__(self) -> None:
        require_order(self.order, 3)

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        past: list[tuple[float, Tensor]] = []  # lambda and D, newest first
        start, order = x, 1
        for i, (s, s_next) in enumerate(levels(sigmas)):
            point = (-math.log(s), denoise(x, sigmas[i]))
            if past:
                x = _exponential_step(start, past[0], [*past[1:order], point], point[0])
            past = [point, *past[: self.order - 1]]
            start, order = x, min(self.order, len(past))
            x = _exponential_step(x, past[0], past[1:order], -math.log(s_next)) if s_next > 0 else point[1]
            yield x


def _exponential_step(x: Tensor, here: tuple[float, Tensor], others: Sequence[tuple[float, Tensor]], end: float) -> Tensor:
    """From `here` to lambda = `end`, D a polynomial through `here` and `others`; with one other point the paper's simpler weight 1/2."""
    start, z0 = here
    h = end - start
    growth = math.expm1(-h)
    x = math.exp(-h) * x - growth * z0
    if not others:
        return x
    ratios = np.array([(point - start) / h for point, _ in others])
    phi, factorial, right = growth / -h - 1, 1, []
    for k in range(1, len(others) + 1):
        right.append(phi * factorial / growth)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    weights = np.linalg.solve(np.vander(ratios, increasing=True).T, right) if len(others) > 1 else [0.5]
    for weight, ratio, (_, value) in zip(weights, ratios, others, strict=True):
        x = x - growth * float(weight / ratio) * (value - z0)
    return x


def require_order(order: int, most: int) -> None:
    if not 1 <= order <= most:
        raise UserError(f"order is {order}; allowed is 1 to {most}")


@dataclass(frozen=True)
class LMS(Sampler):
    """Adams-Bashforth on dx/dsigma: eps is a polynomial in sigma through the last `order` values.  One call per step."""

    order: int = 4

    def __post_init__(self) -> None:
        require_order(self.order, 4)

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        return _adams_bashforth(denoise, x, sigmas, self.order, lambda sigma: sigma)


@dataclass(frozen=True)
class DEIS(Sampler):
    """As LMS, the polynomial in log sigma (the log-rho form of DEIS-AB, arXiv:2204.13902); falls to first order in the last step."""

    order: int = 3

    def __post_init__(self) -> None:
        require_order(self.order, 4)

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        return _adams_bashforth(denoise, x, sigmas, self.order, np.log)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)


def _adams_bashforth(
    denoise: Denoise, x: Tensor, sigmas: Tensor, order: int, variable: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Tensor]:
    past: list[tuple[float, Tensor]] = []  # sigma and eps, newest first
    for i, (s, s_next) in enumerate(levels(sigmas)):
        past = [(s, (x - denoise(x, sigmas[i])) / s), *past[: order - 1]]
        if s_next == 0 and variable is np.log:
            past = past[:1]
        points = s_next + (s - s_next) * (NODES + 1) / 2
        known = variable(np.array([sigma for sigma, _ in past]))
        for j, (_, eps) in enumerate(past):
            others = np.delete(known, j)
            basis = np.prod((variable(points)[:, None] - others) / (known[j] - others), axis=1)
            x = x + float(WEIGHTS @ basis * (s_next - s) / 2) * eps
        yield x


@dataclass(frozen=True)
class PLMS(Sampler):
    """Pseudo linear multistep (arXiv:2202.09778): Adams-Bashforth's weights for equal steps of t, applied to eps; Heun's first step
    costs one call more."""

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        past: list[Tensor] = []  # eps, newest first
        table = [(1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
        for i, (s, s_next) in enumerate(levels(sigmas)):
            past = [(x - denoise(x, sigmas[i])) / s, *past[:3]]
            eps = sum((w * e for w, e in zip(table[len(past) - 1], past, strict=True)), torch.zeros(()))
            if i == 0 and s_next > 0:
                end = x + (s_next - s) * eps
                eps = (eps + (end - denoise(end, sigmas[1])) / s_next) / 2
            x = x + (s_next - s) * eps
            yield x
