"""Several conditions at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.interfaces import Batch, ClassInput, Cond, Conditioner, Factory, ImageInput, TextInput, built


class CompositeConditioner(Conditioner):
    """Vectors and channels one beside the other, tokens one after the other; a sample loses all of its conditions or none.

    Its inputs are those of all parts: at most one part each takes a class, a text, an image.
    """

    def __init__(self, parts: Sequence[Factory[Conditioner] | Conditioner]) -> None:
        super().__init__()
        made: list[Conditioner] = [built(part) for part in parts]
        self.init_args = {"parts": made}  # a model folder describes parts, not factories
        for kind, what in ((ClassInput, "classes"), (TextInput, "texts"), (ImageInput, "images")):
            if (count := sum(isinstance(one, kind) for part in made for one in part.inputs.values())) > 1:
                raise UserError(f"CompositeConditioner has {count} parts for {what}; allowed is one")
        self.parts = nn.ModuleList(made)
        self.inputs = {name: one for part in made for name, one in part.inputs.items()}
        self.vector_dim, self.concat_channels = sum(p.vector_dim for p in made), sum(p.concat_channels for p in made)
        self.token_dim = max(p.token_dim for p in made)

    def prepare(self, batch: Batch, seeds: Sequence[int]) -> Batch:
        return {name: value for part in self.parts for name, value in part.prepare(batch, seeds).items()}  # type: ignore[operator]

    def cache_in(self, folder: str) -> None:
        for part in self.parts:
            part.cache_in(folder)  # type: ignore[operator]

    def remember(self, texts: Sequence[str]) -> None:
        for part in self.parts:
            part.remember(texts)  # type: ignore[operator]

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return _joined([part.encode(batch, to_latents) for part in self.parts])  # type: ignore[operator]

    def null(self, batch: Batch) -> Cond:
        return _joined([part.null(batch) for part in self.parts])  # type: ignore[operator]


def _joined(conds: list[Cond]) -> Cond:
    def joined(found: list[Tensor | None]) -> Tensor | None:
        present = [part for part in found if part is not None]
        return torch.cat(present, dim=1) if present else None

    masks = [
        torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device) if c.mask is None and c.tokens is not None else c.mask
        for c in conds
    ]
    return Cond(joined([c.vector for c in conds]), joined([c.tokens for c in conds]), joined(masks), joined([c.concat for c in conds]))
