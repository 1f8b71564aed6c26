"""Large images tile by tile."""

import pytest
import torch
from conftest import normal, randomise
from torch import Tensor

from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.autoencoder.tiling import Tiled
from ldm.data.images import EmojiImages
from ldm.model_folder import load
from ldm.ranges import to_float


def collage(side: int) -> Tensor:
    """side x side emoji as one picture."""
    emoji = torch.stack([to_float(EmojiImages().pixels(20 * i)) for i in range(side**2)])
    return emoji.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[None]


def test_one_tile_is_the_whole_bit_for_bit() -> None:
    model = randomise(ConvAutoencoder(KL(2), 8, (1, 2), 1), scale=0.05).eval()
    tiled, x = Tiled(model, 64, 16), normal(2, 3, 64, 48)
    with torch.no_grad():
        one = torch.cat([model.moments(image) for image in x.split(1)])
        assert torch.equal(tiled.moments(x), one)
        assert torch.equal(tiled.decode(one[:, :2]), torch.cat([model.decode(z) for z in one[:, :2].split(1)]))


def test_tiles_of_what_works_pixel_by_pixel_are_the_whole() -> None:
    """Blending has weights that add up to 1, and every pixel comes from its own place."""

    class Pointwise(ConvAutoencoder):
        def moments(self, x: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(x, 2)

        def decode(self, z: Tensor) -> Tensor:
            return z.repeat_interleave(2, 2).repeat_interleave(2, 3)

    model, x = Pointwise(KL(3), 8, (1, 2), 1), normal(2, 3, 150, 98)
    tiled = Tiled(model, 32, 8)
    torch.testing.assert_close(tiled.moments(x), model.moments(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled.decode(model.moments(x)), model.decode(model.moments(x)), rtol=1e-5, atol=1e-5)


def test_tiles_of_the_carried_autoencoder_come_within_a_stated_tolerance() -> None:
    """256 px in tiles of 128 with an overlap of 32: decoded, the difference is below 3 of 255 on average."""
    model = load("emoji").model.latents.autoencoder
    tiled, x = Tiled(model, 128, 32), collage(4)
    with torch.no_grad():
        z = model.encode(x).mode()
        whole = model.decode(z)
        assert float((tiled.decode(z) - whole).abs().mean()) < 3 / 127.5
        assert float((tiled.encode(x).mode() - z).abs().mean()) < 0.05 * float(z.std())


def test_tiles_leave_no_seams() -> None:
    """The mean step in brightness from a column, or row, to the next, against that of the picture decoded in one piece."""
    model = load("emoji").model.latents.autoencoder
    with torch.no_grad():
        z = model.encode(collage(4)).mode()
        pictures = Tiled(model, 128, 32).decode(z), model.decode(z)
    for direction in (2, 3):
        tiled, whole = (picture.diff(dim=direction).abs().mean((0, 1, 5 - direction)) for picture in pictures)
        assert float((tiled / whole).max()) < 1.2


def test_tiles_that_do_not_fit() -> None:
    model = ConvAutoencoder(KL(2), 8, (1, 2, 2), 1)
    for tile, overlap in ((30, 8), (32, 6), (32, 32), (32, 0)):
        with pytest.raises(ValueError, match=f"tiles of {tile} px with an overlap of {overlap}: both must be multiples of the factor 4"):
            Tiled(model, tile, overlap)
