"""What a source of images is: records, and for each of them something that `decode` turns into pixels."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.records import Records

Item = Path | bytes | np.ndarray  # a picture file, the content of one, or values (C,H,W)


@dataclass
class Count:
    """How many, with an example."""

    number: int = 0
    example: str = ""

    def add(self, example: str) -> None:
        """One more."""
        self.number, self.example = self.number + 1, self.example or example

    def __bool__(self) -> bool:
        return self.number > 0

    def __str__(self) -> str:
        return f"{self.number:,} (the first is {self.example!r})" if self.number else "0"


@dataclass
class Report:
    """What was read of a source, and what was not."""

    what: str  # the kind of source, in words
    left_out: dict[str, Count] = field(default_factory=dict)  # by the reason
    rows_without_file: Count = field(default_factory=Count)
    files_without_row: Count = field(default_factory=Count)
    notes: list[str] = field(default_factory=list)  # sentences

    def words(self) -> str:
        """What was left out, as the end of a sentence."""
        found = (f"{count.number:,} {reason} ({count.example})" for reason, count in self.left_out.items())
        return f"; left out: {', '.join(found)}" if self.left_out else ""

    def leave_out(self, reason: str, example: str) -> None:
        """One more file that is no image of this source."""
        self.left_out.setdefault(reason, Count()).add(example)


class Runs:
    """Items that are read in runs, where random access is not to be had.

    of: int (N,), the run of each item, not decreasing; files: (K,), the file of each run: runs of one file are best read
    one after the other; load: the items of these indices, all of one run.  A process keeps the last KEPT runs.
    """

    KEPT = 6

    def __init__(self, of: np.ndarray, files: np.ndarray, load: Callable[[np.ndarray], list[Any]]) -> None:
        self.of, self.files, self.load = of, files, load
        self._kept: dict[int, tuple[int, list[Any]]] = {}

    def read(self, index: int) -> Any:
        """One item; UserError where its run cannot be read."""
        run = int(self.of[index])
        if run in self._kept:
            self._kept[run] = self._kept.pop(run)  # the youngest is the last
        else:
            first, end = (int(np.searchsorted(self.of, run + side)) for side in (0, 1))
            self._kept[run] = first, self.load(np.arange(first, end))
            for oldest in list(self._kept)[: -self.KEPT]:
                del self._kept[oldest]
        first, items = self._kept[run]
        return items[index - first]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


class Source(ABC):
    """N images: `records`, and what `decode` makes pixels of.

    held_out: bool (N,) where the layout says which images are; None: it does not.
    runs: where random access is not to be had, the run of each image (N,) and the file of each run.
    is_array: whether images are arrays that are no pictures, `depth` slices of each channel in one.
    window: values that the files say are black and white.
    """

    records: Records
    report: Report
    held_out: np.ndarray | None = None
    runs: tuple[np.ndarray, np.ndarray] | None = None
    is_array: bool = False
    depth: int = 1
    window: tuple[float, float] | None = None

    @abstractmethod
    def read(self, index: int) -> Item:
        """The image as it is stored; UserError where its file is gone."""

    @abstractmethod
    def stamps(self) -> Iterator[object]:
        """What changes when a file of it does, such as sizes and times."""

    def name(self, index: int) -> str:
        """What messages call an image."""
        return self.records.ids[index]

    def fingerprint(self) -> str:
        """Changes when an image, a name or their order changes."""
        digest = hashlib.sha256(self.records.digest().encode())
        for stamp in self.stamps():
            digest.update(repr(stamp).encode())
        return digest.hexdigest()
