"""Clips: T frames of C channels lie one after the other in the T * C channels of an image."""

from torch import Tensor


def split_frames(clips: Tensor, frames: int) -> Tensor:
    """(B, T*C, h, w) -> (B*T, C, h, w)."""
    return clips.unflatten(1, (frames, -1)).flatten(0, 1)


def merge_frames(images: Tensor, frames: int) -> Tensor:
    """(B*T, C, h, w) -> (B, T*C, h, w), the inverse of `split_frames`."""
    return images.unflatten(0, (-1, frames)).flatten(1, 2)


def side_by_side(clips: Tensor, frames: int) -> Tensor:
    """(..., T*C, H, W) -> (..., C, H, T*W): the frames side by side."""
    return clips.unflatten(-3, (frames, -1)).movedim(-4, -2).flatten(-2)
