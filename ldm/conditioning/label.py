"""Conditions from a batch: none, or its class label."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.interfaces import Batch, ClassInput, Cond, Conditioner, required


class Unconditional(Conditioner):
    """No condition at all."""

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return Cond()

    def null(self, batch: Batch) -> Cond:
        return Cond()


class ClassLabel(Conditioner):
    """A learned vector (dim) per class and one for "no class"; batch["label"] (B,) int64, -1 where an image has none."""

    def __init__(self, num_classes: int | None = None, dim: int = 128) -> None:
        super().__init__()
        num_classes = required(num_classes, "ClassLabel's num_classes")
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; a class-conditional model needs at least 1")
        self.inputs, self.vector_dim = {"class": ClassInput(num_classes)}, dim
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return Cond(vector=self.embedding(torch.where(batch["label"] < 0, self.num_classes, batch["label"])))

    def null(self, batch: Batch) -> Cond:
        return Cond(vector=self.embedding(torch.full_like(batch["label"], self.num_classes)))
