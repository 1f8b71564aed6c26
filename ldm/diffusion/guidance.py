"""Guidance: how a conditional and an unconditional prediction become the D that a sampler sees."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.devices import factor, send
from ldm.interfaces import Cond, Denoise, Guidance, Predict


@dataclass(frozen=True)
class Pairwise(Guidance):
    """Guidance that mixes both predictions, made in one call of twice the batch; where only one counts, only that one is made.

    scale: 1 is the conditional model, 0 the null one.  Outside the noise levels from low to high there is no guidance
    (arXiv:2404.07724).  rescale: share by which the result's deviation per image is drawn back to the conditional one's (section 3.4,
    arXiv:2305.08891).  weaker: model folder or checkpoint whose conditional prediction takes the null's place (autoguidance,
    arXiv:2406.02507): a smaller model of the same latents, or an early checkpoint.
    """

    scale: float = 1.0
    weaker: str | None = None
    low: float = 0.0
    high: float = float("inf")
    rescale: float = 0.0

    @property
    def companion(self) -> str | None:
        return self.weaker

    @abstractmethod
    def start(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(conditional, null) -> guided, each (B,C,h,w); made anew for every batch, as it may remember the steps before."""

    def guide(self, predict: Predict, cond: Cond, null: Cond, companion: Denoise | None = None) -> Denoise:
        if companion is None and cond.is_same(null):  # without a condition there is nothing to guide to: half the calls
            return lambda x, sigma: predict(x, sigma, cond)
        both, mix = cond.stack(null), self.start()

        def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            if companion is not None:
                return predict(x, sigma, cond), companion(x, sigma)
            conditional, unconditional = predict(torch.cat([x, x]), sigma.repeat(2) if sigma.ndim else sigma, both).chunk(2)
            return conditional, unconditional

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            inside = (sigma >= self.low) & (sigma <= self.high)
            known = sigma.ndim == 0 and sigma.device.type == "cpu"  # of others, it would take a wait for the GPU to know
            everywhere = (self.low <= 0 and self.high == float("inf")) or (known and bool(inside))
            if self.scale == 1 or (known and not inside):
                return predict(x, sigma, cond)
            if self.scale == 0 and everywhere:
                return predict(x, sigma, null) if companion is None else companion(x, sigma)
            conditional, unconditional = pair(x, sigma)
            guided = mix(conditional, unconditional)
            if self.rescale:
                ratio = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
                guided = guided * torch.lerp(torch.ones_like(ratio), ratio, self.rescale)
            return guided if everywhere else torch.where(send(inside, x.device).view(-1, 1, 1, 1), guided, conditional)

        return denoise


@dataclass(frozen=True)
class CFG(Pairwise):
    """Classifier-free guidance, null + scale * (cond - null) (arXiv:2207.12598)."""

    def start(self) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda conditional, null: torch.lerp(null, conditional, self.scale)


@dataclass(frozen=True)
class APG(Pairwise):
    """Adaptive projected guidance (Algorithm 1, arXiv:2410.02416): of cond - null the part along the prediction counts `parallel`;
    its length is at most `radius` (0: any), and it has (negative) momentum."""

    parallel: float = 0.0
    radius: float = 0.0
    momentum: float = -0.5

    def start(self) -> Callable[[Tensor, Tensor], Tensor]:
        kept: list[Any] = [0.0]

        def mix(conditional: Tensor, null: Tensor) -> Tensor:
            kept[0] = difference = conditional - null + self.momentum * kept[0]
            if self.radius:
                difference = difference * (self.radius / difference.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1).view(-1, 1, 1, 1)
            along = (difference * conditional).sum((1, 2, 3), keepdim=True) / conditional.square().sum((1, 2, 3), keepdim=True).clamp(
                min=1e-12
            )
            projected = along * conditional
            return conditional + (self.scale - 1) * (difference - projected + self.parallel * projected)

        return mix


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """D + scale * sigma^2 * grad log p(class | x) of a classifier of noisy latents (Algorithm 1, arXiv:2105.05233).

    classifier: model folder or checkpoint, trained with configs/classifier/.  conditional: the model itself is told the class, too.
    """

    classifier: str
    scale: float = 1.0
    conditional: bool = True
    needs_labels: ClassVar[bool] = True

    @property
    def companion(self) -> str:
        return self.classifier

    def guide(self, predict: Predict, cond: Cond, null: Cond, companion: Denoise | None = None) -> Denoise:
        assert companion is not None
        shown = cond if self.conditional else null

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            z0 = predict(x, sigma, shown)
            return z0 + self.scale * factor(sigma, x) ** 2 * companion(x, sigma) if self.scale else z0

        return denoise
