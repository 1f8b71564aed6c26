"""Which images are held out: by a hash of their names, so that images which come later move none of the others."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ldm.data.records import Records
from ldm.errors import UserError

Split = tuple[np.ndarray, np.ndarray]  # training and held-out indices, int64


def split(records: Records, val_fraction: float, seed: int) -> Split:
    """Split images by hash(seed, name) < val_fraction; of each class one image stays to train on.

    At least one image is on either side.  UserError for fewer than 2 images.
    """
    _check(len(records), val_fraction)
    values = hashes(records.ids, seed)
    held_out = values < val_fraction
    in_classes = np.lexsort((values, records.labels))
    labels = records.labels[in_classes]
    # the last of each class to be held out: it is held out only if all are, so that no other image ever moves
    last = in_classes[np.append(labels[1:] != labels[:-1], True)]
    held_out[last] = False
    if not held_out.any():
        others = np.setdiff1d(np.arange(len(records)), last)
        candidates = others if len(others) else np.arange(len(records))
        held_out[candidates[values[candidates].argmin()]] = True
    return _sides(held_out)


def given_split(held_out: np.ndarray) -> Split:
    """The split that a layout gives; held_out: bool (N,)."""
    return _sides(held_out)


def split_by_position(count: int, val_fraction: float, seed: int) -> Split:
    """A split of images whose number never changes, such as those that the package carries."""
    _check(count, val_fraction)
    held_out = np.zeros(count, bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    held_out[order[: min(max(1, round(count * val_fraction)), count - 1)]] = True
    return _sides(held_out)


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, in order and evenly chosen, the first and the last among them."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, most).astype(int))]


def spread(indices: Sequence[int], count: int) -> list[int]:
    """So many of some indices, evenly chosen; several times where there are fewer."""
    return [indices[i * len(indices) // count] for i in range(count)]


def hashes(names: Iterable[str], seed: int) -> np.ndarray:
    """A number in [0, 1) for each name, float64 (N,)."""
    key = str(seed).encode()
    digests = b"".join(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(digests, "<u8") / 2.0**64


def _check(count: int, val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; allowed is more than 0 and less than 1")
    if count < 2:
        raise UserError(f"{count} image cannot be split into training and held-out images: give at least 2")


def _sides(held_out: np.ndarray) -> Split:
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
