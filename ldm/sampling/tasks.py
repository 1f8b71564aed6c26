"""What a trained model can do with given images without being trained for it.  A new task is one frozen dataclass."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.degradations import Degradation, Downscale
from ldm.diffusion.samplers import Ancestral, RePaint, inverted
from ldm.errors import UserError
from ldm.interfaces import Denoise, Noise, NoiseSchedule, Sampler, Task, TaskInput
from ldm.sampling.wrappers import slerp

FINAL_ITERATIONS = 500  # of fitting a finished picture to what was measured: to less than a level of 255


def require_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise UserError(f"strength is {strength}; allowed is 0 (the image as it is) to 1 (nothing of it)")


def levels_below(schedule: NoiseSchedule, sigmas: Tensor, strength: float) -> Tensor:
    """As many noise levels as sigmas (n+1,), at the share `strength` of their times: all steps are done, from lower noise on."""
    times = strength * schedule.t(sigmas[:-1])
    return torch.cat([schedule.sigma(times), sigmas[-1:]])


@dataclass(frozen=True)
class ImageTask(Task):
    """A task that works on an image."""

    needs_image = True


@dataclass(frozen=True)
class ImageToImage(ImageTask):
    """Noise the image, then sample from there (SDEdit, arXiv:2108.01073).

    strength: the time of the schedule at which sampling starts, as a share of all; 0: the image's reconstruction, 1: nothing of it is
    left.  All steps lie below it.
    """

    strength: float = 0.6

    def __post_init__(self) -> None:
        require_strength(self.strength)

    def start(self, given: TaskInput, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if self.strength == 1:
            return super().start(given, noise, schedule, sigmas)
        if self.strength == 0:
            return given.latents, sigmas[-1:]
        below = levels_below(schedule, sigmas, self.strength)
        return given.latents + float(below[0]) * noise(), below


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
    """Inpaint beyond the borders: so many px are added on each side.

    It starts from the border's colours, and each step is repeated (RePaint), so that what is added goes on where the image ends;
    tools/compare_outpaint.py shows other ways.
    """

    strength: float = 0.5
    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    whole = 2

    def sampler(self, own: Sampler) -> Sampler:
        return RePaint(times=5)

    def canvas(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        sides = (self.left, self.right, self.top, self.bottom)
        return F.pad(image, sides, mode="replicate"), F.pad(mask * 0, sides, value=1.0)


@dataclass(frozen=True)
class RemoveNoise(ImageTask):
    """The image's latents are taken to have noise of this level (in standard deviations of latents) already."""

    level: float = 0.3
    one_picture = True

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
    one_picture = True

    def start(self, given: TaskInput, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        if self.strength == 0:
            return given.latents, sigmas[-1:]
        below = levels_below(schedule, sigmas, self.strength)
        return Ancestral().sample(given.source_denoise, given.latents, inverted(below), noise), below


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
    """Undo a known degradation: in every step D is drawn to the pictures whose degradation is what was measured, and the result is one of
    them: what is known stays, the model adds what is not (the null space, DDNM, arXiv:2212.00490).

    In latents, D + E(fit(image of D)) - E(image of D): what the autoencoder loses cancels.
    """

    degradation: Degradation = field(default_factory=Downscale)

    @property
    def downscale(self) -> int:
        return self.degradation.factor

    def canvas(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.downscale
        large = F.interpolate(image, scale_factor=factor, mode="bicubic").clamp(-1, 1) if factor > 1 else image
        return large, torch.ones_like(large[:, :1])

    def wrap(self, denoise: Denoise, given: TaskInput) -> Denoise:
        y = self.degradation.measured(given.measurement)

        def restored(x: Tensor, sigma: Tensor) -> Tensor:
            z0 = denoise(x, sigma)
            image = given.decode(z0).clamp(-1, 1)
            return z0 + given.encode(self.degradation.fit(image, y)) - given.encode(image)

        return restored

    def finish(self, pictures: Tensor, given: TaskInput) -> Tensor:
        return self.degradation.fit(pictures, self.degradation.measured(given.measurement), iterations=FINAL_ITERATIONS)
