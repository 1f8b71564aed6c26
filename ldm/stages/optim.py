"""The optimizer both stages share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


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

    def configure(self, parameters: Iterable[nn.Parameter], max_steps: int) -> dict[str, Any]:
        """What LightningModule.configure_optimizers returns."""
        if self.decay == "cosine" and max_steps < 1:
            raise ValueError("decay 'cosine' needs trainer.max_steps: set it, or use decay 'constant'")
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(self.warmup, 1))
            progress = min(1.0, step / max_steps) if self.decay == "cosine" else 0.0
            return warm * 0.5 * (1 + math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
