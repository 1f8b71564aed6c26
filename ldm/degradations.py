"""What is done to an image before somebody wants it back: known, fixed and differentiable."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.interfaces import Buildable

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


class Degradation(Buildable, ABC):
    factor: int = 1  # by which it became smaller

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) -> (B,3,H/factor,W/factor)."""


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
        luma = (frames * x.new_tensor(LUMA).view(3, 1, 1)).sum(2, keepdim=True)
        return luma.expand_as(frames).flatten(1, 2)
