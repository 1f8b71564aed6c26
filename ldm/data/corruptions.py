"""What training images suffer so that a model learns to undo it.  Every draw comes from torch's generator, one per image."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from ldm.degradations import Degradation
from ldm.errors import UserError
from ldm.interfaces import ConditioningImage, Corruption
from ldm.ranges import to_float, to_uint8


def uniform(bounds: Sequence[float], like: Tensor, log: bool = False) -> Tensor:
    """(B,) one number per image between the two bounds."""
    low, high = bounds
    if low > high or (log and low <= 0):
        raise UserError(f"{list(bounds)} are no bounds: give the smaller number first{', more than 0' if log else ''}")
    u = torch.rand(len(like), device=like.device)
    return torch.exp(math.log(low) + u * math.log(high / low)) if log else low + u * (high - low)


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def as_8_bit(x: Tensor) -> Tensor:
    """As a file would have it."""
    return to_float(to_uint8(x))


@dataclass(frozen=True)
class Pixelwise(Corruption):
    """One that keeps the size."""

    def degrade(self, x: Tensor) -> ConditioningImage:
        return ConditioningImage(as_8_bit(self.corrupt(x)))

    @abstractmethod
    def corrupt(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class GaussianNoise(Pixelwise):
    """White noise of a standard deviation between the bounds, in units of a white pixel."""

    level: Sequence[float] = (0.02, 0.3)

    def corrupt(self, x: Tensor) -> Tensor:
        return x + 2 * column(uniform(self.level, x)) * torch.randn_like(x)


@dataclass(frozen=True)
class Jpeg(Pixelwise):
    """Saved as JPEG of a quality between the bounds."""

    quality: Sequence[float] = (5, 60)

    def corrupt(self, x: Tensor) -> Tensor:
        qualities = uniform(self.quality, x).round().int().tolist()
        files = [encode_jpeg(image, quality) for image, quality in zip(to_uint8(x).cpu(), qualities, strict=True)]
        return to_float(torch.stack([decode_jpeg(file) for file in files])).to(x)


@dataclass(frozen=True)
class Blur(Pixelwise):
    """Gaussian blur of a standard deviation between the bounds, in px; with anisotropic, of another one across."""

    px: Sequence[float] = (0.4, 3.0)
    anisotropic: bool = False

    def corrupt(self, x: Tensor) -> Tensor:
        along, across = uniform(self.px, x, log=True), uniform(self.px, x, log=True)
        if not self.anisotropic:
            across = along
        angle = uniform((0, math.pi), x)
        return convolve(x, gaussian_kernel(along, across, angle, math.ceil(3 * self.px[1])))


def gaussian_kernel(along: Tensor, across: Tensor, angle: Tensor, radius: int) -> Tensor:
    """(B, 2 radius + 1, 2 radius + 1), sum 1; standard deviations (B,) px."""
    line = torch.arange(-radius, radius + 1.0, device=along.device)
    x, y = line[None, None, :], line[None, :, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = (cos * x + sin * y) / along[:, None, None], (cos * y - sin * x) / across[:, None, None]
    kernel = torch.exp(-0.5 * (u**2 + v**2))
    return kernel / kernel.sum((1, 2), keepdim=True)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Each image of x (B,C,H,W) with its own kernel (B,k,k), borders repeated."""
    radius = kernel.shape[-1] // 2
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    kernels = kernel[:, None].repeat_interleave(x.shape[1], 0)
    return F.conv2d(padded.flatten(0, 1)[None], kernels, groups=len(kernels))[0].view(x.shape)


@dataclass(frozen=True)
class Posterised(Pixelwise):
    """Flat patches of `px` with `levels` values per channel: a map of what is where, for pictures that have none drawn by hand."""

    px: int = 4
    levels: int = 4

    def corrupt(self, x: Tensor) -> Tensor:
        small = F.avg_pool2d(x, self.px)
        steps = (self.levels - 1) / 2
        return F.interpolate(((small + 1) * steps).round() / steps - 1, scale_factor=self.px)


@dataclass(frozen=True)
class OneOf(Pixelwise):
    """One of the parts, chosen anew for each image."""

    parts: Sequence[Corruption]

    def corrupt(self, x: Tensor) -> Tensor:
        choice = torch.randint(len(self.parts), (len(x),), device=x.device)
        out = x.clone()
        for number, part in enumerate(self.parts):
            if (chosen := choice == number).any():
                out[chosen] = part.degrade(x[chosen]).x
        return out


@dataclass(frozen=True)
class Fixed(Corruption):
    """The same for every image."""

    degradation: Degradation

    @property
    def downscale(self) -> int:  # type: ignore[override]
        return self.degradation.factor

    def degrade(self, x: Tensor) -> ConditioningImage:
        return ConditioningImage(as_8_bit(self.degradation(x)))


def resize(x: Tensor, factor: float, mode: str) -> Tensor:
    size = [max(1, round(side * factor)) for side in x.shape[2:]]
    return F.interpolate(x, size=size, mode=mode, **({} if mode == "area" else {"antialias": factor < 1}))


@dataclass(frozen=True)
class BSR(Corruption):
    """BSRGAN's degradation (arXiv:2103.14006): two blurs, a resize by a random kernel to a random size and one to 1 / downscale, noise and
    JPEG in random order, then JPEG."""

    downscale: int = 4
    blur: Blur = field(default_factory=lambda: Blur((0.2, 2.0), anisotropic=True))
    noise: GaussianNoise = field(default_factory=lambda: GaussianNoise((0.004, 0.1)))
    jpeg: Jpeg = field(default_factory=lambda: Jpeg((30, 95)))

    def degrade(self, x: Tensor) -> ConditioningImage:
        return ConditioningImage(torch.cat([self._one(image) for image in x.split(1)]))

    def _one(self, x: Tensor) -> Tensor:
        size, modes = [side // self.downscale for side in x.shape[2:]], ("bilinear", "bicubic", "area")
        between = float(uniform((1 / self.downscale, 1.0), x))
        final, step = torch.randint(3, (2,)).tolist()
        parts = [self.blur.corrupt, self.blur.corrupt, lambda x: resize(x, between, modes[step]), self.noise.corrupt, self.jpeg.corrupt]
        for number in torch.randperm(len(parts)).tolist():
            x = parts[number](x)
        return self.jpeg.degrade(resize(x, size[0] / x.shape[2], modes[final])).x


@dataclass(frozen=True)
class Holes(Corruption):
    """Hidden parts for inpainting: brush strokes, boxes or a side of the image (outpainting), one kind per image.

    share: bounds of the hidden share of the image, of a side or of a box; strokes: at most so many.
    """

    share: Sequence[float] = (0.1, 0.6)
    strokes: int = 4
    takes_mask = True

    def degrade(self, x: Tensor) -> ConditioningImage:
        height, width = x.shape[2:]
        makers = (self._strokes, self._box, self._side)
        masks = [makers[int(torch.randint(3, ()))](height, width) for _ in x]
        return ConditioningImage(x, torch.stack(masks)[:, None].to(x))

    def _share(self) -> float:
        return float(uniform(self.share, torch.zeros(1)))

    def _box(self, height: int, width: int) -> Tensor:
        ratio, area = math.exp(float(uniform((-0.7, 0.7), torch.zeros(1)))), self._share() * height * width
        h, w = min(height, round(math.sqrt(area * ratio))), min(width, round(math.sqrt(area / ratio)))
        top, left = (int(torch.randint(room + 1, ())) for room in (height - h, width - w))
        mask = torch.zeros(height, width)
        mask[top : top + h, left : left + w] = 1
        return mask

    def _side(self, height: int, width: int) -> Tensor:
        mask = torch.zeros(height, width)
        mask[: round(self._share() * height)] = 1
        turned = torch.rot90(mask, int(torch.randint(4, ())))
        return turned if turned.shape == mask.shape else mask

    def _strokes(self, height: int, width: int) -> Tensor:
        """Chains of thick line segments."""
        short = min(height, width)
        rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        mask = torch.zeros(height, width, dtype=torch.bool)
        for _ in range(int(torch.randint(1, self.strokes + 1, ()))):
            place = torch.rand(2) * torch.tensor([height, width])
            thickness = short * (0.03 + 0.12 * float(torch.rand(())))
            angle = 2 * math.pi * float(torch.rand(()))
            for _ in range(int(torch.randint(1, 6, ()))):
                angle += math.pi * (float(torch.rand(())) - 0.5)
                step = short * (0.1 + 0.4 * float(torch.rand(()))) * torch.tensor([math.sin(angle), math.cos(angle)])
                away = torch.stack([rows - place[0], columns - place[1]])
                along = (torch.einsum("khw,k->hw", away, step) / step.square().sum()).clamp(0, 1)
                mask |= (away - along * step[:, None, None]).square().sum(0) < thickness**2
                place = place + step
        return mask.float()
