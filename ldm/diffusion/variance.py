"""Learned variances of the reverse process (section 3.1, arXiv:2102.09672), beside whatever the network predicts.

Between noise levels s > s', in x = z0 + sigma * eps, the variance lies between the posterior's s'^2 (1 - s'^2/s^2), which a sampler with
eta = 1 adds, and (s^2 - s'^2) (1 + s'^2) / (1 + s^2), DDPM's beta; the network's second half of channels says where, -1 to 1 in logarithms.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Wrapper
from ldm.interfaces import Cond, Noise, Objective


def log_variances(s: Tensor, s_next: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of both ends, smaller first; s_next > 0."""
    added = s**2 - s_next**2
    return (s_next**2 * added / s**2).log(), (added * (1 + s_next**2) / (1 + s**2)).log()


class LearnedVariance(Wrapper):
    """L_hybrid: another objective + weight * T * the variational bound's term in bits per dimension, which trains the variances alone
    (Eq. 16, arXiv:2102.09672).  For a network with learn_variance."""

    def __init__(self, objective: Objective, weight: float = 0.001) -> None:
        super().__init__(objective)
        self.weight = weight

    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError("the objective LearnedVariance needs a network with learn_variance: set model.network.learn_variance to true")
        error = (z0 - denoiser.z0(x, sigma, output).detach()).double().square()
        bound = self.bound(denoiser, error, output[:, x.shape[1] :].double(), sigma).flatten(1).mean(1) / math.log(2)
        loss = self.objective.error(denoiser, output, x, z0, sigma)
        return loss + self.weight * len(denoiser.schedule.sigmas) * bound.to(loss)

    @staticmethod
    def bound(denoiser: Denoiser, error: Tensor, fraction: Tensor, sigma: Tensor) -> Tensor:
        """KL in nats of each value of the step below sigma (B,), or of the data below the lowest level, whose smaller variance is that
        of the step above it (as published)."""
        schedule, shape = denoiser.schedule, (-1, *[1] * (error.ndim - 1))
        t = schedule.t(sigma)
        s, below = sigma.double().view(shape), schedule.sigma(t - 1).double().view(shape)
        first = (t < 1).view(shape)
        lowest, second = schedule.sigma(torch.arange(2, device=t.device))
        small, large = log_variances(torch.where(first, second, s), torch.where(first, lowest, below))
        small = torch.where(first, small - torch.log1p(lowest**2), small)  # that step's, in variables of variance 1
        large = torch.where(first, (s**2 / (1 + s**2)).log(), large)
        log_variance = torch.lerp(small, large, (fraction + 1) / 2)
        error = torch.where(first, error, error * (1 - (below / s) ** 2) ** 2) * torch.exp(-log_variance)
        kl = 0.5 * (log_variance - small - 1 + torch.exp(small - log_variance) + error)
        return torch.where(first, 0.5 * (math.log(2 * math.pi) + log_variance + error), kl)


class LearnedNoise:
    """A sampler's noise with the learned variances, for samplers that add the posterior's between levels: eta = 1."""

    def __init__(self, denoiser: Denoiser, sigmas: Tensor, noise: Noise) -> None:
        self.denoiser, self.sigmas, self.draw = denoiser, sigmas.double(), noise
        self.fraction, self.sigma = torch.zeros(()), sigmas[0]

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """As denoiser.predict; keeps what the network says of the variances."""
        output = self.denoiser.raw(x, sigma, cond)
        self.fraction, self.sigma = output[:, x.shape[1] :], sigma
        return self.denoiser.z0(x, sigma, output)

    def noise(self) -> Tensor:
        drawn = self.draw()
        s = self.sigma.double()
        small, large = log_variances(s, self.sigmas[self.sigmas < s.to(self.sigmas)][0].to(s))
        share = (self.fraction[: len(drawn)] + 1) / 2  # with guidance the conditional half comes first
        return drawn * torch.exp(share * float(large - small) / 2)
