"""Clips of frames, each by an autoencoder of images."""

from torch import Tensor

from ldm.frames import merge_frames, split_frames
from ldm.interfaces import Autoencoder, Posterior


class FrameStack(Autoencoder):
    """Clips x (B, T*3, H, W) <-> z (B, T*C, h, w), frame by frame."""

    def __init__(self, autoencoder: Autoencoder, frames: int) -> None:
        super().__init__()
        self.factor, self.channels = autoencoder.factor, autoencoder.channels * frames
        self.image_channels, self.num_codes = autoencoder.image_channels * frames, autoencoder.num_codes
        self.autoencoder, self.frames = autoencoder, frames

    def moments(self, x: Tensor) -> Tensor:
        return merge_frames(self.autoencoder.moments(split_frames(x, self.frames)), self.frames)

    def posterior(self, moments: Tensor) -> Posterior:
        return _Stacked(self.autoencoder.posterior(split_frames(moments, self.frames)), self.frames)

    def decode(self, z: Tensor) -> Tensor:
        return merge_frames(self.autoencoder.decode(split_frames(z, self.frames)), self.frames)

    def codes(self, z: Tensor) -> Tensor:
        """(B, T, h, w)."""
        return self.autoencoder.codes(split_frames(z, self.frames)).unflatten(0, (-1, self.frames))


class _Stacked(Posterior):
    """That of the frames."""

    def __init__(self, frames: Posterior, count: int) -> None:
        self.frames, self.count = frames, count

    def sample(self, noise: Tensor) -> Tensor:
        return merge_frames(self.frames.sample(split_frames(noise, self.count)), self.count)

    def mode(self) -> Tensor:
        return merge_frames(self.frames.mode(), self.count)
