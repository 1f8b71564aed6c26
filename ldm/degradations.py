"""What is done to an image before somebody wants it back: known, fixed and differentiable."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.devices import send
from ldm.errors import UserError
from ldm.interfaces import Buildable
from ldm.ranges import to_uint8

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


TOLERANCE = 0.4 / 127.5  # of a level in 255, about what rounding to levels changes
POWER_ITERATIONS = 12


class Degradation(Buildable, ABC):
    """A linear map of images that loses something."""

    factor: int = 1  # by which the image became smaller

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) -> (B,3,H/factor,W/factor)."""

    def measured(self, y: Tensor) -> Tensor:
        """What is taken for the outcome of this degradation where a user gave y: y itself, if it can be one."""
        return y

    def fit(self, x: Tensor, y: Tensor, iterations: int = 20) -> Tensor:
        """The picture in [-1,1] near x (B,3,H,W) whose degradation is y, as far as there is one.

        Accelerated projected gradients on |A x - y|^2 (FISTA, doi:10.1137/080716542), which move x only in what A sees; they end where no
        value misses y by more than `TOLERANCE`.
        """
        step, ahead, momentum = 0.98 / _largest_eigenvalue(self, tuple(x.shape[1:]), x.device), x, 1.0
        found, done = x, torch.zeros((), dtype=torch.bool, device=x.device)
        for _ in range(iterations):
            residual = y - self(ahead)
            residual = residual - residual.clamp(-TOLERANCE, TOLERANCE)  # y was rounded: less would be made of its rounding
            found, done = torch.where(done, found, ahead), done | ~residual.any()
            if x.device.type == "cpu" and done:  # a GPU does the other iterations for nothing, sooner than it would answer
                return found
            x, before = (ahead + step * self.adjoint(x, residual)).clamp(-1, 1), x
            momentum, last = (1 + (1 + 4 * momentum**2) ** 0.5) / 2, momentum
            ahead = (x + (last - 1) / momentum * (x - before)).clamp(-1, 1)
        return torch.where(done, found, x)

    def adjoint(self, x: Tensor, u: Tensor) -> Tensor:
        """A^T u, of the shape of x."""
        with torch.enable_grad():
            zero = torch.zeros_like(x, requires_grad=True)
            return torch.autograd.grad(self(zero), zero, u)[0]


@cache
def _largest_eigenvalue(degradation: Degradation, shape: tuple[int, ...], device: torch.device) -> float:
    """Of A^T A for images of a shape (C,H,W), by power iteration from an image that is flat and rough."""
    v = 1 + torch.linspace(-1, 1, math.prod(shape), device=device).mul(1e3).sin().view(1, *shape)
    norm = torch.ones(())
    for _ in range(POWER_ITERATIONS):
        v = degradation.adjoint(v, degradation(v))
        norm = v.norm()
        v = v / norm
    return float(norm)


@dataclass(frozen=True)
class Downscale(Degradation):
    """Shrunk by a whole factor, bicubic with antialias."""

    factor: int = 4

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(f"the factor by which the image is smaller is {self.factor}; allowed is 1 or more")

    def __call__(self, x: Tensor) -> Tensor:
        size = (x.shape[2] // self.factor, x.shape[3] // self.factor)
        return F.interpolate(x, size, mode="bicubic", antialias=True)


@dataclass(frozen=True)
class GaussianBlur(Degradation):
    """Gaussian blur of a standard deviation in px."""

    sigma: float = 2.0

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise UserError(f"the blur is {self.sigma} px; allowed is more than 0")

    def __call__(self, x: Tensor) -> Tensor:
        radius = max(1, math.ceil(3 * self.sigma))
        steps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (steps / self.sigma) ** 2)
        kernel = (kernel / kernel.sum()).view(1, 1, -1, 1).expand(x.shape[1], 1, -1, 1)
        x = F.pad(x, (radius,) * 4, mode="replicate")
        x = F.conv2d(x, kernel, groups=x.shape[1])
        return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


@dataclass(frozen=True)
class Grayscale(Degradation):
    """Luma in all three channels (ITU-R BT.601), of each frame of a clip."""

    def __call__(self, x: Tensor) -> Tensor:
        frames = x.unflatten(1, (-1, min(3, x.shape[1])))
        return _luma(frames).expand_as(frames).flatten(1, 2)

    def measured(self, y: Tensor) -> Tensor:
        """The luma of a picture that is not grey."""
        return self(y)

    def fit(self, x: Tensor, y: Tensor, iterations: int = 1) -> Tensor:
        """The colours of x with the luma of y: less of them where they would leave [-1,1], in 8 bits so that the luma is exact."""
        frames, luma = x.unflatten(1, (-1, min(3, x.shape[1]))), y.unflatten(1, (-1, min(3, y.shape[1])))
        if frames.shape[2] < 3:
            return y
        colour = frames - _luma(frames)
        room = torch.where(colour > 0, 1 - luma, 1 + luma) / colour.abs().clamp(min=1e-6)
        levels = to_uint8(luma + room.amin(2, keepdim=True).clamp(0, 1) * colour).float()
        wanted = to_uint8(luma[:, :, :1]).float()
        for channel in (1, 0, 2):  # green, red, blue: the change of one level of each is smaller than that before
            missing = ((wanted - _luma(levels)) / LUMA[channel]).round()
            levels[:, :, channel : channel + 1] = (levels[:, :, channel : channel + 1] + missing).clamp(0, 255)
        return (levels.float() / 127.5 - 1).flatten(1, 2)


def _luma(frames: Tensor) -> Tensor:
    """(B,T,1,H,W) of RGB frames (B,T,3,H,W); grey ones are their own."""
    return (frames * send(torch.tensor(LUMA, dtype=frames.dtype), frames.device).view(3, 1, 1)).sum(2, keepdim=True)
