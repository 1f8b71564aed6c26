"""Noise schedules.  Each class only produces the tensor of sigmas; everything else is derived from it."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ldm.interfaces import NoiseSchedule

Spacing = Literal["trailing", "leading", "linspace"]


@dataclass(frozen=True)
class DiscreteSchedule(NoiseSchedule):
    """T variance-preserving noise levels; subclasses give the betas of arXiv:2006.11239, section 2."""

    num_steps: int = 1000

    def betas(self) -> Tensor:
        raise NotImplementedError

    @cached_property
    def sigmas(self) -> Tensor:  # type: ignore[override]
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a schedule needs at least 1")
        alpha_bar = torch.cumprod(1 - self.betas(), 0)
        return torch.sqrt(1 / alpha_bar - 1)

    def sigma(self, t: Tensor) -> Tensor:
        """Log-linear between the discrete levels; exact at integers."""
        log_sigmas = self.sigmas.log().to(t.device)
        t = t.clamp(0, self.num_steps - 1)
        low = t.floor().long()
        high = (low + 1).clamp(max=self.num_steps - 1)
        return torch.lerp(log_sigmas[low], log_sigmas[high], t.double() - low).exp()

    def t(self, sigma: Tensor) -> Tensor:
        log_sigmas, log_sigma = self.sigmas.log().to(sigma.device), sigma.double().log()
        low = (torch.searchsorted(log_sigmas, log_sigma, right=True) - 1).clamp(0, max(self.num_steps - 2, 0))
        high = (low + 1).clamp(max=self.num_steps - 1)
        gap = (log_sigmas[high] - log_sigmas[low]).clamp(min=1e-12)
        return (low + ((log_sigma - log_sigmas[low]) / gap).clamp(0, 1)).clamp(max=self.num_steps - 1)

    def prior(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """N(0, 1 + sigma^2), which the network sees as N(0, 1) (LDM starts there)."""
        return noise * math.sqrt(1 + float(sigma) ** 2)

    def steps(self, n: int, spacing: str = "trailing") -> Tensor:
        """Spacings of arXiv:2305.08891, Table 2; trailing starts at the noisiest level."""
        total = self.num_steps
        if not 1 <= n <= total:
            raise ValueError(f"{n} sampling steps were asked for; this schedule allows 1 to {total}")
        if spacing == "trailing":
            t = torch.linspace(total, 0, n + 1, dtype=torch.float64)[:-1].round() - 1
        elif spacing == "leading":
            t = torch.arange(n - 1, -1, -1, dtype=torch.float64) * (total // n)
        elif spacing == "linspace":
            t = torch.linspace(total - 1, 0, n, dtype=torch.float64).round()
        else:
            raise ValueError(f"spacing is {spacing!r}; allowed are trailing, leading, linspace")
        return torch.cat([self.sigmas[t.long()], torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class LinearSchedule(DiscreteSchedule):
    """beta linear in t (DDPM, arXiv:2006.11239, section 4)."""

    start: float = 1e-4
    end: float = 0.02

    def betas(self) -> Tensor:
        return torch.linspace(self.start, self.end, self.num_steps, dtype=torch.float64)


@dataclass(frozen=True)
class LDMSchedule(DiscreteSchedule):
    """sqrt(beta) linear in t: what CompVis calls "linear" and diffusers "scaled_linear" (arXiv:2112.10752)."""

    start: float = 0.0015
    end: float = 0.0195

    def betas(self) -> Tensor:
        return torch.linspace(self.start**0.5, self.end**0.5, self.num_steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class CosineSchedule(DiscreteSchedule):
    """alpha_bar(t) = cos^2((t/T + s) / (1 + s) * pi/2), beta at most 0.999 (arXiv:2102.09672, Eq. 17)."""

    offset: float = 0.008
    max_beta: float = 0.999

    def betas(self) -> Tensor:
        t = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.max_beta)
