"""Training losses of stage 2: which steps are trained, and a weight per noise level on the squared error of the network's output."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.interfaces import Cond, NoiseSchedule, Objective, TimeSampler


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Every level of the schedule alike."""

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return (u * len(schedule.sigmas)).floor()


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


@dataclass(frozen=True, kw_only=True)
class Simple(Objective):
    """L_simple (Eq. 14, arXiv:2006.11239): the plain squared error of whatever the network predicts.

    times: which steps.  offset: strength of noise that is constant over an image, for very dark and bright pictures.
    huber: above this error the loss grows linearly (pseudo-Huber, arXiv:2310.14189); 0 for the square.  stratified: the batch's steps
    are spread evenly (arXiv:2107.00630, appendix I.1), which lowers the variance of the loss.
    """

    times: TimeSampler = field(default_factory=Uniform)
    offset: float = 0.0
    huber: float = 0.0
    stratified: bool = False

    def draw(self, z0: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(z0)
        if self.offset:
            noise = noise + self.offset * torch.randn_like(z0[:, :, :1, :1])
        u = torch.rand(len(z0), device=z0.device, dtype=torch.float64)
        if self.stratified:
            u = (u[0] + torch.arange(len(z0), device=z0.device) / len(z0)) % 1
        return noise, self.times.sample(u, schedule)

    def weight(self, denoiser: Denoiser, sigma: Tensor) -> Tensor:
        return sigma * 0 + 1

    def loss(self, denoiser: Denoiser, z0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:  # type: ignore[override]
        sigma = denoiser.schedule.sigma(t)
        x = z0 + sigma.view(-1, *[1] * (z0.ndim - 1)).to(z0) * noise
        square = (denoiser.raw(x, sigma, cond) - denoiser.target(x, z0, sigma)).float().square()
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


class LearnedUncertainty(nn.Module, Objective):
    """Another objective's loss / exp(u) + u with a learned u(sigma) (Eq. 17, arXiv:2312.02696): all levels weigh alike in the gradient."""

    frequencies: Tensor

    def __init__(self, objective: Objective, dim: int = 128) -> None:
        super().__init__()
        self.objective = objective
        self.register_buffer("frequencies", torch.linspace(0, 8, dim // 2))
        self.u = nn.Linear(2 * (dim // 2), 1)
        nn.init.zeros_(self.u.weight)
        nn.init.zeros_(self.u.bias)

    def draw(self, z0: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        return self.objective.draw(z0, schedule)

    def loss(self, denoiser: Denoiser, z0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:  # type: ignore[override]
        loss = self.objective.loss(denoiser, z0, noise, t, cond)
        if not self.training:
            return loss  # comparable from step to step
        angles = denoiser.schedule.sigma(t).log().to(self.frequencies)[:, None] * self.frequencies
        u = self.u(torch.cat([angles.cos(), angles.sin()], dim=1))[:, 0].to(loss)
        return loss * torch.exp(-u) + u
