"""The one place that knows the range of pixels: uint8 at the borders, float in [-1, 1] inside."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 (...) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Inverse of `to_float`: rounded and clamped, never truncated."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
