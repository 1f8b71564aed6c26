"""What a trained model can do with given images without being trained for it.  A new task is one frozen dataclass."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.degradations import Degradation, Downscale
from ldm.diffusion.samplers import Ancestral, inverted
from ldm.errors import UserError
from ldm.interfaces import Denoise, Noise, NoiseSchedule, Task, TaskInput
from ldm.sampling.wrappers import slerp


def require_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise UserError(f"strength is {strength}; allowed is 0 (the image as it is) to 1 (nothing of it)")


def last_levels(sigmas: Tensor, strength: float) -> Tensor:
    """The last share `strength` of the steps."""
    return sigmas[len(sigmas) - 1 - math.ceil(strength * (len(sigmas) - 1)) :]


@dataclass(frozen=True)
class ImageTask(Task):
    """A task that works on an image."""

    needs_image = True


@dataclass(frozen=True)
class ImageToImage(ImageTask):
    """Noise the image, then sample from there (SDEdit, arXiv:2108.01073): the share `strength` of the steps is done.  0: the image's
    reconstruction, 1: nothing of it is left."""

    strength: float = 0.6

    def __post_init__(self) -> None:
        require_strength(self.strength)

    def start(self, given: TaskInput, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if self.strength == 1:
            return super().start(given, noise, schedule, sigmas)
        left = last_levels(sigmas, self.strength)
        return given.latents + float(left[0]) * noise(), left


@dataclass(frozen=True)
class Inpaint(ImageToImage):
    """Make the masked part anew: D is the image's own latents elsewhere, in every step.  strength: as ImageToImage, within the mask.
    Outside it the finished picture has the given pixels.  With the sampler RePaint both parts agree better."""

    strength: float = 1.0

    def wrap(self, denoise: Denoise, given: TaskInput) -> Denoise:
        return lambda x, sigma: torch.lerp(given.latents, denoise(x, sigma), given.latent_mask)

    def finish(self, pictures: Tensor, given: TaskInput) -> Tensor:
        return torch.lerp(given.image, pictures, given.mask)


@dataclass(frozen=True)
class Outpaint(Inpaint):
    """Inpaint beyond the borders: so many px (multiples of the autoencoder's factor) are added on each side."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def canvas(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        sides = (self.left, self.right, self.top, self.bottom)
        return F.pad(image, sides, mode="replicate"), F.pad(mask * 0, sides, value=1.0)


@dataclass(frozen=True)
class RemoveNoise(ImageTask):
    """The image's latents are taken to have noise of this level (in standard deviations of latents) already."""

    level: float = 0.3

    def __post_init__(self) -> None:
        if self.level < 0:
            raise UserError(f"the level of noise to remove is {self.level}; allowed is 0 or more")

    def start(self, given: TaskInput, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        level = sigmas.new_tensor(self.level)
        return given.latents, torch.cat([level[None], sigmas[sigmas < level]])


@dataclass(frozen=True)
class Edit(ImageToImage):
    """Find the noise that makes the image (DDIM inversion, appendix F of arXiv:2105.05233), then sample from it with another condition."""

    strength: float = 0.8

    def start(self, given: TaskInput, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        left = last_levels(sigmas, self.strength)
        return Ancestral().sample(given.source_denoise, given.latents, inverted(left), noise), left


@dataclass(frozen=True)
class Between(ImageTask):
    """From one image to another: the noises that make them (by inversion, as in Edit), spherically interpolated.  Best without guidance,
    which leads away from the images."""

    def start(self, given: TaskInput, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if given.second_latents is None or given.weight is None:
            raise UserError("Between needs a second image: give --to-image FILE")
        ends = [Ancestral().sample(given.source_denoise, z0, inverted(sigmas), noise) for z0 in (given.latents, given.second_latents)]
        return torch.stack([slerp(a, b, float(share)) for a, b, share in zip(*ends, given.weight, strict=True)]), sigmas


@dataclass(frozen=True)
class Style(ImageTask):
    """A new picture with the colours of the image: above the noise level `until`, D gets the image's mean and deviation per latent
    channel (AdaIN, arXiv:1703.06868, in latents)."""

    weight: float = 1.0
    until: float = 0.5

    def wrap(self, denoise: Denoise, given: TaskInput) -> Denoise:
        std, mean = torch.std_mean(given.latents, dim=(2, 3), keepdim=True)

        def styled(x: Tensor, sigma: Tensor) -> Tensor:
            z0 = denoise(x, sigma)
            if sigma <= self.until:
                return z0
            own_std, own_mean = torch.std_mean(z0, dim=(2, 3), keepdim=True)
            return torch.lerp(z0, (z0 - own_mean) / own_std.clamp(min=1e-6) * std + mean, self.weight)

        return styled


@dataclass(frozen=True)
class Restore(ImageTask):
    """Undo a known degradation: in every step D moves along the gradient, through the network and the decoder, of
    |degradation(image of D) - y|^2 (DPS, arXiv:2209.14687, in latents arXiv:2307.00619).

    scale: length of the move; 1 is where the error along that line is least, if the decoder is taken to be linear.
    """

    degradation: Degradation = field(default_factory=Downscale)
    scale: float = 1.0

    @property
    def downscale(self) -> int:
        return self.degradation.factor

    def canvas(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.downscale
        large = F.interpolate(image, scale_factor=factor, mode="bicubic").clamp(-1, 1) if factor > 1 else image
        return large, torch.ones_like(large[:, :1])

    def wrap(self, denoise: Denoise, given: TaskInput) -> Denoise:
        def seen(z0: Tensor) -> Tensor:
            return self.degradation(given.decode(z0))

        def restored(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                z0 = denoise(x, sigma)
                error = seen(z0) - given.measurement
                (gradient,) = torch.autograd.grad(error.square().sum(), x)
            z0, error, shape = z0.detach(), error.detach(), (-1, 1, 1, 1)
            direction = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(shape)
            probe = 0.01 * z0[0].numel() ** 0.5
            change = (error + given.measurement - seen(z0 - probe * direction)).flatten(1) / probe
            length = (error.flatten(1) * change).sum(1) / change.square().sum(1).clamp(min=1e-12)
            return z0 - self.scale * length.clamp(min=0).view(shape) * direction

        return restored
