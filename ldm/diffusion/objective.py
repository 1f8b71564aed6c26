"""Training losses of stage 2: which steps are trained, and a weight per noise level on the squared error of the network's output.

Those that are made of another one are `Wrapper`s, also in variance.py and distillation.py.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.devices import factor, send
from ldm.draws import Draws
from ldm.errors import UserError
from ldm.interfaces import Cond, Denoise, Denoiser, NoiseSchedule, Objective, TimeSampler


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Every level of the schedule alike; continuous: also between them."""

    continuous: bool = False

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return u * (len(schedule.sigmas) - 1) if self.continuous else (u * len(schedule.sigmas)).floor()


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """logit(t / T) ~ N(mean, std^2): the middle more often (section 3.1, arXiv:2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * normal_quantile(u)) * (len(schedule.sigmas) - 1)


@dataclass(frozen=True)
class LogNormal(TimeSampler):
    """log sigma ~ N(mean, std^2) (Table 1, arXiv:2206.00364)."""

    mean: float = -1.2
    std: float = 1.2

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.t((self.mean + self.std * normal_quantile(u)).exp())


def normal_quantile(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))


class ErrorObjective(Objective):
    """An objective that is an error of the network's output at x = z0 + sigma * noise."""

    def loss(self, denoiser: Denoiser, z0: Tensor, noise: Tensor, t: Tensor, cond: Cond, teacher: Denoise | None = None) -> Tensor:
        sigma = denoiser.schedule.sigma(t)
        x = z0 + factor(sigma, z0) * noise
        return self.error(denoiser, denoiser.raw(x, sigma, cond), x, z0, sigma)


@dataclass(frozen=True, kw_only=True)
class Simple(ErrorObjective):
    """L_simple (Eq. 14, arXiv:2006.11239): the plain squared error of whatever the network predicts.

    times: which steps.  offset: strength of noise that is constant over an image, for very dark and bright pictures.
    huber: above this error the loss grows linearly (pseudo-Huber, arXiv:2310.14189); 0 for the square.  stratified: the batch's steps
    are spread evenly (arXiv:2107.00630, appendix I.1), which lowers the variance of the loss; so are those of successive batches.
    """

    times: TimeSampler = field(default_factory=Uniform)
    offset: float = 0.0
    huber: float = 0.0
    stratified: bool = False

    def draw(self, z0: Tensor, schedule: NoiseSchedule, draws: Draws) -> tuple[Tensor, Tensor]:
        noise = draws.normal(z0)
        if self.offset:
            noise = noise + self.offset * draws.normal(z0[:, :, :1, :1])
        u = draws.spread() if self.stratified else draws.uniform()
        return noise, self.times.sample(send(u, z0.device), schedule)

    def weight(self, denoiser: Denoiser, sigma: Tensor) -> Tensor:
        return sigma * 0 + 1

    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        square = (output[:, : x.shape[1]] - denoiser.target(x, z0, sigma)).float().square()
        if self.huber:
            square = 2 * self.huber * square / ((square + self.huber**2).sqrt() + self.huber)
        error = square.flatten(1).mean(1)
        return self.weight(denoiser, sigma).to(error.dtype) * error


@dataclass(frozen=True, kw_only=True)
class MinSNR(Simple):
    """Weight min(SNR, gamma) on the error of z0 (Eq. 6, arXiv:2303.09556), whatever is predicted."""

    gamma: float = 5.0

    def weight(self, denoiser: Denoiser, sigma: Tensor) -> Tensor:
        return (sigma**-2).clamp(max=self.gamma) * denoiser.output_weight(sigma)


@dataclass(frozen=True, kw_only=True)
class P2(Simple):
    """Weight 1 / (k + SNR)^gamma on the error of eps (Eq. 8, arXiv:2204.00227), whatever is predicted."""

    gamma: float = 1.0
    k: float = 1.0

    def weight(self, denoiser: Denoiser, sigma: Tensor) -> Tensor:
        return sigma**-2 / (self.k + sigma**-2) ** self.gamma * denoiser.output_weight(sigma)


@dataclass(frozen=True, kw_only=True)
class EDM(Simple):
    """Weight (sigma^2 + 1) / sigma^2 on the error of z0 (Table 1, arXiv:2206.00364, data of deviation 1) and log-normal sigmas."""

    times: TimeSampler = field(default_factory=LogNormal)

    def weight(self, denoiser: Denoiser, sigma: Tensor) -> Tensor:
        return (1 + sigma**-2) * denoiser.output_weight(sigma)


class Wrapper(nn.Module, ErrorObjective):
    """An objective made of another one; what it does not say anew is the other's."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def draw(self, z0: Tensor, schedule: NoiseSchedule, draws: Draws) -> tuple[Tensor, Tensor]:
        return self.objective.draw(z0, schedule, draws)

    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        return self.objective.error(denoiser, output, x, z0, sigma)


class LearnedUncertainty(Wrapper):
    """Another objective's loss / exp(u) + u with a learned u(sigma) (Eq. 17, arXiv:2312.02696): all levels weigh alike in the gradient."""

    frequencies: Tensor

    def __init__(self, objective: Objective, dim: int = 128) -> None:
        super().__init__(objective)
        self.register_buffer("frequencies", torch.linspace(0, 8, dim // 2))
        self.u = nn.Linear(2 * (dim // 2), 1)
        nn.init.zeros_(self.u.weight)
        nn.init.zeros_(self.u.bias)

    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        loss = self.objective.error(denoiser, output, x, z0, sigma)
        if not self.training:
            return loss  # comparable from step to step
        angles = sigma.log().to(self.frequencies)[:, None] * self.frequencies
        with torch.autocast(loss.device.type, enabled=False):  # which would leave u three digits
            u = self.u(torch.cat([angles.cos(), angles.sin()], dim=1))[:, 0].to(loss)
        return loss * torch.exp(-u) + u


class Importance(Wrapper):
    """Steps drawn in proportion to the root mean square of their loss, which is divided by that chance: the same expectation, less
    variance (section 3.3, arXiv:2102.09672).

    The schedule falls into `bins`; the mean square of each forgets about one in `memory` losses, and until each bin has seen as many,
    all are drawn alike.  A share `uniform` always is.
    """

    square: Tensor  # (bins,)
    seen: Tensor  # (bins,) losses

    def __init__(self, objective: Objective, bins: int = 100, memory: int = 10, uniform: float = 0.001) -> None:
        super().__init__(objective)
        if bins < 1 or memory < 1 or not 0 < uniform <= 1:
            raise UserError(f"Importance has bins {bins}, memory {memory}, uniform {uniform}: allowed are at least 1, 1, and (0, 1]")
        self.bins, self.memory, self.uniform = bins, memory, uniform
        self.register_buffer("square", torch.zeros(bins))
        self.register_buffer("seen", torch.zeros(bins))

    def chances(self) -> Tensor:
        """(bins,), of sum 1."""
        even = torch.full_like(self.square, 1 / self.bins)
        if not self.training:
            return even
        wanted = torch.lerp(self.square.sqrt() / self.square.sqrt().sum().clamp(min=1e-12), even, self.uniform)
        return torch.where(self.seen.min() < self.memory, even, wanted)

    def draw(self, z0: Tensor, schedule: NoiseSchedule, draws: Draws) -> tuple[Tensor, Tensor]:
        noise, _ = self.objective.draw(z0, schedule, draws)
        ends = self.chances().double().cumsum(0)
        chosen = torch.searchsorted(ends / ends[-1], send(draws.uniform(), ends.device), right=True).clamp(max=self.bins - 1)
        places = (chosen + send(draws.uniform(), ends.device)) / self.bins
        return noise, (places * len(schedule.sigmas)).floor()

    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        loss = self.objective.error(denoiser, output, x, z0, sigma)
        if not self.training:
            return loss
        places = (denoiser.schedule.t(sigma) + 0.5) / len(denoiser.schedule.sigmas)
        chosen = (places * self.bins).long().clamp(max=self.bins - 1)
        chance = self.chances()[chosen]
        self._remember(chosen, loss.detach().float())
        return loss / (self.bins * chance)

    def _remember(self, chosen: Tensor, loss: Tensor) -> None:
        sums, finite = torch.zeros(2, self.bins, device=loss.device), loss.square().isfinite()
        sums.index_add_(1, chosen, torch.stack([torch.where(finite, loss, 0).square(), finite.float()]))  # such a step is skipped
        if dist.is_initialized():
            dist.all_reduce(sums)
        total, count = sums
        kept = (1 - 1 / self.memory) ** count * (self.seen > 0)
        self.square.copy_(torch.where(count > 0, torch.lerp(total / count.clamp(min=1), self.square, kept), self.square))
        self.seen += count
