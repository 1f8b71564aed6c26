"""Conditions: what a model may be told, as typed values with names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ldm.interfaces.core import Batch, Buildable, Cond

# What one picture is asked to show, by the names of a conditioner's inputs: {"class": "cat", "text": "a red collar", "age": 30.0}.
# What is not named is not told: the model's null takes its place.
Condition = Mapping[str, str | float]
AUGMENTED = "augmented by "  # begins the names of numbers that say what was done to a training image; 0 where none is given


@dataclass(frozen=True)
class ClassInput:
    """One of `num_classes` classes, by name or number; in a batch `label` (B,) int64, -1 for none."""

    num_classes: int


@dataclass(frozen=True)
class TextInput:
    """Any text; in a batch `text`, a list of B strings, "" for none."""


@dataclass(frozen=True)
class NumberInput:
    """A number, usually from low to high; in a batch `numbers`, a list of B dictionaries by name."""

    low: float
    high: float


@dataclass(frozen=True)
class ImageInput:
    """An image `downscale` times smaller than the picture, with a mask where takes_mask; in a batch `conditioning_image`."""

    downscale: int = 1
    takes_mask: bool = False


Input = ClassInput | TextInput | NumberInput | ImageInput


class ConditioningImage(NamedTuple):
    """Images that a model is shown as a condition."""

    x: Tensor  # (B,3,H/s,W/s) in [-1,1], s (ImageInput.downscale) times smaller than the picture
    mask: Tensor | None = None  # (B,1,H,W), 1 where the picture is to be made anew


class Corruption(Buildable, ABC):
    """What is done to training images so that a model learns to undo it, with random numbers of torch's generator."""

    downscale: int = 1  # how many times smaller the images get
    takes_mask: bool = False  # whether parts of them are hidden

    @abstractmethod
    def degrade(self, x: Tensor) -> ConditioningImage:
        """What is left of images x (B,3,H,W) in [-1,1]."""


class Conditioner(Buildable, nn.Module, ABC):
    """Typed values -> Cond.  `null` is what the network sees when the condition is dropped."""

    inputs: Mapping[str, Input] = {}
    vector_dim: int = 0  # D of the vectors it makes; 0: it makes none
    token_dim: int = 0  # D of the tokens it makes; 0: it makes none
    concat_channels: int = 0  # K of the maps it makes; 0: it makes none

    @property
    def num_classes(self) -> int:
        """Number of class labels that it knows; 0: it takes none."""
        return next((one.num_classes for one in self.inputs.values() if isinstance(one, ClassInput)), 0)

    @property
    def takes_text(self) -> bool:
        """True where it takes a text."""
        return any(isinstance(one, TextInput) for one in self.inputs.values())

    @property
    def numbers(self) -> list[str]:
        """Names of the numeric attributes that it takes."""
        return [name for name, one in self.inputs.items() if isinstance(one, NumberInput)]

    @property
    def image(self) -> ImageInput | None:
        """The image that it takes, if any."""
        return next((one for one in self.inputs.values() if isinstance(one, ImageInput)), None)

    def prepare(self, batch: Batch, seeds: Sequence[int]) -> Batch:
        """Entries of a training batch that `encode` then takes, made on the CPU by the processes that read images: what is left of these,
        the states of texts.  What is random about a sample depends on its seed."""
        return {}

    def cache_in(self, folder: str) -> None:
        """Keep in this folder, from now on, what is costly and needed again and again, such as the states of texts."""

    def remember(self, texts: Sequence[str]) -> None:
        """Encode these texts now, where the conditioner takes texts and has a folder to keep them in."""

    @abstractmethod
    def encode(self, batch: Batch, to_latents: Callable[[Tensor], Tensor]) -> Cond:
        """The condition of a batch that has its inputs; to_latents: images (B,3,H,W) -> latents (B,C,h,w)."""

    @abstractmethod
    def null(self, batch: Batch) -> Cond:
        """No condition, for as many samples as the batch has."""
