"""Conditions from a batch: none, or its class label."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.interfaces import Batch, Cond, Conditioner
from ldm.labels import label_of


class Unconditional(Conditioner):
    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return Cond()

    def null(self, batch: Batch) -> Cond:
        return Cond()


class ClassLabel(Conditioner):
    """A learned vector (dim) per class and one for "no class"; batch["label"] (B,) int64, -1 where an image has none."""

    def __init__(self, num_classes: int, dim: int = 128) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a class-conditional model needs at least 1")
        self.num_classes, self.vector_dim = num_classes, dim
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return Cond(vector=self.embedding(torch.where(batch["label"] < 0, self.num_classes, batch["label"])))

    def null(self, batch: Batch) -> Cond:
        return Cond(vector=self.embedding(torch.full_like(batch["label"], self.num_classes)))

    def request(self, wanted: str | int | None, names: list[str]) -> Batch:
        """As `label_of`; None is "no class"."""
        return {"label": self.num_classes if wanted is None else label_of(wanted, names, self.num_classes)}
