"""Images as a condition: appended to the latents, or as a vector."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.devices import send
from ldm.draws import Draws
from ldm.errors import UserError
from ldm.frames import merge_frames, split_frames
from ldm.interfaces import Batch, Cond, Conditioner, ConditioningImage, Corruption, Features, ImageInput
from ldm.nn.attention import timestep_embedding
from ldm.nn.pretrained import Frozen
from ldm.ranges import to_float, to_uint8

LEVEL_DIM = 64


def shown(degrade: Callable[[Batch], ConditioningImage], batch: Batch, seeds: Sequence[int]) -> Batch:
    """`conditioning_image` of a batch: what is left of each image, with torch's random numbers of its seed."""
    left = list[ConditioningImage]()
    with torch.random.fork_rng(devices=[]):
        for i, seed in enumerate(seeds):
            torch.manual_seed(seed % 2**63)
            left.append(degrade({name: batch[name][i : i + 1].cpu() for name in ("image", "map") if name in batch}))
    masks = [one.mask for one in left if one.mask is not None]
    return {"conditioning_image": ConditioningImage(torch.cat([one.x for one in left]), torch.cat(masks) if masks else None)}


class Concat(Conditioner):
    """The latents of what is left of an image, appended to the channels of x: super-resolution, restoration, inpainting, ...

    In training that is what `corruption` leaves of the image, or without one the image's map; batch["conditioning_image"] comes first.
    A mask becomes one more channel, 1 where a latent is to be made anew; the image is grey there. channels: of the latents, of each of
    the `frames` of clips, whose mask is the same for all. noise > 0: in training, noise of a level up to that is added to the latents
    and the level told
    in a vector of 64 values, so that the model trusts them less (arXiv:2106.15282).
    """

    def __init__(
        self, corruption: Corruption | None = None, channels: int | None = None, noise: float = 0.0, frames: int | None = None
    ) -> None:
        super().__init__()
        channels, frames = channels or 4, frames or 1
        self.corruption, self.channels, self.noise, self.frames = corruption, channels, noise, frames
        self.downscale, self.takes_mask = (1, False) if corruption is None else (corruption.downscale, corruption.takes_mask)
        self.inputs = {"image": ImageInput(self.downscale, self.takes_mask)}
        self.concat_channels = frames * (channels + self.takes_mask)
        self.vector_dim = LEVEL_DIM if noise else 0

    def degrade(self, batch: Batch) -> ConditioningImage:
        if self.corruption is not None:
            return self.corruption.degrade(to_float(batch["image"]))
        if "map" not in batch:
            raise UserError("Concat without a corruption takes the images' maps, the data has none: set data.maps, a folder of maps")
        return ConditioningImage(to_float(batch["map"]))

    def prepare(self, batch: Batch, seeds: Sequence[int]) -> Batch:
        return shown(self.degrade, batch, seeds)

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        x, mask = batch["conditioning_image"] if "conditioning_image" in batch else self.degrade(batch)
        if self.downscale > 1:
            x = F.interpolate(x, scale_factor=self.downscale, mode="bicubic").clamp(-1, 1)
        if self.takes_mask:
            mask = torch.ones_like(x[:, :1]) if mask is None else mask
            x = x * (1 - mask)
        z = to_latents(x)
        if z.shape[1] != self.frames * self.channels:
            raise UserError(
                f"the first stage has {z.shape[1]} latent channels, Concat {self.frames} x {self.channels}: leave these out, which follow"
            )
        level = torch.zeros(len(z), device=z.device)
        if self.noise and self.training:
            draws: Draws = batch["draws"]
            level = send((self.noise * draws.uniform()).to(level.dtype), z.device)
            z = z + level.view(-1, 1, 1, 1) * draws.normal(z)
        if self.takes_mask and mask is not None:
            anew = F.max_pool2d(mask, mask.shape[-1] // z.shape[-1]).repeat_interleave(self.frames, dim=0)
            z = merge_frames(torch.cat([split_frames(z, self.frames), anew], dim=1), self.frames)
        return Cond(self._told(level), concat=z)

    def null(self, batch: Batch) -> Cond:
        """Nothing seen, all to be made."""
        like = batch["conditioning_image"].x if "conditioning_image" in batch else batch["image"]
        concat = torch.zeros(len(like), self.concat_channels, 1, 1, device=like.device)
        if self.takes_mask:
            concat[:, self.channels :: self.channels + 1] = 1
        return Cond(self._told(torch.zeros(len(like), device=like.device)), concat=concat)

    def _told(self, level: Tensor) -> Tensor | None:
        return timestep_embedding(1000 * level / self.noise, LEVEL_DIM) if self.noise else None


class ImageEmbedding(Conditioner):
    """The features of an image as a vector (dim; None: as many as there are): variations of a picture.  The null is the vector 0."""

    inputs = {"image": ImageInput()}  # noqa: RUF012

    def __init__(self, features: Features, dim: int | None = None) -> None:
        super().__init__()
        found = features(torch.zeros(1, 3, features.resize, features.resize, dtype=torch.uint8)).shape[1] if dim is None else dim
        self.features, self.vector_dim = Frozen(features), found

    def degrade(self, batch: Batch) -> ConditioningImage:
        return ConditioningImage(to_float(batch["image"]))

    def prepare(self, batch: Batch, seeds: Sequence[int]) -> Batch:
        return shown(self.degrade, batch, seeds)

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        x, _ = batch["conditioning_image"] if "conditioning_image" in batch else self.degrade(batch)
        vector = self.features(to_uint8(x))
        if vector.shape[1] != self.vector_dim:
            raise UserError(f"the features have {vector.shape[1]} values, ImageEmbedding's dim is {self.vector_dim}: leave it out")
        return Cond(F.normalize(vector, dim=1) * self.vector_dim**0.5)

    def null(self, batch: Batch) -> Cond:
        like = batch["conditioning_image"].x if "conditioning_image" in batch else batch["image"]
        return Cond(torch.zeros(len(like), self.vector_dim, device=like.device))
