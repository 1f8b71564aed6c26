"""Arrays of images, fields and volumes: .npy, .npz, .safetensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from ldm.data.decode import naming
from ldm.data.records import Record, Records
from ldm.data.sources.annotations import clean
from ldm.data.sources.source import Report, Source
from ldm.errors import UserError

IMAGES = ("images", "image", "samples", "x", "data", "arr_0")
LABELS = ("labels", "label", "y", "classes", "arr_1")
TEXTS = ("captions", "texts", "text", "prompts")
Depth = Literal["slices", "channels"]
SUFFIXES = (".npy", ".npz", ".safetensors")


def channels_first(array: np.ndarray) -> np.ndarray:
    """An image (H,W), (H,W,C) or (C,H,W) as (C,H,W): the last axis is the channels where only it may be (1, 3, 4)."""
    if array.ndim == 2:
        return array[None]
    last = array.shape[-1] in (1, 3, 4) and array.shape[0] not in (1, 3, 4)
    return np.moveaxis(array, -1, 0) if last else array


class ArraySource(Source):
    """The images along the first axis of an array (N,H,W), (N,C,H,W), (N,H,W,C) or (N,C,D,H,W).

    depth: whether each of the D slices of a volume is an image, or all are channels of one (channel c of slice d is
    c D + d).  Classes and texts are arrays of N beside it: labels, captions.  Keras' x_train, x_test are a split.
    """

    is_array = True

    def __init__(self, path: Path, depth: Depth = "slices") -> None:
        self.path, self.report = path, Report(f"arrays ({path.suffix.lower()})")
        with naming(path):
            held = _opened(path)
            found = {str(name).lower(): str(name) for name in held}
            parts = [(found[x], found.get(y), split) for x, y, split in (("x_train", "y_train", 0), ("x_test", "y_test", 1)) if x in found]
            if not parts:
                parts = [(self._images(held, found), next((found[name] for name in LABELS if name in found), None), 0)]
            self.arrays = [held[name] for name, _, _ in parts]
        shape = self.arrays[0].shape
        if any(array.shape[1:] != shape[1:] or array.ndim not in (3, 4, 5) for array in self.arrays):
            raise UserError(
                f"{str(path)!r} has arrays of shape {[list(array.shape) for array in self.arrays]}; allowed is (N,C,H,W) or (N,C,D,H,W)"
            )
        if (kind := self.arrays[0].dtype.kind) not in "uifb":
            raise UserError(f"{str(path)!r} has values of the type {self.arrays[0].dtype}; allowed are whole numbers and floats ({kind!r})")
        self.slices = shape[2] if len(shape) == 5 and depth == "slices" else 1
        self.depth = shape[2] if len(shape) == 5 and depth == "channels" else 1
        if len(shape) == 5:
            what = f"{self.slices} images each" if self.slices > 1 else f"{shape[1] * self.depth} channels"
            self.report.notes.append(f"volumes {list(shape[1:])} are taken as {what} (--data.depth slices or channels)")
        self.ends = np.cumsum([len(array) for array in self.arrays])
        used = {name for part in parts for name in part[:2]}
        texts = next((found[name] for name in TEXTS if name in found and len(held[found[name]]) == self.ends[-1]), None)
        for name in held:
            if name not in used and name != texts:
                self.report.leave_out("array", str(name))
        labels = [held[name] if name else None for _, name, _ in parts]
        self.records = Records(self._records(labels, None if texts is None else held[texts]))
        self.held_out = (
            np.repeat([split == 1 for *_, split in parts], [len(a) * self.slices for a in self.arrays]) if len(parts) == 2 else None
        )

    def _images(self, held: Any, found: dict[str, str]) -> str:
        named = [found[name] for name in IMAGES if name in found and held[found[name]].ndim >= 3]
        large = [name for name in held if held[name].ndim >= 3]
        if not named and len(large) != 1:
            shapes = ", ".join(f"{name} {list(held[name].shape)}" for name in list(held)[:8])
            raise UserError(f"{str(self.path)!r} holds {shapes or 'nothing'}: which are the images? call them `images`, of shape (N,C,H,W)")
        return (named or large)[0]

    def _records(self, labels: list[np.ndarray | None], texts: np.ndarray | None) -> Iterator[Record]:
        place = 0
        for array, label in zip(self.arrays, labels, strict=True):
            if label is not None and len(label := np.asarray(label).reshape(len(label), -1)[:, 0]) != len(array):
                raise UserError(f"{str(self.path)!r} has {len(array)} images and {len(label)} labels: give one for each")
            for i in range(len(array)):
                text = "" if texts is None else clean(str(texts[place]))
                for number in range(self.slices):
                    name = f"{place}#{number}" if self.slices > 1 else str(place)
                    yield Record(name, None if label is None else _name(label[i]), text)
                place += 1

    def read(self, index: int) -> np.ndarray:
        place, number = divmod(index, self.slices)
        part = int(np.searchsorted(self.ends, place, side="right"))
        array = np.asarray(self.arrays[part][place - (self.ends[part - 1] if part else 0)])
        if array.ndim == 4:
            array = array[:, number] if self.slices > 1 else array.reshape(-1, *array.shape[2:])
        return channels_first(array)

    def stamps(self) -> Iterator[object]:
        status = self.path.stat()
        return iter([status.st_size, status.st_mtime_ns, self.slices])


def _name(label: Any) -> str:
    value = label.item() if hasattr(label, "item") else label
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _opened(path: Path) -> Any:
    """Arrays by name, without loading what can be mapped into memory, and without pickles."""
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        found = np.load(path, mmap_mode="r")
    except ValueError as error:
        if "pickle" in str(error) or "object" in str(error):  # numpy's own sentence says how to load them all the same
            raise ValueError("it is no file of arrays, or one of Python objects, which are not loaded") from error
        raise
    return {"images": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
