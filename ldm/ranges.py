"""The one place that knows the range of pixels: uint8 at the borders, float in [-1, 1] inside."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError


def to_float(images: Tensor) -> Tensor:
    """uint8 or uint16 (...), or floats that are in [-1, 1] already -> float32 in [-1, 1]."""
    if images.is_floating_point():
        return images.float()
    return images.float() / (32767.5 if images.dtype == torch.uint16 else 127.5) - 1


def to_uint8(images: Tensor) -> Tensor:
    """Inverse of `to_float`: rounded and clamped, never truncated."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class ValueRange:
    """What the values of a data set are: `low` is black (-1), `high` white (+1), in the data's own units.

    is_array: the data are arrays, not pictures; depth: as many slices of each channel are channels of an image.
    """

    low: float = 0.0
    high: float = 255.0
    dtype: str = "uint8"
    is_array: bool = False
    depth: int = 1

    @property
    def is_default(self) -> bool:
        """Whether they are those of pictures of 8 bits."""
        return self == ValueRange()

    @property
    def is_deep(self) -> bool:
        """Whether they are of pictures of more than 8 bits."""
        return not self.is_default and not self.is_array

    @property
    def keeps_units(self) -> bool:
        """Whether a PNG of 16 bits can hold them in their own units; else black is 0 and white 65535 in it."""
        return self.dtype.startswith("uint") and self.low >= 0 and self.high <= 65535

    def to_values(self, x: Tensor) -> np.ndarray:
        """float (C,...) in [-1, 1] -> values in the data's own units and type; of volumes (C, depth, ...)."""
        values = self.low + (x.double().cpu().numpy() + 1) / 2 * (self.high - self.low)
        if self.depth > 1:
            values = values.reshape(-1, self.depth, *values.shape[1:])
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return values.astype(kind)
        limits = np.iinfo(kind)
        return np.clip(np.round(values), limits.min, limits.max).astype(kind)

    def to_pixels(self, x: Tensor) -> Tensor:
        """float (...) in [-1, 1] -> the pixels of a picture: uint16 where `is_deep`, else uint8."""
        if not self.is_deep:
            return to_uint8(x)
        shares = (x.double() + 1) / 2
        low, high = (self.low, self.high) if self.keeps_units else (0.0, 65535.0)
        return (low + shares.clamp(0, 1) * (high - low)).round().to(torch.uint16)

    def to_shown(self, pixels: Tensor) -> Tensor:
        """Pixels of a picture -> uint8, from black to white."""
        if pixels.dtype != torch.uint16:
            return pixels
        low, high = (self.low, self.high) if self.keeps_units else (0.0, 65535.0)
        return ((pixels.double() - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)

    def as_card(self) -> dict[str, Any] | None:
        """Plain values for a model's card; None for those of 8 bits."""
        return None if self.is_default else asdict(self)

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> "ValueRange":
        """Those of a card, or of a picture's settings.  UserError where they make no sense."""
        found = card.get("values")
        try:
            values = cls(**found) if isinstance(found, Mapping) else cls()
            if not float(values.low) < float(values.high) or np.dtype(values.dtype).kind not in "uif" or values.depth < 1:
                raise ValueError
        except (TypeError, ValueError) as error:
            raise UserError(f"the range of values is {found!r}; it needs low < high, and a type of numbers") from error
        return values

    @property
    def bits(self) -> int:
        """8, 16 or 32, by the type of the values."""
        return 8 * np.dtype(self.dtype).itemsize
