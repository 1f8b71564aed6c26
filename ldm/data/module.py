"""The data module: split, order, loaders; one subclass per source."""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from ldm.data.audio import WaveImages
from ldm.data.cache import LatentCache
from ldm.data.clips import ClipImages
from ldm.data.datasets import DigitImages, EmojiImages, FolderImages, Images, split
from ldm.errors import UserError
from ldm.interfaces import Batch, TrainingData
from ldm.ranges import to_float

Key = tuple[int, bool]  # image, mirrored


class Order(DistributedSampler):
    """A training epoch's keys for one rank: a permutation and mirror choices drawn from (seed, epoch) alone.

    A run that resumes inside an epoch starts at `start()`, so it goes on with exactly the images it had not seen.
    """

    def __init__(self, count: int, world: int, rank: int, batch_size: int, mirror: bool, seed: int, start: Callable[[], int]) -> None:
        super().__init__(range(count), world, rank, seed=seed)  # type: ignore[arg-type]
        self.count, self.batch_size, self.mirror, self.start = count, batch_size, mirror, start
        self.num_samples = max(1, count // (world * batch_size)) * batch_size

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        needed = self.num_samples * self.num_replicas
        order = torch.cat([torch.randperm(self.count, generator=generator) for _ in range(-(-needed // self.count))])[:needed]
        mirrored = (torch.rand(needed, generator=generator) < 0.5) & self.mirror
        mine = slice(self.rank + self.start() * self.batch_size * self.num_replicas, None, self.num_replicas)
        return iter(list(zip(order[mine].tolist(), mirrored[mine].tolist(), strict=True)))


class Keyed(Dataset):
    """The images of a split, batch by batch; latents instead of pixels where there is a cache."""

    def __init__(self, images: Images, indices: list[int], cache: LatentCache | None = None) -> None:
        self.images, self.indices, self.cache, self.with_images = images, indices, cache, False
        self.names = {name: label for label, name in enumerate(images.names)}

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, position: int) -> tuple[Tensor, int, str | None]:
        """An image and its position; where it cannot be read, its first readable successor and the unreadable file's name."""
        damaged = None
        for offset in range(min(len(self), 100)):
            used = (position + offset) % len(self)
            try:
                return self.images.pixels(self.indices[used]), used, damaged
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
                damaged = damaged or f"{self.images.records[self.indices[used]].id} ({error})"
        raise UserError(f"none of {offset + 1} images in a row can be read, the first is {damaged}: check the folder")

    def __getitems__(self, keys: Sequence[Key | int]) -> Batch:
        """Keys past the end, which keep the ranks of a validation in step, are no images; a batch of such only is empty."""
        pairs = [(key, False) if isinstance(key, int) else key for key in keys]
        pairs = [(position, mirrored) for position, mirrored in pairs if position < len(self)]
        if not pairs:
            return {"id": []}
        batch: Batch = {}
        if self.cache is not None:
            batch["moments"], batch["position"] = self.cache[[int(m) for _, m in pairs], [p for p, _ in pairs]]
        if self.cache is None or self.with_images:
            images, used, damaged = zip(*(self.read(position) for position, _ in pairs), strict=True)
            turned = [mirrored for _, mirrored in pairs]
            batch["image"] = torch.stack([x.flip(-1) if mirrored else x for x, mirrored in zip(images, turned, strict=True)])
            if self.with_images and self.images.has_maps:
                maps = [self.images.map(self.indices[position]) for position in used]
                batch["map"] = torch.stack([x.flip(-1) if mirrored else x for x, mirrored in zip(maps, turned, strict=True)])
            batch["position"] = list(used)
            batch["damaged"] = [name for name in damaged if name is not None]
        records = [self.images.records[self.indices[position]] for position in batch["position"]]
        batch |= {"id": [record.id for record in records], "text": [record.text for record in records]}
        if any(record.numbers for record in self.images.records):
            batch["numbers"] = [dict(record.numbers) for record in records]
        if self.names:
            batch["label"] = torch.tensor([self.names.get(record.label, -1) for record in records])  # type: ignore[arg-type]
        return batch


def _as_is(batch: Any) -> Any:
    return batch


class ImageData(L.LightningDataModule, TrainingData, ABC):
    """Images in batches of `image` uint8 (B,C,size,size) or cached `moments`, `id`, `text` and, if known, `label` (B,).

    val_fraction is held out, chosen by split_seed; mirror flips half of the training images; cache: folder for latents
    (null: stage 2 encodes every batch anew); max_damaged: unreadable images to skip before giving up.
    """

    def __init__(
        self,
        size: int,
        batch_size: int = 32,
        mirror: bool = True,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        cache: str | None = None,
        max_damaged: int = 10,
    ) -> None:
        super().__init__()
        if size < 1 or batch_size < 1:
            raise UserError(f"data.size is {size} and data.batch_size {batch_size}; both must be at least 1")
        self.size, self.batch_size, self.mirror, self.seed = size, batch_size, mirror, seed
        self.val_fraction, self.split_seed, self.num_workers = val_fraction, split_seed, num_workers
        self.cache, self.max_damaged = cache, max_damaged
        self.damaged: set[str] = set()
        self._sets: tuple[Keyed, Keyed] | None = None

    @abstractmethod
    def images(self) -> Images:
        """Open the source."""

    @property
    def sets(self) -> tuple[Keyed, Keyed]:
        """Training and held-out images."""
        if self._sets is None:
            images = self.images()
            train, held_out = split(len(images), self.val_fraction, self.split_seed)
            self._sets = Keyed(images, train), Keyed(images, held_out)
        return self._sets

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        return list(self.sets[0].names)

    @property
    def has_texts(self) -> bool:  # type: ignore[override]
        return any(record.text for record in self.sets[0].images.records)

    @property
    def numbers(self) -> list[str]:  # type: ignore[override]
        return sorted({name for record in self.sets[0].images.records for name in record.numbers})

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.sets[0].images.channels

    def setup(self, stage: str) -> None:
        self.sets  # noqa: B018  opens the source, so that a bad path is reported before anything starts

    def train_dataloader(self) -> DataLoader:
        order = Order(len(self.sets[0]), *self._ranks(), self.batch_size, self.mirror, self.seed, self._batches_done)
        return self._loader(self.sets[0], sampler=order)

    def val_dataloader(self) -> DataLoader:
        """Every held-out image on one rank, once; the same number of batches on each."""
        (world, rank), count = self._ranks(), len(self.sets[1])
        if count < world:
            raise UserError(f"{count} held-out images are too few for {world} devices: raise data.val_fraction")
        return self._loader(self.sets[1], sampler=DistributedSampler(range(-(-count // world) * world), world, rank, shuffle=False))  # type: ignore[arg-type]

    test_dataloader = val_dataloader

    def _loader(self, dataset: Keyed, **options: Any) -> DataLoader:
        dataset.with_images = self.with_images
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_is,
            **options,
        )

    def _batches_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0

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
            print(f"{len(self.damaged)} unreadable images were skipped: {', '.join(sorted(self.damaged))}")
            self.damaged = set()

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def rank_batches(self) -> Iterator[Batch]:
        world, rank = self._ranks()
        mine = list(range(rank, len(self.sets[0]), world))
        for start in range(0, len(mine), self.batch_size):
            batch = self.sets[0].__getitems__(mine[start : start + self.batch_size])
            yield self.on_after_batch_transfer(batch, 0)

    def cache_latents(self, moments: Callable[[Tensor], Tensor], key: str, device: torch.device) -> None:
        if self.cache is None or self.trainer is None:
            return
        train, strategy, (world, rank) = self.sets[0], self.trainer.strategy, self._ranks()
        cache = LatentCache(self.cache, hashlib.sha256(repr((key, train.images.fingerprint(), train.indices)).encode()).hexdigest())
        if not strategy.broadcast(cache.complete):
            if rank == 0:
                cache.create((2, len(train), *moments(to_float(train.read(0)[0][None].to(device))).shape[1:]))
            strategy.barrier("latent cache created")
            with tqdm(total=len(train), desc="Encoding", unit="img", disable=rank > 0) as bar:
                for number, batch in enumerate(self.rank_batches()):
                    images = to_float(batch["image"].to(device))
                    both = torch.stack([moments(images), moments(images.flip(-1))])
                    wanted = range(len(train))[rank::world][number * self.batch_size :][: len(images)]
                    cache.write(wanted, batch["position"], both)
                    bar.update(len(images) * world)
            strategy.barrier("latent cache filled")
            if rank == 0:
                cache.finish()
            strategy.barrier("latent cache complete")
        train.cache = cache


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
    """Any folder of images: --data.path.  channels: 1 grey, 3 RGB on white, 4 RGBA.  window: values of images with more than 8 bits that
    become black and white (e.g. of a medical slice); others are cut off.  maps: folder with a map (PNG) of the same name for each image."""

    def __init__(
        self,
        path: str,
        size: int = 256,
        channels: Literal[1, 3, 4] = 3,
        window: tuple[float, float] | None = None,
        maps: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        self.path, self.wanted_channels, self.window, self.maps = path, channels, window, maps

    def images(self) -> Images:
        return FolderImages(self.path, self.size, self.wanted_channels, self.window, self.maps)


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
