"""Guidance: how a conditional and an unconditional prediction become the D that a sampler sees."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.interfaces import Cond, Denoise, Guidance


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance, null + scale * (cond - null) (arXiv:2207.12598): 1 is the conditional model, 0 the null one."""

    scale: float = 1.0

    def guide(self, predict: Callable[[Tensor, Tensor, Cond], Tensor], cond: Cond, null: Cond) -> Denoise:
        if self.scale in (0, 1):
            only = cond if self.scale == 1 else null
            return lambda x, sigma: predict(x, sigma, only)
        both = cond.stack(null)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            conditional, unconditional = predict(torch.cat([x, x]), sigma, both).chunk(2)
            return torch.lerp(unconditional, conditional, self.scale)

        return denoise
