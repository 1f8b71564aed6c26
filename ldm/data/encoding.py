"""Filling the latent cache: pixels from the loader's processes, encoded by all ranks, written behind."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import Keyed
from ldm.data.cache import CacheWriter, LatentCache, others, remove, verify
from ldm.data.split import evenly
from ldm.errors import UserError
from ldm.interfaces import Batch
from ldm.ranges import to_float

Encoder = Callable[[Tensor], Tensor]  # images (B,C,H,W) in [-1,1] -> (B, ...)
CHECKED = 64  # rows that `check` encodes anew
FAR = 0.1  # of the values' deviation: more than other arithmetic, such as another precision, may change


class Encoding:
    """The encoding of a training set into a cache, with all ranks of a strategy of Lightning.

    read: blocks of positions -> batches with their images, in order.  Each block of `block` images is encoded by itself, so that what
    comes out does not depend on the ranks, nor on whether a run was killed meanwhile.
    """

    def __init__(
        self, root: str, key: str, train: Keyed, read: Callable[[Sequence[Sequence[int]]], Iterator[Batch]], strategy: Any,
        device: torch.device, block: int,
    ) -> None:  # fmt: skip
        self.root, self.key, self.train, self.read, self.strategy, self.device, self.block = root, key, train, read, strategy, device, block

    def fill(self, encoders: Mapping[str, Encoder]) -> None:
        """Write what is missing; says what else lies in the folder."""
        strategy, writer = self.strategy, CacheWriter(self.root, self.key)
        with ExitStack() as stack:
            missing = strategy.is_global_zero and LatentCache(self.root, self.key).card is None and stack.enter_context(writer.alone())
            if not strategy.broadcast(bool(missing)):
                return
            if strategy.is_global_zero:
                self._tell_others()
                sample = self._encoded(encoders, to_float(self.train.read(0)[0][None].to(self.device)))
                writer.create(len(self.train), {name: tensor.shape[2:] for name, tensor in sample.items()}, self.block)
            strategy.barrier("latent cache created")
            writer.open()
            self._write(writer, encoders)
            strategy.barrier("latent cache filled")
            if strategy.is_global_zero:
                writer.finish()
                lost, values = writer.errors
                if values:
                    print(f"the latents lie in {writer.target}, as float16: {(lost / values) ** 0.5:.4%} of their root mean square is lost")
            writer.close()
            strategy.barrier("latent cache complete")

    def _write(self, writer: CacheWriter, encoders: Mapping[str, Encoder]) -> None:
        strategy, pending = self.strategy, writer.pending()
        done = writer.rows - sum(map(len, pending))
        if done and strategy.is_global_zero:
            print(f"{done} of {writer.rows} images are encoded already, by a run that was stopped")
        mine, behind = pending[strategy.global_rank :: strategy.world_size], list[Future[None]]()
        with ThreadPoolExecutor(1) as pool, tqdm(
            total=writer.rows, initial=done, desc="Encoding", unit="img", disable=not strategy.is_global_zero
        ) as bar:  # fmt: skip
            for rows, batch in zip(mine, _ahead(self.read([list(block) for block in mine])), strict=True):
                made = self._encoded(encoders, to_float(batch["image"].to(self.device, non_blocking=True)))
                behind.append(pool.submit(writer.write, rows, batch["position"], made))
                if len(behind) > 2:  # no more than that wait in memory
                    behind.pop(0).result()
                bar.update(min(len(rows) * strategy.world_size, bar.total - bar.n))
            for one in behind:
                one.result()

    @staticmethod
    @torch.no_grad()
    def _encoded(encoders: Mapping[str, Encoder], images: Tensor) -> dict[str, Tensor]:
        """(B, 2, ...) of images (B,C,H,W) and of their mirror images, by name."""
        return {name: torch.stack([encode(images), encode(images.flip(-1))], dim=1) for name, encode in encoders.items()}

    def _tell_others(self) -> None:
        if found := others(self.root, self.key):
            sizes = ", ".join(f"{path.name} ({size / 1e6:,.1f} MB)" for path, size in list(found.items())[:6])
            print(f"{self.root} also holds latents of other images, first stages or sizes: {sizes}; `ldm encode --prune` removes them")

    def check(self, encoders: Mapping[str, Encoder]) -> str:
        """Encode a sample of the images anew and compare; returns a sentence.  UserError where the cache holds something else."""
        cache = LatentCache(self.root, self.key)
        if (card := cache.card) is None:
            raise UserError(f"there are no latents of these images and this first stage in {self.root}: leave --check out to write them")
        damaged = set(card["damaged"])
        rows = [row for row in evenly(card["rows"], CHECKED) if row not in damaged]
        if wrong := verify(cache, rows):
            raise UserError(f"{len(wrong)} of {len(rows)} rows in {cache.folder} are not as they were written: remove that folder")
        worst = 0.0
        for batch in self.read([rows[i : i + self.block] for i in range(0, len(rows), self.block)]):
            anew = self._encoded(encoders, to_float(batch["image"].to(self.device)))
            for mirrored in (0, 1):
                stored, _ = cache[[mirrored] * len(batch["position"]), batch["position"]]
                for name, values in stored.items():
                    fresh = anew[name][:, mirrored].float().cpu()
                    worst = max(worst, float((values - fresh).abs().max() / fresh.std().clamp(min=1e-6)))
        sentence = f"{len(rows)} of {card['rows']} images encoded anew differ from {cache.folder} by at most {worst:.2%} of their deviation"
        if worst > FAR:
            raise UserError(f"{sentence}: these are latents of something else; remove that folder")
        return sentence

    def prune(self) -> None:
        """Remove the caches of other images, first stages or sizes, and what killed runs left; one that is being written stays."""
        for path, size in others(self.root, self.key).items():
            print(f"{'removed' if remove(path) else 'left, as a run is writing it:'} {path} ({size / 1e6:,.1f} MB)")


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each read in a thread while the one before it is used: a loader without processes would let the device wait."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = pool.submit(next, batches, None)
            yield batch
