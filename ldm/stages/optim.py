"""The optimizer both stages share."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ldm.errors import UserError


@dataclass(frozen=True)
class AdamW:
    """Fused AdamW; lr is absolute (never scaled by devices or batch), warmup and decay count optimizer steps.

    decay "cosine" falls to 0 at trainer.max_steps; a resumed run needs the same max_steps.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise UserError(f"the optimizer's lr is {self.lr:g}; allowed is 0 or more, usual are 1e-5 to 1e-3")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"the optimizer's betas are {list(self.betas)}; allowed is 0 to less than 1 for both")
        if not 0 <= self.weight_decay < math.inf or self.warmup < 0:
            given = f"weight_decay is {self.weight_decay:g}, its warmup {self.warmup}"
            raise UserError(f"the optimizer's {given}; both must be 0 or more")

    def factor(self, step: int, max_steps: int) -> float:
        """What lr is multiplied by at a step from 0 to max_steps."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        progress = min(1.0, step / max(max_steps, 1)) if self.decay == "cosine" else 0.0
        return warm * 0.5 * (1 + math.cos(math.pi * progress))


class Part(NamedTuple):
    """Parameters with settings of their own, trained from a step on."""

    parameters: Sequence[nn.Parameter]
    settings: AdamW
    start: int = 0

    def factor(self, step: int, max_steps: int) -> float:
        return self.settings.factor(max(0, step - self.start), max_steps - self.start)


def configure(parts: Iterable[Part], max_steps: int) -> dict[str, Any]:
    """One optimizer with a parameter group per part, as LightningModule.configure_optimizers returns it."""
    parts = list(parts)
    if max_steps < 1 and any(part.settings.decay == "cosine" for part in parts):
        raise UserError("decay 'cosine' needs trainer.max_steps: set it, or use decay 'constant'")
    if not parts[0].parameters:
        raise UserError("nothing is left to train: freeze less")
    groups = [
        {"params": p.parameters, "lr": p.settings.lr, "betas": p.settings.betas, "weight_decay": p.settings.weight_decay} for p in parts
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    factors: list[Callable[[int], float]] = [partial(part.factor, max_steps=max_steps) for part in parts]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
