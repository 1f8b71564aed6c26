"""What stage 2 asks of a data module."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ldm.interfaces.core import Batch
from ldm.ranges import ValueRange


class TrainingData(ABC):
    """What stage 2 asks of a data module besides its loaders; data.ImageData is one."""

    classes: list[str]
    has_texts: bool  # whether any image has one
    texts: Sequence[str] = ()  # all of them
    ranges: Mapping[str, tuple[float, float]]  # the numeric attributes of any image, and their least and greatest values
    size: int
    channels: int  # of the images; of clips: of all frames
    frames: int = 1  # of clips
    window: tuple[float, float] | None = None  # values of images with more than 8 bits that are black and white
    values: ValueRange = ValueRange()  # what black and white are in the units of the data
    buckets: Sequence[tuple[int, int]] = ()  # heights and widths of the images, where they have several
    cache: str | None = None  # folder for latents, and for what conditioners keep
    resumed: int | None = None  # images of the epoch that the checkpoint from which training goes on has seen, if the batch was another
    with_images: bool = False  # whether batches have the images even where they have cached moments
    prepare: Callable[[Batch], Batch] | None = None  # further entries of a batch, made by the processes that read images
    begin: Callable[[Batch], None] | None = None  # told of each training batch one batch before it is used

    def use_buckets(self, multiple: int) -> None:  # noqa: B027  most data have one size
        """Where images keep their shapes: give them sizes in multiples of so many px, which the networks need."""

    @abstractmethod
    def cache_latents(self, moments: Callable[[Tensor], Tensor], key: str, device: torch.device) -> None:
        """Where a cache is configured: write moments(x) of every training image and its mirror image once, all ranks
        together (key: of what makes them), and load from it from now on."""

    def some(self, count: int) -> Batch:
        """A batch of about so many training images of one size."""
        return next(iter(self.rank_batches()))

    @abstractmethod
    def rank_batches(self) -> Iterator[Batch]:
        """This rank's share of the training images, each once, in order."""
