"""Batches of the images of a split; latents instead of pixels where there is a cache."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.augment import Augment
from ldm.data.cache import LatentCache
from ldm.data.images import Images
from ldm.data.order import Groups, Key
from ldm.errors import UserError
from ldm.interfaces import Batch

FEATURES = "features-"  # begins the names of a cache's arrays of features
TRIED = 100  # images in a row, of which one must be readable


class Keyed(Dataset):
    """The images of a split, batch by batch."""

    def __init__(self, images: Images, indices: Sequence[int] | np.ndarray, augment: Augment | None = None) -> None:
        self.images, self.indices, self.augment = images, np.asarray(indices, np.int64), augment
        self.cache: LatentCache | None = None
        self.with_images = False
        self.prepare: Callable[[Batch], Batch] | None = None  # further entries

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def names(self) -> list[str]:
        """The classes, in the order of their labels."""
        return self.images.names

    def groups(self) -> Groups:
        """How the images belong together; with a cache they need not."""
        if self.cache is not None and not self.with_images:
            return Groups()
        codes = self.images.bucket_of
        buckets = None if codes is None else codes[self.indices]
        if self.images.runs is None:
            return Groups(buckets=buckets)
        of, files = self.images.runs
        return Groups(of[self.indices], files, buckets)

    def read(self, position: int, draw: int = 0) -> tuple[Tensor, int, str | None]:
        """An image and its position; where it cannot be read, its first readable successor and what is wrong with the file."""
        damaged, shape = None, self.images.shape(int(self.indices[position]))
        for offset in range(min(len(self), TRIED)):
            used = (position + offset) % len(self)
            index = int(self.indices[used])
            if self.images.shape(index) != shape:
                continue
            try:
                return self.images.pixels(index, draw), used, damaged
            except (OSError, ValueError) as error:  # a UserError of ours is a ValueError
                damaged = damaged or f"{self.images.name(index)} ({error})"
        raise UserError(f"none of {offset + 1} images in a row can be read, the first is {damaged}: check the data")

    def __getitems__(self, keys: Sequence[tuple | int]) -> Batch:
        """Keys past the end, which keep the ranks of a validation in step, are no images; a batch of such only is empty."""
        wanted = [Key(key, place=key) if isinstance(key, int) else Key(*key) for key in keys]
        wanted = [key for key in wanted if key.position < len(self)]
        if not wanted:
            return {"id": []}
        batch: Batch = {"position": [key.position for key in wanted]}
        batch["draw"], batch["place"] = [key.draw for key in wanted], [key.place for key in wanted]
        if self.cache is not None:
            arrays, batch["position"] = self.cache[[int(key.mirrored) for key in wanted], batch["position"]]
            batch |= {name: array for name, array in arrays.items() if not name.startswith(FEATURES)}
            if features := {name.removeprefix(FEATURES): x for name, x in arrays.items() if name.startswith(FEATURES)}:
                batch["features"] = features
        told = self._images(batch, wanted) if self.cache is None or self.with_images else []
        records, indices = self.images.records, self.indices[batch["position"]].tolist()
        batch["id"] = [records.ids[index] for index in indices]
        batch["text"] = [records.text(index, key.draw) for index, key in zip(indices, wanted, strict=True)]
        if records.numbers or self.augment is not None:
            batch["numbers"] = [{**records.numbers_of(index), **(told[i] if told else {})} for i, index in enumerate(indices)]
        if self.names:
            batch["label"] = torch.from_numpy(records.labels[indices]).long()
        return batch if self.prepare is None else {**batch, **self.prepare(batch)}

    def _images(self, batch: Batch, wanted: Sequence[Key]) -> list[dict[str, float]]:
        """Put the images, and their maps, into the batch; returns what was done to each by augmentation."""
        images, used, damaged = map(list, zip(*(self.read(key.position, key.draw) for key in wanted), strict=True))
        has_maps = self.with_images and self.images.has_maps
        maps: list[Tensor | None] = [
            self.images.map(int(self.indices[position]), key.draw) if has_maps else None for position, key in zip(used, wanted, strict=True)
        ]
        told = list[dict[str, float]]()
        for i, key in enumerate(wanted):
            if key.mirrored:
                images[i], maps[i] = (None if x is None else _flipped(x) for x in (images[i], maps[i]))
            done = dict[str, float]()
            if self.augment is not None and key.draw:  # of training images, not of held-out ones
                images[i], maps[i], done = self.augment(images[i], maps[i], key.draw)
            told.append(done)
        batch["image"], batch["position"], batch["damaged"] = torch.stack(images), used, [name for name in damaged if name is not None]
        if has_maps:
            batch["map"] = torch.stack([x for x in maps if x is not None])
        return told


def _flipped(x: Tensor) -> Tensor:
    """The mirror image of (C,H,W)."""
    if x.dtype != torch.uint16:
        return x.flip(-1)
    return torch.from_numpy(x.numpy()[..., ::-1].copy())  # which torch 2.11 cannot flip
