"""Conditions from a batch: none, or its class label."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.interfaces import Batch, Cond, Conditioner


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
        """A class by number or name (also its last part, or any part that only one name has); None is "no class"."""
        if wanted is None:
            return {"label": self.num_classes}
        if wanted in names:
            return {"label": names.index(str(wanted))}
        text = str(wanted).lower()
        if text.isdecimal() and text not in names and int(text) < self.num_classes:
            return {"label": int(text)}
        exact = [i for i, name in enumerate(names) if text in (name.lower(), name.lower().split("/")[-1])]
        found = exact or [i for i, name in enumerate(names) if text in name.lower()]
        if len(exact) == 1 or len(found) == 1:
            return {"label": found[0]}
        listed = ", ".join(names[i] for i in found) if found else ", ".join(names) or f"0 to {self.num_classes - 1}"
        raise ValueError(f"class {wanted!r} is {'ambiguous' if found else 'unknown'}; allowed: {listed}")
