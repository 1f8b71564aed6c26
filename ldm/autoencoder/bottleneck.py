"""What lies between encoder and decoder: the posterior q(z | x)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.interfaces import Posterior


@dataclass(frozen=True)
class DiagonalGaussian(Posterior):
    """N(mean, exp(log_variance)), each (B,C,h,w); the log variance is clamped to [-30, 20] as in LDM."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "DiagonalGaussian":
        """moments (B,2C,h,w): means, then log variances."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30, 20))

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def mode(self) -> Tensor:
        return self.mean

    def penalty(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over the latent dimensions (Eq. 10, arXiv:1312.6114)."""
        kl = 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)
        return kl.flatten(1).sum(1)
