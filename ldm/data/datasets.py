"""Image sources: what ships with the package, and any folder of images."""

import csv
import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.decode import as_tensor, is_hidden, opened, read_image
from ldm.errors import UserError

MANIFEST = "manifest.jsonl"  # that `ldm sample` writes
ASSETS = Path(__file__).parent / "assets"
NAMED = {"file_name", "label", "text"}  # columns of metadata that are no numeric attributes
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}


@dataclass(frozen=True)
class Record:
    """What is known of an image besides its pixels."""

    id: str
    label: str | None = None
    text: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


class Images(ABC):
    """N images with their records; `names` are the class names in label order."""

    records: list[Record]
    size: int
    channels: int = 3
    has_maps: bool = False  # whether a map goes with each image

    def map(self, index: int) -> Tensor:
        """uint8 (3, size, size): what is where in the image, as colours."""
        raise NotImplementedError(f"{type(self).__name__} has no maps")

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """uint8 (channels, size, size); ValueError or OSError where the file cannot be read."""

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """What an image is called in messages."""
        return self.records[index].id

    @property
    def names(self) -> list[str]:
        return sorted({record.label for record in self.records if record.label is not None})

    def fingerprint(self) -> str:
        """Changes when an image, their order or their size changes."""
        return hashlib.sha256(f"{type(self).__name__} {self.size} {[r.id for r in self.records]}".encode()).hexdigest()


class EmojiImages(Images):
    """1,911 Noto Emoji (Apache-2.0) on white, 64 px; label "category/subcategory", text the Unicode name."""

    def __init__(self, size: int = 64) -> None:
        entries = [json.loads(line) for line in (ASSETS / "emoji.jsonl").read_text(encoding="utf-8").splitlines()]
        self.size = size
        self.records = [Record(e["char"], f"{e['category']}/{e['subcategory']}", e["name"]) for e in entries]

    def pixels(self, index: int) -> Tensor:
        row, column = divmod(index, _emoji_sheet().width // 64)
        tile = _emoji_sheet().crop((column * 64, row * 64, column * 64 + 64, row * 64 + 64))
        return as_tensor(tile if self.size == 64 else tile.resize((self.size, self.size), Image.Resampling.LANCZOS))


@cache
def _emoji_sheet() -> Image.Image:
    return Image.open(ASSETS / "emoji.webp").convert("RGB")


class DigitImages(Images):
    """1,797 handwritten digits of the UCI set, 8x8 scans shown larger (bicubic), white on black; label "0".."9"."""

    def __init__(self, size: int = 32) -> None:
        sheet = np.asarray(Image.open(ASSETS / "digits.png")).reshape(-1, 8, 9)
        self.size, self.scans = size, sheet[:, :, :8]
        self.records = [Record(f"{i:04d}", str(label), f"the digit {label}") for i, label in enumerate(sheet[:, 0, 8])]

    def pixels(self, index: int) -> Tensor:
        image = Image.fromarray(self.scans[index]).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return as_tensor(image.convert("RGB"))


class FolderImages(Images):
    """Any folder of images, recursively.  Label and text come from `metadata.jsonl` or `metadata.csv` (file_name, label, text, and
    numeric attributes by other names) where there is one; otherwise the label is the name of the image's sub-folder."""

    def __init__(self, path: str, size: int, channels: int = 3, window: tuple[float, float] | None = None, maps: str | None = None) -> None:
        self.size, self.channels, self.window, self.root = size, channels, window, Path(path).expanduser()
        if window is not None and not window[0] < window[1]:
            raise UserError(f"data.window is {list(window)}; give the value that becomes black, then a greater one that becomes white")
        require_folder(self.root, path, "images")
        metadata = read_metadata(self.root)
        found = (p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES and not is_hidden(p.relative_to(self.root)))
        files = sorted(p for p in found if p.is_file())
        if not files:
            raise UserError(f"no images in {path!r} or below it: allowed are {' '.join(sorted(SUFFIXES))}")
        self.maps = None if maps is None else [Path(maps) / file.relative_to(self.root).with_suffix(".png") for file in files]
        if self.maps is not None and (missing := [path for path in self.maps if not path.is_file()]):
            raise UserError(f"{len(missing)} of {len(files)} images have no map in data.maps; the first that is missing is {missing[0]}")
        self.has_maps = self.maps is not None
        self.files, self.records = files, [record_of(file.relative_to(self.root), metadata) for file in files]

    def pixels(self, index: int) -> Tensor:
        return read_image(self.files[index], self.size, self.channels, self.window)

    def map(self, index: int) -> Tensor:
        assert self.maps is not None
        with opened(self.maps[index]) as image:
            return as_tensor(ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.NEAREST))

    def fingerprint(self) -> str:
        stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(f"{super().fingerprint()} {self.channels} {self.window} {stats}".encode()).hexdigest()


def require_folder(root: Path, path: str, what: str) -> None:
    """what: it should hold; path: as the user gave it."""
    if not root.is_dir():
        raise UserError(f"data.path is {path!r}, which is not a folder: give a folder of {what}")


def read_metadata(root: Path) -> dict[str, dict[str, str]] | None:
    """Rows of metadata.jsonl or metadata.csv by file_name; None where there is neither."""
    parse: Callable[[Iterable[str]], Iterable[dict[str, str]]]
    if (path := root / "metadata.jsonl").is_file():
        parse = _json_lines
    elif (path := root / "metadata.csv").is_file():
        parse = csv.DictReader
    else:
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(parse(file))
    except ValueError as error:  # not UTF-8, not JSON
        raise UserError(f"{path} cannot be read: {error}") from error
    if not all(isinstance(row, dict) and "file_name" in row for row in rows):
        raise UserError(f"{path} needs a file_name in every row (and label, text where known)")
    return {row["file_name"]: row for row in rows}


def record_of(name: Path, metadata: dict[str, dict[str, str]] | None) -> Record:
    """What a row of metadata says of a file, or without any metadata its sub-folder."""
    if metadata is None:
        label = name.parts[0] if len(name.parts) > 1 else None
        return Record(name.as_posix(), label)
    row = metadata.get(name.as_posix(), {})
    label = row.get("label")
    numbers = {key: number for key, value in row.items() if key not in NAMED and (number := _number(value)) is not None}
    return Record(name.as_posix(), None if label in (None, "") else str(label), str(row.get("text") or ""), numbers)


def _number(value: str | float | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _json_lines(lines: Iterable[str]) -> list[dict[str, str]]:
    return [json.loads(line) for line in lines if line.strip()]


def split(count: int, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out indices, the same for every run with this seed; at least one each."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; allowed is more than 0 and less than 1")
    if count < 2:
        raise UserError(f"{count} image cannot be split into training and held-out images: give at least 2")
    held_out = min(max(1, round(count * val_fraction)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


class Subset(Images):
    """The images at some indices of others."""

    def __init__(self, images: Images, indices: list[int]) -> None:
        self.images, self.size, self.records, self.indices = images, images.size, [images.records[i] for i in indices], indices

    def pixels(self, index: int) -> Tensor:
        return self.images.pixels(self.indices[index])


CARRIED: dict[str, type[EmojiImages] | type[DigitImages]] = {"emoji": EmojiImages, "digits": DigitImages}


def open_images(source: str, size: int) -> Images:
    """A folder of images, or what the package carries under a name; of a folder that `ldm sample` wrote the pictures in its manifest."""
    if source in CARRIED and not Path(source).is_dir():
        return CARRIED[source](size)
    if source in CARRIED:
        warnings.warn(f"{source!r} is taken for the folder of that name here, not for what the package carries", stacklevel=2)
    images = FolderImages(source, size)
    names = pictures_in_manifest(Path(source))
    if names is None:
        return images
    indices = [i for i, file in enumerate(images.files) if file.name in names]
    if not indices:
        raise UserError(
            f"none of the {len(names)} pictures in {Path(source) / MANIFEST} is in {source!r}: give the folder that they are in"
        )
    return Subset(images, indices)


def pictures_in_manifest(folder: Path) -> list[str] | None:
    """File names in the manifest of a folder that `ldm sample` wrote, in their order; None where there is none of ours."""
    path = folder / MANIFEST
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [str(entry["file"]) for entry in entries] if all("model_sha256" in entry for entry in entries) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or somebody else's
        return None
