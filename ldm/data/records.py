"""What is known of every image besides its pixels, in packed columns: some dozen bytes an image, whatever their number."""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np


@dataclass(frozen=True)
class Record:
    """What is known of one image."""

    id: str
    label: str | None = None
    text: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    others: tuple[str, ...] = ()  # further texts that say what it shows

    @classmethod
    def of(cls, id: str, label: str | None, texts: Sequence[str] = (), numbers: Mapping[str, float] | None = None) -> "Record":
        """Of an image with any number of texts."""
        return cls(id, label, texts[0] if texts else "", numbers or {}, tuple(texts[1:]))

    @property
    def texts(self) -> tuple[str, ...]:
        """All its texts."""
        return (self.text, *self.others) if self.text else ()


class _Packer:
    """Texts that come one after the other."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q", [0])

    def add(self, text: str) -> None:
        self.data += text.encode("utf-8", "surrogateescape")  # as file names have what is not UTF-8
        self.ends.append(len(self.data))

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes uint8, and where each text ends int64 (N+1,); without a copy."""
        return np.frombuffer(self.data, np.uint8), np.frombuffer(self.ends, np.int64)


class Strings(Sequence[str]):
    """N texts as one run of UTF-8 bytes: a Python list of as many takes four times the memory, and each process that
    looks at it gets a copy."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        packer = _Packer()
        for text in texts:
            packer.add(text)
        self.data, self.ends = packer.columns()

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = _inside(index, len(self))
        return self.data[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.data.nbytes + self.ends.nbytes


class Records(Sequence[Record]):
    """The records of N images.  names: the classes, in the order of their labels.

    Only `numbers` of finite values are kept; an image without one has NaN in its column.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        codes, labels, first = dict[str | None, int]({None: -1}), array("i"), array("q", [0])
        columns, ids, texts, count = dict[str, array](), _Packer(), _Packer(), 0

        for record in records:
            ids.add(record.id)
            labels.append(codes.setdefault(record.label, len(codes) - 1))
            for text in record.texts:
                texts.add(text)
            first.append(len(texts.ends) - 1)
            for name, value in record.numbers.items():
                column = columns.setdefault(name, array("d"))
                column.extend([np.nan] * (count - len(column)))
                column.append(value)
            count += 1
        self.ids, self.texts = Strings(), Strings()
        self.ids.data, self.ids.ends = ids.columns()
        self.texts.data, self.texts.ends = texts.columns()
        self.first_text = np.frombuffer(first, np.int64)
        found = [name for name in codes if name is not None]
        self.names = in_order(found)
        order = {name: label for label, name in enumerate(self.names)}
        renumbered = np.array([*(order[name] for name in found), -1], np.int32)
        self.labels = renumbered[np.frombuffer(labels, np.int32)] if count else np.zeros(0, np.int32)
        self.numbers = {name: np.array([*column, *[np.nan] * (count - len(column))]) for name, column in columns.items()}

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = _inside(index, len(self))
        label, texts = int(self.labels[index]), self.texts[self.first_text[index] : self.first_text[index + 1]]
        return Record.of(self.ids[index], self.names[label] if label >= 0 else None, texts, self.numbers_of(index))

    def numbers_of(self, index: int) -> dict[str, float]:
        """The numeric attributes that an image has."""
        return {name: float(column[index]) for name, column in self.numbers.items() if not np.isnan(column[index])}

    def text(self, index: int, draw: int = 0) -> str:
        """One of an image's texts, "" where it has none; draw: a number that chooses it, 0 the first."""
        start, end = int(self.first_text[index]), int(self.first_text[index + 1])
        return self.texts[start + draw % (end - start)] if end > start else ""

    @property
    def has_texts(self) -> bool:
        """Whether any image has one."""
        return len(self.texts) > 0

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        columns: list[np.ndarray] = [self.labels, self.first_text, *self.numbers.values()]
        return self.ids.nbytes + self.texts.nbytes + sum(column.nbytes for column in columns)

    def digest(self) -> str:
        """Changes when an image is added, taken away, or moved."""
        return hashlib.sha256(self.ids.data.tobytes() + self.ids.ends.tobytes()).hexdigest()


def in_order(names: Sequence[str]) -> list[str]:
    """Class names in the order of their labels: by value where all are whole numbers, else by the alphabet."""
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numeric else None)


def _inside(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"there are {count}, {index} was asked for")
    return index % count
