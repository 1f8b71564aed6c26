"""Tasks: what a trained model does with given images."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ldm.interfaces.core import Buildable, Denoise, Noise
from ldm.interfaces.diffusion import NoiseSchedule, Sampler


class TaskInput(NamedTuple):
    """Images that a task works on; B pictures of HxW px."""

    measurement: Tensor  # (B,3,.,.) in [-1,1], as they were given
    image: Tensor  # (B,3,H,W) the same at the size of the picture
    mask: Tensor  # (B,1,H,W), 1 where the picture is to be made anew, 0 where the image stays
    latents: Tensor  # (B,C,h,w) of the image, padded to what the model can take
    latent_mask: Tensor  # (B,1,h,w), 1 where a latent is to be made anew: it stays only if all of its pixels do
    source_denoise: Denoise  # D without guidance, for what the image shows
    decode: Callable[[Tensor], Tensor]  # latents -> images (B,3,H,W)
    encode: Callable[[Tensor], Tensor]  # images (B,3,H,W) -> latents
    second_latents: Tensor | None = None  # (B,C,h,w) of a second image
    weight: Tensor | None = None  # (B,) of it


class Task(Buildable):
    """Where sampling starts, and what D may say on the way.

    The base class is "from pure noise": it needs no image, never looks at `given`, and gets None for it.
    """

    needs_image: bool = False
    one_picture: bool = False  # no noise decides what comes out, so that n pictures would be the same
    whole: int = 1  # how many times larger than the training's a picture may be before it is made of windows

    def sampler(self, own: Sampler) -> Sampler:
        """What it is sampled with unless the user chooses; own: the model's."""
        return own

    @property
    def downscale(self) -> int:
        """How many times smaller than the picture the given image is."""
        return 1

    def canvas(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """image (B,3,H,W) and mask (B,1,H,W) as the user gave them -> at the size of the picture."""
        return image, mask

    def start(self, given: TaskInput, noise: Noise, schedule: NoiseSchedule, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """The first state and the noise levels from there; by default pure noise and all of them."""
        return schedule.prior(noise(), sigmas[0]), sigmas

    def wrap(self, denoise: Denoise, given: TaskInput) -> Denoise:
        """D with what the task knows."""
        return denoise

    def finish(self, pictures: Tensor, given: TaskInput) -> Tensor:
        """The pictures (B,3,H,W) as the user gets them."""
        return pictures
