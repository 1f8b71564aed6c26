"""What several tests compare with: a Gaussian whose D and probability-flow ODE are known, networks that are functions, and noise that is
known beforehand, all in float64."""

from collections.abc import Callable

import torch
from hypothesis import settings
from torch import Tensor

from ldm.interfaces import Cond, Network

quick = settings(deadline=None, max_examples=60)


class Function(Network):
    """A network that is a plain function."""

    in_channels = 2

    def __init__(self, function: Callable[[Tensor, Tensor, Cond], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.function(x, t, cond)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def replay(noises: list[Tensor]) -> Callable[[], Tensor]:
    draws = iter(noises)
    return lambda: next(draws)


def wavy(x: Tensor, t: Tensor) -> Tensor:
    """An arbitrary nonlinear eps_theta of (B,2,h,w) and of the step t = 0 .. T-1, mixing channels and pixels."""
    time = column(t / 10)
    return torch.sin(1.3 * x + time) + 0.4 * torch.tanh(x.flip(1) * x.flip(3)) + 0.2 * torch.cos(time) * x


# z0 ~ N(MU, diag(C^2)), so that D and the probability-flow ODE's solution are known
MU = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
C = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64).view(1, 3, 1, 1)


def oracle(x: Tensor, sigma: Tensor) -> Tensor:
    return MU + C**2 / (C**2 + sigma**2) * (x - MU)


def flow(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return MU + (x - MU) * ((C**2 + end**2) / (C**2 + start**2)).sqrt()


def conditional(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    assert cond.vector is not None
    assert len(cond.vector) == len(x)
    return torch.tanh(x * cond.vector.view(-1, 2, 1, 1)) / (1 + sigma)
