"""Training losses of stage 2: a weight per noise level on the squared error of the network's output."""

from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.interfaces import Cond, Objective


@dataclass(frozen=True)
class Simple(Objective):
    """L_simple (Eq. 14, arXiv:2006.11239): the plain squared error of whatever the network predicts."""

    def weight(self, denoiser: Denoiser, sigma: Tensor) -> Tensor:
        return sigma * 0 + 1

    def loss(self, denoiser: Denoiser, z0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:  # type: ignore[override]
        sigma = denoiser.schedule.sigma(t)
        x = z0 + sigma.view(-1, *[1] * (z0.ndim - 1)).to(z0) * noise
        error = (denoiser.raw(x, sigma, cond) - denoiser.target(x, z0, sigma)).float().square().flatten(1).mean(1)
        return self.weight(denoiser, sigma).to(error.dtype) * error


@dataclass(frozen=True)
class MinSNR(Simple):
    """Weight min(SNR, gamma) on the error of z0 (Eq. 6, arXiv:2303.09556), whatever is predicted."""

    gamma: float = 5.0

    def weight(self, denoiser: Denoiser, sigma: Tensor) -> Tensor:
        return (sigma**-2).clamp(max=self.gamma) * denoiser.output_weight(sigma)
