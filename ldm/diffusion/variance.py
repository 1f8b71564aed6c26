"""Learned variances of the reverse process (section 3.1, arXiv:2102.09672), beside whatever the network predicts.

Between noise levels s > s', in x = z0 + sigma * eps, the variance lies between the posterior's s'^2 (1 - s'^2/s^2), which a sampler with
eta = 1 adds, and (s^2 - s'^2) (1 + s'^2) / (1 + s^2), DDPM's beta; the network's second half of channels says where, -1 to 1 in logarithms.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.objective import Wrapper
from ldm.errors import UserError
from ldm.interfaces import Cond, Denoiser, Noise, Objective


def log_variances(s: Tensor, s_next: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of both ends, smaller first; s_next > 0."""
    added = s**2 - s_next**2
    return (s_next**2 * added / s**2).log(), (added * (1 + s_next**2) / (1 + s**2)).log()


def between(small: Tensor, large: Tensor, fraction: Tensor) -> Tensor:
    return torch.lerp(small.expand_as(fraction), large.expand_as(fraction), (fraction + 1) / 2)


def step_variance(s: Tensor, s_next: Tensor, fraction: Tensor) -> Tensor:
    """Logarithm of the variance of the step from s to s_next > 0; fraction: -1 for the posterior's to 1 for DDPM's beta."""
    return between(*log_variances(s, s_next), fraction)


def data_variance(lowest: Tensor, second: Tensor, fraction: Tensor) -> Tensor:
    """The same of the data, given x at the lowest level; its smaller end is that of the step above, of x with variance 1 (as published)."""
    small = log_variances(second, lowest)[0] - torch.log1p(lowest**2)
    large = (lowest**2 / (1 + lowest**2)).log()
    return between(small, large, fraction)


def step_kl(error: Tensor, s: Tensor, s_next: Tensor, log_variance: Tensor) -> Tensor:
    """KL in nats of each value from the posterior's step to the model's, whose D has this squared error (Eq. 5, arXiv:2102.09672)."""
    small, _ = log_variances(s, s_next)
    moved = error * (1 - (s_next / s) ** 2) ** 2
    return half_loss(moved + small.exp(), log_variance) - 0.5 * (small + 1)


def half_loss(square: Tensor, log_variance: Tensor) -> Tensor:
    """-log density of a normal distribution at a squared distance, less the constant."""
    return 0.5 * (log_variance + square * torch.exp(-log_variance))


class LearnedVariance(Wrapper):
    """L_hybrid: another objective + weight * T * the variational bound's term in bits per dimension, which trains the variances alone
    (Eq. 16, arXiv:2102.09672).  For a network with learn_variance."""

    def __init__(self, objective: Objective, weight: float = 0.001) -> None:
        super().__init__(objective)
        self.weight = weight

    def error(self, denoiser: Denoiser, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        if output.shape[1] != 2 * x.shape[1]:
            raise UserError("the objective LearnedVariance needs a network with learn_variance: set model.network.learn_variance to true")
        error = (z0 - denoiser.z0(x, sigma, output).detach()).double().square()
        bound = self.bound(denoiser, error, output[:, x.shape[1] :].double(), sigma).flatten(1).mean(1) / math.log(2)
        loss = self.objective.error(denoiser, output, x, z0, sigma)
        return loss + self.weight * len(denoiser.schedule.sigmas) * bound.to(loss)

    @staticmethod
    def bound(denoiser: Denoiser, error: Tensor, fraction: Tensor, sigma: Tensor) -> Tensor:
        """KL in nats of each value of the step below sigma (B,), or of the data below the lowest level."""
        schedule, shape = denoiser.schedule, (-1, *[1] * (error.ndim - 1))
        t = schedule.t(sigma)
        s, below = sigma.double().view(shape), schedule.sigma(t - 1).double().view(shape)
        first = (t < 1).view(shape)
        lowest, second = schedule.sigma(torch.arange(2, device=t.device)).double()
        s, below = torch.where(first, second, s), torch.where(first, lowest, below)  # values where nothing is infinite, for the unused
        data = 0.5 * math.log(2 * math.pi) + half_loss(error, data_variance(lowest, second, fraction))
        return torch.where(first, data, step_kl(error, s, below, step_variance(s, below, fraction)))


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
