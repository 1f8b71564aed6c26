"""The data module: split, loaders, latent cache; one subclass per kind of data."""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from ldm.data.audio import WaveImages
from ldm.data.augment import Augment
from ldm.data.batches import FEATURES, Keyed
from ldm.data.cache import LatentCache, Place
from ldm.data.clips import ClipImages
from ldm.data.encoding import Encoding
from ldm.data.images import Crop, DigitImages, EmojiImages, Images, SourceImages
from ldm.data.order import HeldOutOrder, Order
from ldm.data.pixels import Resize
from ldm.data.report import sentences
from ldm.data.sources.arrays import Depth
from ldm.devices import readers
from ldm.errors import UserError, require_at_least
from ldm.interfaces import Batch, Features, TrainingData
from ldm.ranges import ValueRange, to_uint8


def _features(network: Features, images: Tensor) -> Tensor:
    """Of images in [-1, 1]."""
    return network(to_uint8(images))


def _as_is(batch: Any) -> Any:
    return batch


class Loader(DataLoader):
    """A DataLoader that tells `begin` of each batch one batch before it gives it."""

    begin: Callable[[Batch], None] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.begin is None:
            yield from super().__iter__()
            return
        held: Batch | None = None
        for batch in super().__iter__():
            self.begin(batch)
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held


class ImageData(L.LightningDataModule, TrainingData, ABC):
    """Images in batches of `image` uint8 (B,C,size,size) or cached `moments`, `id`, `text` and, if known, `label` (B,).

    val_fraction is held out, chosen by split_seed and the images' names, unless the layout has a split; mirror flips half of
    the training images; augment: transforms of torchvision.transforms.v2, each for augment_share of the images; cache: folder
    for latents (null: stage 2 encodes every batch anew), cache_on: where they are read from, `memory` and `device` hold all
    of them and need no num_workers; cache_features: frozen networks whose features are kept there, too; num_workers: processes
    that read images (null: none for a CPU, up to 8 for each GPU); max_damaged: unreadable images to skip before giving up.
    """

    def __init__(
        self,
        size: int,
        batch_size: int = 32,
        mirror: bool = True,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int | None = None,
        cache: str | None = None,
        max_damaged: int = 10,
        augment: Sequence[Transform] = (),
        augment_share: float = 1.0,
        cache_on: Place = "disk",
        cache_features: Sequence[Features] = (),
    ) -> None:
        super().__init__()
        if not 0 < augment_share <= 1:
            raise UserError(f"data.augment_share is {augment_share}; allowed is more than 0, at most 1")
        if size < 1 or batch_size < 1:
            raise UserError(f"data.size is {size} and data.batch_size {batch_size}; both must be at least 1")
        require_at_least(0, num_workers=num_workers or 0, max_damaged=max_damaged)
        self.size, self.batch_size, self.mirror, self.seed = size, batch_size, mirror, seed
        self.val_fraction, self.split_seed, self.num_workers = val_fraction, split_seed, num_workers
        self.cache, self.cache_on, self.max_damaged = cache, cache_on, max_damaged
        self.cache_features = list(cache_features)
        self.augment = Augment(augment, augment_share) if augment else None
        self.damaged: set[str] = set()
        self._sets: tuple[Keyed, Keyed] | None = None
        self._told = False
        self.resumed: int | None = None  # images of the epoch that a checkpoint has seen
        self.cache_action: Literal["fill", "check", "prune"] = "fill"  # what `ldm encode` does with the cache

    @property
    def varies(self) -> bool:
        """Whether images differ from epoch to epoch, or in size, so that their latents cannot be kept."""
        return self.augment is not None

    @abstractmethod
    def images(self) -> Images:
        """Open the source."""

    @property
    def sets(self) -> tuple[Keyed, Keyed]:
        """Training and held-out images."""
        if self._sets is None:
            images = self.images()
            train, held_out = images.split(self.val_fraction, self.split_seed)
            self._sets = Keyed(images, train, self.augment), Keyed(images, held_out, self.augment)
        return self._sets

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        return list(self.sets[0].names)

    @property
    def has_texts(self) -> bool:  # type: ignore[override]
        return self.sets[0].images.records.has_texts

    @property
    def texts(self) -> Sequence[str]:  # type: ignore[override]
        return self.sets[0].images.records.texts

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:  # type: ignore[override]
        """Of the training images."""
        train, found = self.sets[0], dict[str, tuple[float, float]]()
        for name, column in train.images.records.numbers.items():
            if not np.isnan(values := column[train.indices]).all():
                found[name] = float(np.nanmin(values)), float(np.nanmax(values))
        return dict(sorted([*found.items(), *((name, (0.0, 1.0)) for name in (self.augment.names if self.augment else []))]))

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.sets[0].images.channels

    @property
    def buckets(self) -> Sequence[tuple[int, int]]:  # type: ignore[override]
        return self.sets[0].images.buckets

    @property
    def values(self) -> ValueRange:  # type: ignore[override]
        return self.sets[0].images.values

    def setup(self, stage: str) -> None:
        """Opens the source, so that a bad path is reported before anything starts, and says what is in it."""
        train, held_out = self.sets
        if not self._told and (self.trainer is None or self.trainer.is_global_zero):
            print("\n".join(sentences(train, held_out)))
            if self.num_workers is None and self._readers:
                print(f"{self._readers} processes read images for each GPU; --data.num_workers chooses another number")
        self._told = True
        if self.varies and self.cache is not None:
            self.cache = None
            warnings.warn("latents are not cached, as crops, sizes or augmentations differ: each batch is encoded anew", stacklevel=2)

    def use_buckets(self, multiple: int) -> None:
        self.sets[0].images.use_buckets(multiple)

    def train_dataloader(self) -> DataLoader:
        train, ranks = self.sets[0], self._ranks()
        train.with_images, train.prepare = self.with_images, self.prepare
        accumulate = int(self.trainer.accumulate_grad_batches) if self.trainer else 1
        order = Order(len(train), *ranks, self.batch_size, self.mirror, self.seed, self._images_done, train.groups(), accumulate)
        loader = self._loader(train, sampler=order)
        loader.begin = self.begin
        return loader

    def val_dataloader(self) -> DataLoader:
        """Every held-out image on one rank, once; the same number of batches on each."""
        (world, rank), held_out = self._ranks(), self.sets[1]
        if len(held_out) < world:
            raise UserError(f"{len(held_out)} held-out images are too few for {world} devices: raise data.val_fraction")
        held_out.with_images, held_out.prepare = self.with_images, self.prepare
        order = HeldOutOrder(len(held_out), world, rank, self.batch_size, held_out.groups().buckets)
        return self._loader(held_out, sampler=order)

    test_dataloader = val_dataloader

    def _loader(self, dataset: Keyed, **options: Any) -> "Loader":
        return Loader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self._workers(dataset),
            persistent_workers=self._workers(dataset) > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_is,
            **options,
        )

    def _workers(self, dataset: Keyed) -> int:
        """Processes of a loader: none where batches are in memory already."""
        held = dataset.cache is not None and dataset.cache.on != "disk" and not dataset.with_images
        return 0 if held else self._readers if self.num_workers is None else self.num_workers

    @property
    def _readers(self) -> int:
        """As many as suit the device, where nobody chose."""
        return readers(self.trainer.strategy.root_device, self.trainer.num_devices) if self.trainer else 0

    def _images_done(self) -> int:
        """Of this epoch, by all ranks; after a resume as many as the checkpoint says, whatever the batch was then."""
        done, self.resumed = self.resumed, None
        ready: int = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0
        return ready * self.batch_size * self._ranks()[0] if done is None else done

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self._count_damaged(batch.pop("damaged", []))
        return batch

    def _count_damaged(self, names: list[str]) -> None:
        for name in names:
            if name not in self.damaged:
                self.damaged.add(name)
                warnings.warn(f"skipped an image that cannot be read: {name}", stacklevel=2)
        if len(self.damaged) > self.max_damaged:
            raise UserError(
                f"{len(self.damaged)} images cannot be read, more than data.max_damaged = {self.max_damaged} allows; "
                f"the last is {names[-1] if names else sorted(self.damaged)[-1]}: repair or remove them, or raise the limit"
            )

    def teardown(self, stage: str) -> None:
        if self.damaged:
            count = f"{len(self.damaged)} unreadable image{'s were' if len(self.damaged) > 1 else ' was'} skipped"
            print(f"{count}: {', '.join(sorted(self.damaged))}")
            self.damaged = set()

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def some(self, count: int) -> Batch:
        train = self.sets[0]
        shapes = [train.images.shape(int(index)) for index in train.indices[: 8 * count]]  # fewer of a size may be among them
        wanted = [position for position, shape in enumerate(shapes) if shape == shapes[0]][:count]
        held, train.cache = train.cache, None
        try:
            return self.on_after_batch_transfer(train.__getitems__(wanted), 0)
        finally:
            train.cache = held

    def rank_batches(self) -> Iterator[Batch]:
        (world, rank), train = self._ranks(), self.sets[0]
        mine = HeldOutOrder(len(train), world, rank, self.batch_size, train.groups().buckets).positions
        yield from self._blocks([mine[start : start + self.batch_size].tolist() for start in range(0, len(mine), self.batch_size)])

    def _blocks(self, blocks: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Batches of these positions of the training set, by the loader's processes."""
        loader = DataLoader(self.sets[0], batch_sampler=blocks, num_workers=self._workers(self.sets[0]), collate_fn=_as_is)  # type: ignore[arg-type]
        for batch in loader:
            if batch["id"]:
                yield self.on_after_batch_transfer(batch, 0)

    def cache_latents(self, moments: Callable[[Tensor], Tensor], key: str, device: torch.device) -> None:
        if self.cache is None or self.trainer is None:
            return
        train = self.sets[0]
        encoders = {"moments": moments} | {f"{FEATURES}{one.name}": partial(_features, one.to(device)) for one in self.cache_features}
        key = " ".join([key, *(name for name in encoders if name != "moments")])
        train.cache, key = None, hashlib.sha256(f"{key} {train.images.fingerprint()}".encode() + train.indices.tobytes()).hexdigest()
        encoding = Encoding(self.cache, key, train, self._blocks, self.trainer.strategy, device, self.batch_size)
        if self.cache_action == "check":
            print(encoding.check(encoders))
        else:
            encoding.fill(encoders)
        if self.cache_action == "prune":
            encoding.prune()
        train.cache = LatentCache(self.cache, key, self.cache_on, device)


class Emoji(ImageData):
    """The emoji that the package carries."""

    def __init__(self, size: int = 64, **options: Any) -> None:
        super().__init__(size, **options)

    def images(self) -> Images:
        return EmojiImages(self.size)


class Digits(ImageData):
    """The handwritten digits that the package carries; never mirrored."""

    def __init__(self, size: int = 32, mirror: bool = False, **options: Any) -> None:
        super().__init__(size, mirror=mirror, **options)

    def images(self) -> Images:
        return DigitImages(self.size)


class Folder(ImageData):
    """Any images by their path: --data.path takes a folder, an archive, a table, an array, a list (docs/data.md).

    channels: 1 grey, 3 RGB on white, 4 RGBA; null: 3, or as many as arrays have.  window: values of more than 8 bits, of floats
    and of arrays that become black and white; others are cut off.  crop: what is left of the longer side, `centre` or `random`;
    `none`: images keep about their shape, in batches of one size each.  resize: area, lanczos, or nearest for pixel art.
    depth: whether slices of volumes are images or channels.  maps: folder with a map (PNG) of the same name for each image.
    """

    def __init__(
        self,
        path: str,
        size: int = 256,
        channels: Literal[1, 3, 4] | None = None,
        window: tuple[float, float] | None = None,
        maps: str | None = None,
        crop: Crop = "centre",
        resize: Resize = "area",
        depth: Depth = "slices",
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        self.path, self.wanted_channels, self.window, self.maps = path, channels, window, maps
        self.crop, self.resize, self.depth = crop, resize, depth

    @property
    def varies(self) -> bool:
        return super().varies or self.crop != "centre"

    def images(self) -> Images:
        own = None if self.cache is None else Path(self.cache).parent
        return SourceImages(self.path, self.size, self.wanted_channels, self.window, self.maps, self.crop, self.resize, self.depth, own)


class Clips(ImageData):
    """Clips of frames, cut from any folder of films: video files, GIF, WebP, folders of images.  stride: frames from one to the next."""

    def __init__(self, path: str, size: int = 64, frames: int = 8, stride: int = 1, batch_size: int = 4, **options: Any) -> None:
        super().__init__(size, batch_size, **options)
        self.path, self.frames, self.stride = path, frames, stride

    def images(self) -> Images:
        return ClipImages(self.path, self.size, self.frames, self.stride)


class Audio(ImageData):
    """Any folder of WAV files as mel spectrograms of one channel, never mirrored.  rate: Hz; hop: samples per column; back: `ldm wav`."""

    def __init__(self, path: str, size: int = 64, rate: int = 16000, hop: int = 256, mirror: bool = False, **options: Any) -> None:
        super().__init__(size, mirror=mirror, **options)
        self.path, self.rate, self.hop = path, rate, hop

    def images(self) -> Images:
        return WaveImages(self.path, self.size, self.rate, self.hop)
