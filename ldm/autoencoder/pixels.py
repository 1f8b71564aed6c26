"""No first stage: diffusion in pixels."""

from torch import Tensor

from ldm.autoencoder.bottleneck import Deterministic
from ldm.interfaces import Autoencoder, Posterior


class Pixels(Autoencoder):
    """The identity: with `first_stage: {class_path: Pixels}` stage 2 is the pixel diffusion of DDPM (arXiv:2006.11239)."""

    factor, pixels = 1, True

    def __init__(self, image_channels: int | None = None) -> None:
        super().__init__()
        self.channels = self.image_channels = image_channels or 3

    def moments(self, x: Tensor) -> Tensor:
        return x

    def posterior(self, moments: Tensor) -> Posterior:
        return Deterministic(moments)

    def decode(self, z: Tensor) -> Tensor:
        return z
