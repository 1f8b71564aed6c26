"""Large images with little memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.devices import full
from ldm.errors import UserError
from ldm.interfaces import Autoencoder, Posterior


class Tiled(Autoencoder):
    """An autoencoder that works image by image and tile by tile; images of at most one tile come out bit-equal.

    tile, overlap: px, multiples of the factor.  Overlaps are blended linearly.  Tiles differ a little from the whole: group norm and the
    middle's attention see one tile only.
    """

    def __init__(self, autoencoder: Autoencoder, tile: int = 512, overlap: int = 128) -> None:
        super().__init__()
        self.factor, self.channels, self.num_codes = autoencoder.factor, autoencoder.channels, autoencoder.num_codes
        self.image_channels = autoencoder.image_channels
        if tile % self.factor or overlap % self.factor or not 0 < overlap < tile:
            raise UserError(
                f"tiles of {tile} px with an overlap of {overlap}: both must be multiples of the factor {self.factor}, "
                "the overlap less than the tile"
            )
        self.autoencoder, self.tile, self.overlap = autoencoder, tile, overlap

    def moments(self, x: Tensor) -> Tensor:
        return self._tiled(self.autoencoder.moments, x, self.factor, 1)

    def posterior(self, moments: Tensor) -> Posterior:
        return self.autoencoder.posterior(moments)

    def decode(self, z: Tensor) -> Tensor:
        return self._tiled(self.autoencoder.decode, z, 1, self.factor)

    def codes(self, z: Tensor) -> Tensor:
        return self.autoencoder.codes(z)

    def _tiled(self, function: Callable[[Tensor], Tensor], source: Tensor, before: int, after: int) -> Tensor:
        """`function` turns squares of `before` into squares of `after`; both are counted in latents times these."""
        return torch.cat([self._image(function, image, before, after) for image in source.split(1)])

    def _image(self, function: Callable[[Tensor], Tensor], source: Tensor, before: int, after: int) -> Tensor:
        tile, overlap = self.tile // self.factor, self.overlap // self.factor
        height, width = (size // before for size in source.shape[2:])
        if max(height, width) <= tile:
            return function(source)
        total, weights = None, full(source).new_zeros(height * after, width * after)
        for top in starts(height, tile, overlap):
            for left in starts(width, tile, overlap):
                rows, columns = slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
                part = full(function(source[:, :, scaled(rows, before), scaled(columns, before)]))
                weight = ramp(part.shape[2], overlap * after, part)[:, None] * ramp(part.shape[3], overlap * after, part)
                if total is None:
                    total = part.new_zeros(*part.shape[:2], *weights.shape)
                place = scaled(rows, after), scaled(columns, after)
                total[:, :, place[0], place[1]] += part * weight
                weights[place] += weight
        assert total is not None
        return total / weights


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """First positions of tiles that cover `size`; the last tile ends with it."""
    return [*range(0, size - tile, tile - overlap), max(size - tile, 0)]


def scaled(part: slice, by: int) -> slice:
    return slice(part.start * by, part.stop * by)


def ramp(size: int, overlap: int, like: Tensor) -> Tensor:
    """Weights (size,) that rise to 1 over the overlap at both ends."""
    steps = torch.arange(size, device=like.device, dtype=like.dtype)
    return (torch.minimum(steps, size - 1 - steps).add(0.5) / overlap).clamp(max=1)
