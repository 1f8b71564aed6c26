"""The frozen first stage, as stage 2 sees it."""

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ldm.diffusion.likelihood import Bins
from ldm.errors import UserError
from ldm.interfaces import Autoencoder, Posterior
from ldm.latents.clips import FrameStack


class LatentSpace(nn.Module):
    """A frozen autoencoder whose latents are normalised per channel to mean 0, standard deviation 1 over the data.

    Nothing else knows of the shift and scale.  `measure` sets them once; until then sampling and training refuse to start.
    """

    shift: Tensor  # (C,)
    scale: Tensor  # (C,)
    count: Tensor  # () images measured
    size: Tensor  # (2,) h, w of the training latents

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.register_buffer("shift", torch.zeros(autoencoder.channels))
        self.register_buffer("scale", torch.ones(autoencoder.channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("size", torch.zeros(2, dtype=torch.int64))
        self._facts: tuple[int, int, int] | None = None
        self.register_load_state_dict_post_hook(LatentSpace._forget)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever its owner does."""
        return super().train(False)

    def measure(self, mean: Tensor, std: Tensor, count: int, size: tuple[int, int]) -> None:
        """Statistics of the raw latents over `count` training images: mean, std (C,); size (h, w)."""
        if count < 1 or not torch.isfinite(mean).all() or not (std > 0).all():
            raise UserError(f"the first stage's latents over {count} images have mean {mean.tolist()}, std {std.tolist()}: train it again")
        self.shift.copy_(mean)
        self.scale.copy_(std)
        self.count.fill_(count)
        self.size.copy_(torch.tensor(size))
        self._facts = None

    def _forget(self, keys: object) -> None:
        self._facts = None

    @property
    def facts(self) -> tuple[int, int, int]:
        """count, h and w as numbers, which are asked for often, and read from a GPU once."""
        if self._facts is None:
            self._facts = (int(self.count), *self.size.tolist())
        return self._facts

    def of_frames(self, frames: int) -> "LatentSpace":
        """The latent space of clips, each frame normalised as an image is."""
        found = LatentSpace(FrameStack(self.autoencoder, frames))
        if self.measured:
            count, *size = self.facts
            found.measure(self.shift.repeat(frames), self.scale.repeat(frames), count, (size[0], size[1]))
        return found

    def shape_of(self, size: tuple[int, int] | None, multiple: int = 1) -> tuple[int, int]:
        """Height and width of the latents of pictures of `size` px, rounded up to the network's `multiple`; None: of the training's."""
        if size is None:
            return self.facts[1:]
        height, width = (-(-side // (self.autoencoder.factor * multiple)) * multiple for side in size)
        return height, width

    @property
    def bins(self) -> Bins | None:
        """The grid of 8-bit images in these latents, where they are the pixels themselves."""
        if not self.autoencoder.pixels:
            return None
        ends = torch.tensor([-1.0, 1.0], device=self.shift.device)
        low, high = ((end - self.shift) / self.scale for end in ends)
        return Bins(*(a[:, None, None] for a in (2 / 255 / self.scale, low, high)))

    @property
    def measured(self) -> bool:
        return self.facts[0] > 0

    def require_measured(self) -> None:
        if not self.measured:
            raise UserError("this model has no latent statistics: train its second stage with `ldm fit`, which measures them")

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.shift[:, None, None]) / self.scale[:, None, None]

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        self.autoencoder.require_divisible(x)
        return self.autoencoder.moments(x)

    @torch.no_grad()
    def to_latents(self, x: Tensor | Posterior, noise: Tensor | None = None) -> Tensor:
        """x (B,3,H,W) in [-1,1], or its posterior -> z (B,C,h,w); the posterior's mode without noise."""
        posterior = x if isinstance(x, Posterior) else self.autoencoder.encode(x)
        return self.normalise(posterior.mode() if noise is None else posterior.sample(noise))

    def decode(self, z: Tensor) -> Tensor:
        """As to_images, with gradients."""
        return self.autoencoder.decode(z * self.scale[:, None, None] + self.shift[:, None, None])

    @torch.no_grad()
    def to_images(self, z: Tensor) -> Tensor:
        """z (B,C,h,w) -> x (B,3,H,W), about [-1, 1]."""
        return self.decode(z)
