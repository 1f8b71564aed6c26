"""Training with any DataLoader of torch, in the place of a data module of ldm."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interfaces import Batch, TrainingData


class PlainData(TrainingData):
    """A loader of images (B,C,H,W), of (images, labels), or of dictionaries with `image`, and if known `label`, `text`, `numbers`.

    Images are uint8, or floats in 0..1.  Class names are the dataset's `classes`, as torchvision's have them, or numbers.
    """

    cache = None

    def __init__(self, loader: Any, num_classes: int = 0) -> None:
        self.loader = loader
        first = as_batch(next(iter(loader)))
        images: Tensor = first["image"]
        self.channels, self.size, self.with_images = images.shape[1], images.shape[3], True
        names = getattr(getattr(loader, "dataset", None), "classes", None)
        self.classes = [str(name) for name in names] if names else [str(i) for i in range(num_classes if "label" in first else 0)]
        self.has_texts = "text" in first and any(first["text"])
        values = [(name, value) for known in first.get("numbers", []) for name, value in known.items()]
        self.ranges = {
            name: (min(v for n, v in values if n == name), max(v for n, v in values if n == name)) for name in sorted(dict(values))
        }

    def cache_latents(self, moments: Callable[[Tensor], Tensor], key: str, device: torch.device) -> None:
        """A plain loader has no cache: each batch is encoded anew."""

    def rank_batches(self) -> Iterator[Batch]:
        return (as_batch(batch) for batch in self.loader)


def as_batch(found: Any) -> Batch:
    """What a loader gives, as a batch of ldm; a UserError where it is no images."""
    if isinstance(found, Mapping):
        if "id" in found or "moments" in found:  # a batch of ours
            return dict(found)
        batch = dict(found)
    elif isinstance(found, Sequence) and not isinstance(found, str) and found:
        batch = {"image": found[0], **({"label": found[1]} if len(found) > 1 else {})}
    else:
        batch = {"image": found}
    image = batch.get("image")
    if not isinstance(image, Tensor) or image.ndim != 4:
        what = f"a tensor of shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise UserError(
            f"the loader gives {what} for images; allowed are tensors (B,C,H,W), (images, labels), or dictionaries with `image`"
        )
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:
            raise UserError(f"the loader's images have values from {low:g} to {high:g}; floats are in 0..1: scale them, or give uint8")
        batch["image"] = image * 255 / 127.5 - 1  # as of the same pictures in uint8
    elif image.dtype != torch.uint8:
        raise UserError(f"the loader's images are {image.dtype}; allowed are uint8 and floats in 0..1")
    count = len(image)
    return {"id": [str(i) for i in range(count)], "text": [""] * count, **batch}
