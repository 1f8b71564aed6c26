"""Numeric attributes as a condition: age, dose, angle, brightness, ..."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.devices import send
from ldm.errors import UserError
from ldm.interfaces import AUGMENTED, Batch, Cond, Conditioner, NumberInput, required
from ldm.nn.attention import timestep_embedding


class Numbers(Conditioner):
    """Each attribute as a vector of `dim` sines and cosines of its place in its range, or zeros where an image has none; the null is zeros.

    ranges: the attributes' names, in batch["numbers"], and their least and greatest values; others within reason work, too.
    None: those of the training images.
    """

    _device: Tensor  # () that moves with the module

    def __init__(self, ranges: Mapping[str, Sequence[float]] | None = None, dim: int = 64) -> None:
        super().__init__()
        ranges = required(ranges, "Numbers' ranges")
        for name, bounds in ranges.items():
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise UserError(f"the range of {name} is {list(bounds)}; give its least and its greatest value")
        self.ranges, self.dim = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}, dim
        self.inputs = {name: NumberInput(*bounds) for name, bounds in self.ranges.items()}
        self.vector_dim = dim * len(ranges)
        self.register_buffer("_device", torch.zeros(0), persistent=False)

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return self._told([[self._value(known, name) for name in self.ranges] for known in batch["numbers"]])

    def null(self, batch: Batch) -> Cond:
        """What was done to a training image is told even so: else the pictures without condition would show it."""
        nothing = math.nan
        return self._told(
            [[self._value(known, n) if n.startswith(AUGMENTED) else nothing for n in self.ranges] for known in batch["numbers"]]
        )

    @staticmethod
    def _value(known: Mapping[str, float], name: str) -> float:
        return float(known.get(name, 0.0 if name.startswith(AUGMENTED) else math.nan))

    def _told(self, rows: list[list[float]]) -> Cond:
        low, high = torch.tensor(list(self.ranges.values())).T
        places = send((torch.tensor(rows) - low) / (high - low), self._device.device)
        told = torch.stack([timestep_embedding(1000 * place.nan_to_num(), self.dim) for place in places.T], dim=1)
        return Cond(vector=(told * ~places.isnan()[:, :, None]).flatten(1))
