"""Stage 1: images <-> latents, and what trains and measures that."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.interfaces.core import Buildable


class Posterior(ABC):
    """q(z | x) of an autoencoder, all (B,C,h,w)."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """z for standard normal noise of z's shape."""

    @abstractmethod
    def mode(self) -> Tensor: ...


class BottleneckOutput(NamedTuple):
    """What training sends from the encoder to the decoder."""

    z: Tensor  # (B,C,h,w)
    penalty: Tensor  # (B,) the regulariser, weighted, per value of the image
    logs: dict[str, Tensor]  # () each


class Bottleneck(Buildable, nn.Module, ABC):
    """What lies between encoder and decoder and regularises the latents, its weight included."""

    channels: int  # C
    moment_channels: int  # M, what the encoder makes for C latent channels
    num_codes: int = 0  # of a discrete latent space; 0: continuous

    @abstractmethod
    def posterior(self, moments: Tensor) -> Posterior:
        """moments (B,M,h,w)."""

    @abstractmethod
    def forward(self, moments: Tensor, noise: Callable[[Tensor], Tensor], values: int) -> BottleneckOutput:
        """The training path; noise makes standard normal values of its argument's shape; values: 3*H*W of an image."""

    def quantize(self, z: Tensor) -> Tensor:
        """z (B,C,h,w) as the decoder may see it: the nearest code where latents are discrete."""
        return z

    def codes(self, z: Tensor) -> Tensor:
        """As Autoencoder.codes."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def after_step(self) -> None:
        """Called after each optimizer step, on all ranks together."""


class Reconstruction(NamedTuple):
    x: Tensor  # (B,3,H,W)
    latent: BottleneckOutput


class Autoencoder(Buildable, nn.Module, ABC):
    """Images <-> latents.  `moments` is all that a latent cache has to keep of an image."""

    factor: int  # H / h
    channels: int  # C
    image_channels: int = 3
    num_codes: int = 0  # of a discrete latent space; 0: continuous
    pixels: bool = False  # whether the latents are the images themselves

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) in [-1,1] -> parameters (B,M,h,w) of the posterior."""

    @abstractmethod
    def posterior(self, moments: Tensor) -> Posterior: ...

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """z (B,C,h,w) -> x (B,3,H,W); quantises first where the latent space is discrete."""

    def encode(self, x: Tensor) -> Posterior:
        self.require_divisible(x)
        return self.posterior(self.moments(x))

    def forward(self, x: Tensor, noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Reconstruction:
        """The training path of an autoencoder that can be trained; needs `last_layer` for an adaptive adversarial weight."""
        raise NotImplementedError(f"{type(self).__name__} cannot be trained")

    @property
    def last_layer(self) -> Tensor:
        """The weights that make the pixels."""
        raise NotImplementedError(f"{type(self).__name__} has no last layer")

    def codes(self, z: Tensor) -> Tensor:
        """Indices (B,h,w) of the codes nearest to z (B,C,h,w), where latents are discrete."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    def after_step(self) -> None:
        """Called after each optimizer step, on all ranks together."""

    def parts_to_compile(self) -> list[nn.Module]:
        """Those that are called as a whole in training."""
        return [self]

    def require_divisible(self, x: Tensor) -> None:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise UserError(
                f"images of {x.shape[-1]}x{x.shape[-2]} pixels do not divide by the autoencoder's factor {self.factor}: "
                f"choose a size that is a multiple of {self.factor}"
            )


class AutoencoderLoss(Buildable, nn.Module, ABC):
    """A further term of stage 1's reconstruction loss, such as LPIPS; called in fp32."""

    name: str  # in logs
    weight: float = 1.0

    @abstractmethod
    def forward(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """(B,) for images (B,3,H,W) in [-1,1], unweighted."""


class Discriminator(Buildable, nn.Module, ABC):
    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) -> logits (B,1,.,.), high where x looks real."""


class Adversary(Buildable, nn.Module, ABC):
    """The adversarial term of stage 1's loss, from optimizer step `start` on; its parameters are the discriminator's.  In fp32."""

    start: int
    alone: int = 0  # steps from `start` on in which the discriminator learns and the generator does not hear of it
    weight: float  # of the generator's loss

    def check(self, x: Tensor) -> None:
        """Before training: a ValueError if images of the shape of x (B,3,H,W) are none for the discriminator."""

    @abstractmethod
    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """(), unweighted; gradients reach the reconstruction (B,3,H,W), not the discriminator."""

    @abstractmethod
    def scale(self, reconstruction: Tensor, pulls: Sequence[Tensor], last_layer: Tensor) -> Tensor:
        """() what the generator's loss is multiplied by besides its weight; pulls: the gradients of the reconstruction's own loss and of
        the generator's by the reconstruction (B,3,H,W)."""

    @abstractmethod
    def discriminator_loss(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(), and figures that tell of the discriminator's health; gradients reach the discriminator alone."""


class ReconstructionMetric(nn.Module, ABC):
    """How close reconstructions come to their images, over all ranks; torchmetrics.Metric has the plumbing."""

    @property
    def made(self) -> dict[str, str | int]:
        """What decides the figures besides the images: of distances between sets `features` (the network's name), `resize`, `rounding`."""
        return {}

    @abstractmethod
    def update(self, reconstruction: Tensor, x: Tensor) -> None:
        """Both (B,3,H,W) in [-1, 1]."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """() each, by name."""

    @abstractmethod
    def reset(self) -> None: ...


class Features(Buildable, nn.Module, ABC):
    """A frozen network in whose features images are compared."""

    name: str  # in results: FD-<name>
    resize: int  # px to which images are resized first, bilinear with antialias

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> (B,D)."""
