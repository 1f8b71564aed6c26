"""Noise schedules.  Each class only produces the tensor of sigmas; everything else is derived from it."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interfaces import NoiseSchedule

Spacing = Literal["trailing", "leading", "linspace", "karras", "log"]


class DiscreteSchedule(NoiseSchedule):
    """T noise levels, log-linear in between: time is continuous, whole numbers are the levels."""

    @abstractmethod
    def levels(self) -> Tensor:
        """(T,) sigmas, increasing, float64."""

    @cached_property
    def _logs(self) -> dict[torch.device, Tensor]:
        return {}

    def _log_sigmas(self, device: torch.device) -> Tensor:
        """Copied to a device once."""
        if device not in self._logs:
            self._logs[device] = self.sigmas.log().to(device)
        return self._logs[device]

    @cached_property
    def sigmas(self) -> Tensor:  # type: ignore[override]
        sigmas = self.levels()
        if len(sigmas) < 1:
            raise UserError(f"num_steps is {len(sigmas)}; a schedule needs at least 1")
        return sigmas

    def sigma(self, t: Tensor) -> Tensor:
        """Log-linear between the discrete levels; exact at integers."""
        log_sigmas, last = self._log_sigmas(t.device), len(self.sigmas) - 1
        t = t.clamp(0, last)
        low = t.floor().long()
        high = (low + 1).clamp(max=last)
        return torch.lerp(log_sigmas.take(low), log_sigmas.take(high), t.double() - low).exp()  # take: an index () would wait for a GPU

    def t(self, sigma: Tensor) -> Tensor:
        log_sigmas, log_sigma, last = self._log_sigmas(sigma.device), sigma.double().log(), len(self.sigmas) - 1
        low = (torch.searchsorted(log_sigmas, log_sigma, right=True) - 1).clamp(0, max(last - 1, 0))
        high = (low + 1).clamp(max=last)
        below = log_sigmas.take(low)
        gap = (log_sigmas.take(high) - below).clamp(min=1e-12)
        return (low + ((log_sigma - below) / gap).clamp(0, 1)).clamp(max=last)

    def scale(self, sigma: Tensor) -> Tensor:
        """By default for variance 1 of what the network sees, given data of variance 1."""
        return (1 + sigma**2).rsqrt()

    def prior(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise / float(self.scale(sigma))

    def steps(self, n: int | Sequence[float], spacing: str = "trailing") -> Tensor:
        """trailing (starts at the noisiest level), leading, linspace: Table 2, arXiv:2305.08891.  karras: Eq. 5, arXiv:2206.00364, rho 7.
        log: even in log sigma, i.e. in log-SNR."""
        if not isinstance(n, int):
            return self._listed(list(n))
        total, (low, high) = len(self.sigmas), (float(self.sigmas[0]), float(self.sigmas[-1]))
        if not 1 <= n <= total:
            raise UserError(f"{n} sampling steps were asked for; this schedule allows 1 to {total}")
        even = torch.linspace(1, 0, n, dtype=torch.float64)
        if spacing == "trailing":
            found = self.sigmas[(torch.linspace(total, 0, n + 1, dtype=torch.float64)[:-1].round() - 1).long()]
        elif spacing == "leading":
            found = self.sigmas[torch.arange(n - 1, -1, -1) * (total // n)]
        elif spacing == "linspace":
            found = self.sigmas[torch.linspace(total - 1, 0, n, dtype=torch.float64).round().long()]
        elif spacing == "karras":
            found = (low ** (1 / 7) + even * (high ** (1 / 7) - low ** (1 / 7))) ** 7
        elif spacing == "log":
            found = torch.exp(math.log(low) + even * math.log(high / low))
        else:
            raise UserError(f"spacing is {spacing!r}; allowed are trailing, leading, linspace, karras, log")
        return torch.cat([found, torch.zeros(1, dtype=torch.float64)])

    def _listed(self, times: list[float]) -> Tensor:
        last = len(self.sigmas) - 1
        if not times or sorted(set(times), reverse=True) != times or not 0 <= times[-1] <= times[0] <= last:
            raise UserError(f"the sampling steps are {times}; allowed are decreasing numbers from {last} to 0")
        return torch.cat([self.sigma(torch.tensor(times, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64)])


class VariancePreserving(DiscreteSchedule):
    """T levels by their betas (arXiv:2006.11239, section 2)."""

    @abstractmethod
    def betas(self) -> Tensor: ...

    def levels(self) -> Tensor:
        return torch.sqrt(1 / torch.cumprod(1 - self.betas(), 0) - 1)


@dataclass(frozen=True)
class LinearSchedule(VariancePreserving):
    """beta linear in t (DDPM, arXiv:2006.11239, section 4)."""

    num_steps: int = 1000
    start: float = 1e-4
    end: float = 0.02

    def betas(self) -> Tensor:
        return torch.linspace(self.start, self.end, self.num_steps, dtype=torch.float64)


@dataclass(frozen=True)
class LDMSchedule(VariancePreserving):
    """sqrt(beta) linear in t: what CompVis calls "linear" and diffusers "scaled_linear" (arXiv:2112.10752)."""

    num_steps: int = 1000
    start: float = 0.0015
    end: float = 0.0195

    def betas(self) -> Tensor:
        return torch.linspace(self.start**0.5, self.end**0.5, self.num_steps, dtype=torch.float64) ** 2


def betas_of(alpha_bar: Callable[[Tensor], Tensor], num_steps: int, max_beta: float) -> Tensor:
    """Betas whose products are alpha_bar(t), t in [0, 1], where they stay below max_beta (arXiv:2102.09672, section 3.2)."""
    values = alpha_bar(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))
    return (1 - values[1:] / values[:-1]).clamp(max=max_beta)


@dataclass(frozen=True)
class CosineSchedule(VariancePreserving):
    """alpha_bar(t) = cos^2((t/T + s) / (1 + s) * pi/2), beta at most 0.999 (arXiv:2102.09672, Eq. 17)."""

    num_steps: int = 1000
    offset: float = 0.008
    max_beta: float = 0.999

    def betas(self) -> Tensor:
        return betas_of(lambda t: torch.cos((t + self.offset) / (1 + self.offset) * math.pi / 2) ** 2, self.num_steps, self.max_beta)


@dataclass(frozen=True)
class SigmoidSchedule(VariancePreserving):
    """alpha_bar(t) falls as a sigmoid from `start` to `end` with temperature tau (arXiv:2212.11972, section 2.2), beta at most 0.999."""

    num_steps: int = 1000
    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    max_beta: float = 0.999

    def betas(self) -> Tensor:
        def fall(t: Tensor) -> Tensor:
            return torch.sigmoid(-(self.start + t * (self.end - self.start)) / self.tau)

        first, last = fall(torch.tensor([0.0, 1.0], dtype=torch.float64))
        return betas_of(lambda t: (fall(t) - last) / (first - last), self.num_steps, self.max_beta)


@dataclass(frozen=True)
class FlowSchedule(DiscreteSchedule):
    """Rectified flow (arXiv:2209.03003): x_t = (1 - t) z0 + t eps, so sigma = t / (1 - t), for t = (i + 1) / (T + 1): t = 1 itself would
    be sigma = infinity.  Its network sees x_t = x / (1 + sigma)."""

    num_steps: int = 1000

    def levels(self) -> Tensor:
        i = torch.arange(self.num_steps, dtype=torch.float64)
        return (i + 1) / (self.num_steps - i)

    def scale(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)


@dataclass(frozen=True)
class KarrasSchedule(DiscreteSchedule):
    """EDM's noise levels (Eq. 5, arXiv:2206.00364); for latents of standard deviation 1."""

    num_steps: int = 1000
    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0

    def levels(self) -> Tensor:
        ends = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return torch.linspace(*ends, self.num_steps, dtype=torch.float64) ** self.rho


@dataclass(frozen=True)
class Shifted(DiscreteSchedule):
    """Another schedule with all sigmas times `factor`: for images k times as wide take k (Eq. 23, arXiv:2403.03206; arXiv:2301.11093)."""

    schedule: DiscreteSchedule
    factor: float = 3.0

    def levels(self) -> Tensor:
        if self.factor <= 0:
            raise UserError(f"the schedule's shift factor is {self.factor}; it must be more than 0")
        return self.schedule.sigmas * self.factor

    def scale(self, sigma: Tensor) -> Tensor:
        return self.schedule.scale(sigma)


@dataclass(frozen=True)
class ZeroTerminalSNR(DiscreteSchedule):
    """Another schedule, rescaled so that the last level is pure noise (Algorithm 1, arXiv:2305.08891).

    That is sigma = infinity, here sigma_max; predict v or x0, not eps, which says nothing of z0 there.
    """

    schedule: DiscreteSchedule
    sigma_max: float = 1e4

    def levels(self) -> Tensor:
        signal = (1 + self.schedule.sigmas**2).rsqrt()
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1]).clamp(min=1e-12)
        return (signal**-2 - 1).sqrt().clamp(max=self.sigma_max)

    def scale(self, sigma: Tensor) -> Tensor:
        return self.schedule.scale(sigma)
