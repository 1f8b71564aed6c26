"""Several conditions at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.interfaces import Batch, Cond, Conditioner, Seen


class Together(Conditioner):
    """Vectors and channels one beside the other, tokens one after the other; a sample loses all of its conditions or none.

    What a user asks for in words goes to the part that takes words, classes or numbers, an image to the part that takes images.  Several
    parts for words are asked for in their order: 'cat | a red collar'; '' is no condition.
    """

    def __init__(self, parts: Sequence[Conditioner]) -> None:
        super().__init__()
        for what, takes in (
            ("classes", [bool(p.num_classes) for p in parts]),
            ("texts", [p.takes_text for p in parts]),
            ("images", [bool(p.shrinks) for p in parts]),
        ):
            if sum(takes) > 1:
                raise ValueError(f"Together has {sum(takes)} parts for {what}; allowed is one")
        self.parts = nn.ModuleList(parts)
        self.num_classes, self.takes_text = max(p.num_classes for p in parts), any(p.takes_text for p in parts)
        self.numbers = [name for p in parts for name in p.numbers]
        self.shrinks, self.masks = max(p.shrinks for p in parts), any(p.masks for p in parts)
        self.vector_dim, self.concat_channels = sum(p.vector_dim for p in parts), sum(p.concat_channels for p in parts)
        self.token_dim = max(p.token_dim for p in parts)

    def asked(self) -> list[Conditioner]:
        return [one for part in self.parts for one in part.asked()]  # type: ignore[operator]

    def see(self, batch: Batch) -> Seen | None:
        return next((seen for part in self.parts if (seen := part.see(batch)) is not None), None)  # type: ignore[operator]

    def cache_in(self, folder: str) -> None:
        for part in self.parts:
            part.cache_in(folder)  # type: ignore[operator]

    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        return _joined([part.encode(batch, to_latents) for part in self.parts])  # type: ignore[operator]

    def null(self, batch: Batch) -> Cond:
        return _joined([part.null(batch) for part in self.parts])  # type: ignore[operator]

    def request(self, wanted: str | int | None, names: list[str]) -> Batch:
        asked = self.asked()
        if len(asked) < 2:
            return asked[0].request(wanted, names) if asked else super().request(wanted, names)
        pieces = [""] * len(asked) if wanted is None else [piece.strip() for piece in str(wanted).split("|")]
        if len(pieces) != len(asked):
            raise ValueError(f"this model takes {len(asked)} conditions, {wanted!r} has {len(pieces)}: divide them by '|', '' is none")
        return {key: value for part, piece in zip(asked, pieces, strict=True) for key, value in part.request(piece or None, names).items()}


def _joined(conds: list[Cond]) -> Cond:
    def joined(found: list[Tensor | None]) -> Tensor | None:
        present = [part for part in found if part is not None]
        return torch.cat(present, dim=1) if present else None

    masks = [
        torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device) if c.mask is None and c.tokens is not None else c.mask
        for c in conds
    ]
    return Cond(joined([c.vector for c in conds]), joined([c.tokens for c in conds]), joined(masks), joined([c.concat for c in conds]))
