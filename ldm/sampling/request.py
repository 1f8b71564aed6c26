"""What is to be sampled, as values: noise, conditions, images, and how."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ldm import model_folder
from ldm.diffusion.guidance import CFG
from ldm.diffusion.samplers import DPMSolverPP2M
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.interfaces import Condition, Guidance, Sampler, Task
from ldm.latents.model import LatentModel, load_companion
from ldm.latents.space import LatentSpace
from ldm.sampling.wrappers import slerp

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # in which a network is called

Draws = Callable[[], Tensor]  # -> standard normal (C,h,w), one new draw per call


@dataclass(frozen=True)
class SeedNoise:
    """All noise of one picture: a stream of standard normal numbers that only (seed, index) decide."""

    seed: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; allowed is 0 to 2^64 - 1")

    def draws(self, shape: Sequence[int]) -> Draws:
        """One draw of `shape` after the other."""
        # numpy joins the 32-bit words of a list without their lengths, so [seed, index] tells only small seeds apart; a spawn key is kept
        # apart from the seed.  Small seeds keep the pictures that they always had.
        small = self.seed < 2**32 and self.index < 2**32
        sequence = np.random.SeedSequence([self.seed, self.index] if small else self.seed, spawn_key=() if small else (self.index,))
        generator = np.random.default_rng(sequence)
        return lambda: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class Slerp:
    """Noise between that of a and b: spherical interpolation, weight 0 to 1 of b."""

    a: SeedNoise
    b: SeedNoise
    weight: float

    def draws(self, shape: Sequence[int]) -> Draws:
        """One draw of `shape` after the other."""
        one, other = self.a.draws(shape), self.b.draws(shape)
        return lambda: slerp(one(), other(), self.weight)


@dataclass(frozen=True)
class Mix:
    """A condition between a and b: D is interpolated, weight 0 to 1 of b."""

    a: Condition
    b: Condition
    weight: float


@dataclass(frozen=True)
class InputImage:
    """An image of the user, for a task or for a model that takes images."""

    pixels: Tensor  # (3,H,W) in [-1,1]
    mask: Tensor | None = None  # (1,H',W'), 1 where the picture is to be made anew; None: everywhere
    facts: Mapping[str, Any] = field(default_factory=dict)  # what a picture's settings say of it
    shows: Condition = field(default_factory=dict)  # what is to be seen in it, for tasks that find its noise
    second: Tensor | None = None  # (3,H,W) another image, to which the pictures go
    weight: float = 0.0  # 0 to 1, of the second image


@dataclass(frozen=True)
class SampleRequest:
    """One picture: everything random in it comes from its noise."""

    index: int
    noise: SeedNoise | Slerp
    condition: Condition | Mix = field(default_factory=dict)
    negative: Condition | None = None  # what guidance leads away from; None: from no condition
    image: InputImage | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are sampled.

    steps: how many, or which (as NoiseSchedule.steps).  size: height and width in px of pictures without an image, if not the
    training's.  windows: pictures larger than the training's are made of overlapping windows, not in one piece.
    """

    sampler: Sampler = field(default_factory=DPMSolverPP2M)
    guidance: Guidance = field(default_factory=CFG)
    steps: int | list[float] = 25
    spacing: Spacing = "trailing"
    task: Task | None = None
    size: tuple[int, int] | None = None
    windows: bool = True
    companion: LatentModel | None = field(default=None, compare=False, repr=False)  # what `guidance` names, see `resolved`

    @property
    def num_steps(self) -> int:
        """How many steps the sampler does."""
        return self.steps if isinstance(self.steps, int) else len(self.steps)

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Self:
        """The sampling configuration that a model's card has."""
        stored = model_folder.build(card.get("sampling") or card["recipe"])
        return cls(**{name: value for name, value in stored.items() if name != "windows"})

    def resolved(self, latents: LatentSpace) -> Self:
        """The same with its guidance's companion loaded, which must work in these latents."""
        if self.guidance.companion is None:
            return replace(self, companion=None)
        return replace(self, companion=load_companion(self.guidance.companion, latents))

    def described(self) -> dict[str, Any]:
        """Plain data from which it can be built again."""
        found: dict[str, Any] = model_folder.describe({key: value for key, value in vars(self).items() if key != "companion"})
        return found
