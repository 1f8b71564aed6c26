"""What a trained model can do with given images without being trained for it.  A new task is one frozen dataclass."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.degradations import Degradation, Smaller
from ldm.diffusion.samplers import Ancestral, inverted
from ldm.interfaces import Denoise, Given, Noise, NoiseSchedule, Task


def require_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; allowed is 0 (the image as it is) to 1 (nothing of it)")


def last_levels(sigmas: Tensor, strength: float) -> Tensor:
    """The last share `strength` of the steps."""
    return sigmas[len(sigmas) - 1 - math.ceil(strength * (len(sigmas) - 1)) :]


@dataclass(frozen=True)
class ImageToImage(Task):
    """Noise the image, then sample from there (SDEdit, arXiv:2108.01073): the share `strength` of the steps is done.  0: the image's
    reconstruction, 1: nothing of it is left."""

    strength: float = 0.6

    def __post_init__(self) -> None:
        require_strength(self.strength)

    def start(self, given: Given, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if self.strength == 1:
            return super().start(given, noise, schedule, sigmas)
        left = last_levels(sigmas, self.strength)
        return given.z0 + float(left[0]) * noise(), left


@dataclass(frozen=True)
class Inpaint(ImageToImage):
    """Make the masked part anew: D is the image's own latents elsewhere, in every step.  strength: as ImageToImage, within the mask.
    Outside it the finished picture has the given pixels.  With the sampler RePaint both parts agree better."""

    strength: float = 1.0

    def wrap(self, denoise: Denoise, given: Given) -> Denoise:
        factor = given.x.shape[-1] // given.z0.shape[-1]
        anew = F.max_pool2d(given.mask, factor)  # a latent stays only if all of its pixels do
        return lambda x, sigma: torch.lerp(given.z0, denoise(x, sigma), anew)

    def finish(self, pictures: Tensor, given: Given) -> Tensor:
        return torch.lerp(given.x, pictures, given.mask)


@dataclass(frozen=True)
class Outpaint(Inpaint):
    """Inpaint beyond the borders: so many px (multiples of the autoencoder's factor) are added on each side."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def canvas(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        sides = (self.left, self.right, self.top, self.bottom)
        return F.pad(x, sides, mode="replicate"), F.pad(mask * 0, sides, value=1.0)


@dataclass(frozen=True)
class RemoveNoise(Task):
    """The image's latents are taken to have noise of this level (in standard deviations of latents) already."""

    level: float = 0.3

    def __post_init__(self) -> None:
        if self.level < 0:
            raise ValueError(f"the level of noise to remove is {self.level}; allowed is 0 or more")

    def start(self, given: Given, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        level = sigmas.new_tensor(self.level)
        return given.z0, torch.cat([level[None], sigmas[sigmas < level]])


@dataclass(frozen=True)
class Edit(ImageToImage):
    """Find the noise that makes the image (DDIM inversion, appendix F of arXiv:2105.05233), then sample from it with another condition."""

    strength: float = 0.8

    def start(self, given: Given, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        left = last_levels(sigmas, self.strength)
        return Ancestral().sample(given.plain, given.z0, inverted(left), noise), left


@dataclass(frozen=True)
class Between(Task):
    """From one image to another: the noises that make them (by inversion, as in Edit), spherically interpolated.  Best without guidance,
    which leads away from the images."""

    def start(self, given: Given, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if given.other is None or given.share is None:
            raise ValueError("Between needs a second image: give --towards FILE")
        ends = [Ancestral().sample(given.plain, z0, inverted(sigmas), noise) for z0 in (given.z0, given.other)]
        return torch.stack([slerp(a, b, float(share)) for a, b, share in zip(*ends, given.share, strict=True)]), sigmas


@dataclass(frozen=True)
class Style(Task):
    """A new picture with the colours of the image: above the noise level `until`, D gets the image's mean and deviation per latent
    channel (AdaIN, arXiv:1703.06868, in latents)."""

    weight: float = 1.0
    until: float = 0.5

    def wrap(self, denoise: Denoise, given: Given) -> Denoise:
        std, mean = torch.std_mean(given.z0, dim=(2, 3), keepdim=True)

        def styled(x: Tensor, sigma: Tensor) -> Tensor:
            z0 = denoise(x, sigma)
            if sigma <= self.until:
                return z0
            own_std, own_mean = torch.std_mean(z0, dim=(2, 3), keepdim=True)
            return torch.lerp(z0, (z0 - own_mean) / own_std.clamp(min=1e-6) * std + mean, self.weight)

        return styled


@dataclass(frozen=True)
class Restore(Task):
    """Undo a known degradation: in every step D moves along the gradient, through the network and the decoder, of
    |degradation(image of D) - y|^2 (DPS, arXiv:2209.14687, in latents arXiv:2307.00619).

    scale: length of the move; 1 is where the error along that line is least, if the decoder is taken to be linear.
    """

    degradation: Degradation = field(default_factory=Smaller)
    scale: float = 1.0

    @property
    def shrinks(self) -> int:
        return self.degradation.factor

    def canvas(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        large = F.interpolate(x, scale_factor=self.shrinks, mode="bicubic").clamp(-1, 1) if self.shrinks > 1 else x
        return large, torch.ones_like(large[:, :1])

    def wrap(self, denoise: Denoise, given: Given) -> Denoise:
        def seen(z0: Tensor) -> Tensor:
            return self.degradation(given.to_images(z0))

        def restored(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                z0 = denoise(x, sigma)
                error = seen(z0) - given.y
                (gradient,) = torch.autograd.grad(error.square().sum(), x)
            z0, error, shape = z0.detach(), error.detach(), (-1, 1, 1, 1)
            direction = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(shape)
            probe = 0.01 * z0[0].numel() ** 0.5
            change = (error + given.y - seen(z0 - probe * direction)).flatten(1) / probe
            length = (error.flatten(1) * change).sum(1) / change.square().sum(1).clamp(min=1e-12)
            return z0 - self.scale * length.clamp(min=0).view(shape) * direction

        return restored


def mixture(one: Denoise, other: Denoise, share: Tensor) -> Denoise:
    """D between those of two conditions; share (B,) of the other."""
    return lambda x, sigma: torch.lerp(one(x, sigma), other(x, sigma), share.view(-1, *[1] * (x.ndim - 1)).to(x))


def windows(denoise: Denoise, size: tuple[int, int], overlap: float = 0.5) -> Denoise:
    """D for latents larger than `size` (h, w): the mean of D in overlapping windows of that size (MultiDiffusion, arXiv:2302.08113), which
    count less towards their edges, so that these leave no seams (arXiv:2302.02412; here as sin^2)."""

    def starts(whole: int, part: int) -> list[int]:
        count = 1 if whole <= part else math.ceil((whole - part) / (part * (1 - overlap))) + 1
        return [round(i * (whole - part) / max(count - 1, 1)) for i in range(count)]

    def fading(count: int) -> Tensor:
        return torch.sin(math.pi * (torch.arange(count) + 0.5) / count).square()

    def joined(x: Tensor, sigma: Tensor) -> Tensor:
        weight = torch.outer(fading(min(size[0], x.shape[2])), fading(min(size[1], x.shape[3]))).to(x)
        total, count = torch.zeros_like(x), x.new_zeros(x.shape[2:])
        for top in starts(x.shape[2], size[0]):
            for left in starts(x.shape[3], size[1]):
                part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
                total[part] += weight * denoise(x[part], sigma)
                count[part[1:]] += weight
        return total / count

    return joined


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation between two draws of noise of any shape: the result's length is between theirs."""
    angle = torch.acos((F.normalize(a.flatten(), dim=0) @ F.normalize(b.flatten(), dim=0)).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, weight)
    one, other = (torch.sin(share * angle) / torch.sin(angle) for share in (1 - weight, weight))
    return one * a + other * b
