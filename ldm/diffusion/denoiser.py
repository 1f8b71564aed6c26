"""Preconditioning in one place: a prediction type is one row, read by the loss and by every sampler."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ldm import interfaces
from ldm.devices import each, factor
from ldm.errors import UserError
from ldm.interfaces import Cond, Network, NoiseSchedule

Prediction = Literal["eps", "v", "x0", "flow"]

# prediction -> sigma -> (c_skip, c_out):  z0 = c_skip * x + c_out * F
PRECONDITIONING: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda sigma: (sigma * 0 + 1, -sigma),  # arXiv:2006.11239
    "v": lambda sigma: (1 / (1 + sigma**2), -sigma / (1 + sigma**2).sqrt()),  # arXiv:2202.00512
    "x0": lambda sigma: (sigma * 0, sigma * 0 + 1),
    "flow": lambda sigma: (1 / (1 + sigma), -sigma / (1 + sigma)),  # eps - z0 (arXiv:2209.03003); any schedule will do
}


class Denoiser(interfaces.Denoiser):
    """D(x, sigma) around a network that sees schedule.scale(sigma) * x and the step t(sigma)."""

    def __init__(self, network: Network, schedule: NoiseSchedule, prediction: Prediction = "eps") -> None:
        super().__init__()
        if prediction not in PRECONDITIONING:
            raise UserError(f"prediction is {prediction!r}; allowed are {', '.join(PRECONDITIONING)}")
        self.network, self.schedule, self.prediction = network, schedule, prediction

    def _coefficients(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_skip, c_out = PRECONDITIONING[self.prediction](sigma.double())
        return factor(c_skip, x), factor(c_out, x)

    def raw(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        scale = factor(self.schedule.scale(sigma.double()), x)
        t = each(self.schedule.t(sigma), x, torch.promote_types(x.dtype, torch.float32))
        return self.network(x * scale, t, cond).to(x.dtype)

    def z0(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        c_skip, c_out = self._coefficients(x, sigma)
        return c_skip * x + c_out * output[:, : x.shape[1]]

    def target(self, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out = self._coefficients(x, sigma)
        return (z0 - c_skip * x) / c_out

    def score(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """grad log p(x; sigma) = (D - x) / sigma^2 (Eq. 3, arXiv:2206.00364)."""
        return (self.predict(x, sigma, cond) - x) / factor(sigma, x) ** 2

    def output_weight(self, sigma: Tensor) -> Tensor:
        """c_out^2: turns a weight on the error of z0 into one on the error of F."""
        return PRECONDITIONING[self.prediction](sigma.double())[1] ** 2
