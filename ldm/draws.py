"""Random numbers of training samples: each sample's depend on its own seed alone, not on its batch, its rank or its worker."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait

import numpy as np
import torch
from torch import Tensor

from ldm.devices import send

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, lie evenly in [0, 1), however many follow one another
Shape = tuple[int, ...] | None  # of a sample's normal numbers; None: one uniform number


class Draws:
    """Independent streams, one per sample of a batch of B (Philox, counter-based: Salmon et al. 2011).

    seeds: one per sample; places: the samples' places in the training, for `spread`.  Numbers are made on the CPU, in the order in which
    they are asked for; `begin` has them made beforehand.
    """

    def __init__(self, seeds: Sequence[int], places: Sequence[int] | None = None) -> None:
        self.seeds, self.places = list(seeds), list(range(len(seeds)) if places is None else places)
        self.asked = list[Shape]()  # what was asked for up to now
        self._streams = self._begun()
        self._planned, self._made = list[Shape](), list[Future[Tensor]]()

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape (B, ...), type and device of a tensor."""
        return send(self._next(tuple(like.shape[1:])).to(like.dtype), like.device)

    def uniform(self) -> Tensor:
        """(B,) in [0, 1), float64, on the CPU."""
        return self._next(None)

    def spread(self) -> Tensor:
        """(B,) in [0, 1), float64: uniform, and evenly spread over the samples that follow one another."""
        return torch.tensor([place * GOLDEN % 1 for place in self.places], dtype=torch.float64)

    def begin(self, shapes: Sequence[Shape], executor: Executor) -> None:
        """Make what will be asked for, in another thread and for a GPU: numbers of these shapes, in this order.  Whoever then asks for
        something else gets what he would have got."""
        self._planned = list(shapes)
        self._made = [executor.submit(self._ahead, shape) for shape in shapes]

    def _begun(self) -> list[np.random.Generator]:
        return [np.random.Generator(np.random.Philox(key=seed % 2**128)) for seed in self.seeds]

    def _ahead(self, shape: Shape) -> Tensor:
        made = self._draw(shape)
        return made if shape is None else made.pin_memory()

    def _draw(self, shape: Shape) -> Tensor:
        if shape is None:
            return torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64)
        return torch.from_numpy(np.stack([stream.standard_normal(shape, np.float32) for stream in self._streams]))

    def _next(self, shape: Shape) -> Tensor:
        self.asked.append(shape)
        count = len(self.asked)
        if self._planned[:count] == self.asked:
            return self._made[count - 1].result()
        if self._planned:  # something else, or more: the streams go on from what was really asked for
            wait([future for future in self._made if not future.cancel()])
            self._planned, self._streams = [], self._begun()
            for earlier in self.asked[:-1]:
                self._draw(earlier)
        return self._draw(shape)
