"""What every part builds on: how it is rebuilt from a name, what a network is told, what a sampler sees.

Shapes: B batch, C latent channels, h = H / factor, w = W / factor.  Images are float in [-1, 1].
Diffusion runs in x = z0 + sigma * eps, sigma being the noise level relative to the (normalised) data.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # x (B,C,h,w), sigma () or (B,) -> E[z0 | x] (B,C,h,w)
Noise = Callable[[], Tensor]  # -> standard normal (B,C,h,w), one new draw per call
# One batch of a data module, by name: image uint8 (B,3,H,W), 3 or the images' channels, or moments (B,M,h,w); map uint8 (B,3,H,W);
# features by name (B,D) where the cache has them; conditioning_image ConditioningImage; label (B,), -1 where unknown;
# id, text list[str]; numbers list[dict[str, float]];
# draw, place list[int]: what is random about each sample depends on these alone (Draws), in a training step in `draws`
Batch = dict[str, Any]


class Buildable:
    """A part that remembers its constructor's arguments, so that a model folder can name and rebuild it."""

    init_args: dict[str, Any] = {}  # noqa: RUF012  replaced per instance

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            init, signature = cls.__init__, inspect.signature(cls.__init__)

            @wraps(init)
            def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                if "init_args" not in vars(self):  # the outermost class is the one that can be called again
                    object.__setattr__(self, "init_args", dict(list(bound.arguments.items())[1:]))
                init(self, *args, **kwargs)

            cls.__init__ = recording_init  # type: ignore[method-assign]


@dataclass(frozen=True)
class Cond:
    """What the network is told besides x and t; absent parts are None."""

    vector: Tensor | None = None  # (B, D) added to the time embedding
    tokens: Tensor | None = None  # (B, L, D) attended to
    mask: Tensor | None = None  # (B, L) bool, True where a token counts
    concat: Tensor | None = None  # (B, K, h, w), or (B, K, 1, 1) for the same everywhere, appended to x's channels

    def _zip(self, other: "Cond", join: Callable[[Tensor, Tensor], Tensor]) -> "Cond":
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return replace(self, **{name: None if a is None else join(a, b) for name, (a, b) in pairs.items()})

    def where(self, keep: Tensor, other: "Cond") -> "Cond":
        """Sample b of self where keep[b] (B, bool), of other elsewhere."""
        return self._zip(other, lambda a, b: torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, b))

    def stack(self, other: "Cond") -> "Cond":
        """Both batches one after the other: 2B samples."""
        return self._zip(other, lambda a, b: torch.cat([a, b.expand(len(b), *a.shape[1:])]))

    def is_same(self, other: "Cond") -> bool:
        """True where both are one and the same, or say nothing; what their tensors hold is not asked of a GPU."""
        return all(getattr(self, name) is getattr(other, name) for name in self.__dataclass_fields__)

    def __getitem__(self, samples: slice) -> "Cond":
        return self._zip(self, lambda a, _: a[samples])

    def expand(self, count: int) -> "Cond":
        """One sample's, so many times, without copies."""
        return self._zip(self, lambda a, _: a.expand(count, *a.shape[1:]))

    def repeat(self, times: int) -> "Cond":
        """Each sample so many times, one after the other."""
        return self._zip(self, lambda a, _: a.repeat_interleave(times, dim=0))
