"""Random numbers of training samples: each sample's depend on its own seed alone, not on its batch, its rank or its worker."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, lie evenly in [0, 1), however many follow one another


class Draws:
    """Independent streams, one per sample of a batch of B (Philox, counter-based: Salmon et al. 2011).

    seeds: one per sample; places: the samples' places in the training, for `spread`.  Numbers are made on the CPU, in the order in which
    they are asked for.
    """

    def __init__(self, seeds: Sequence[int], places: Sequence[int] | None = None) -> None:
        self.seeds, self.places = list(seeds), list(range(len(seeds)) if places is None else places)
        self.streams = [np.random.Generator(np.random.Philox(key=seed % 2**128)) for seed in self.seeds]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape (B, ...), type and device of a tensor."""
        shape = tuple(like.shape[1:])
        found = np.stack([stream.standard_normal(shape, np.float32) for stream in self.streams])
        return torch.from_numpy(found).to(like)

    def uniform(self) -> Tensor:
        """(B,) in [0, 1), float64, on the CPU."""
        return torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64)

    def spread(self) -> Tensor:
        """(B,) in [0, 1), float64: uniform, and evenly spread over the samples that follow one another."""
        return torch.tensor([place * GOLDEN % 1 for place in self.places], dtype=torch.float64)
