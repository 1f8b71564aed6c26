"""Sets of images: any source under one rule of pixels, and what the package carries."""

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.decode import naming, opened
from ldm.data.modes import Window, as_tensor, kind_of, shares, upright
from ldm.data.open import open_source
from ldm.data.pixels import Resize, fitted, rule_of
from ldm.data.records import Record, Records
from ldm.data.sources.arrays import Depth
from ldm.data.sources.source import Report
from ldm.data.split import Split, evenly, given_split, split, split_by_position
from ldm.errors import UserError
from ldm.ranges import ValueRange

DEEP = {kind: (0.0, 65535.0) for kind in ("16", "32", "F")}  # of maps
Crop = Literal["centre", "random", "none"]
ASSETS = Path(__file__).parent / "assets"


class Images(ABC):
    """N images with their records; `names` are the class names in label order."""

    records: Records
    size: int
    channels: int = 3
    values: ValueRange = ValueRange()  # what black and white are in the units of the data
    window: Window | None = None  # as it was given
    has_maps: bool = False  # whether a map goes with each image
    report: Report = Report("images")
    runs: tuple[np.ndarray, np.ndarray] | None = None  # see Source

    bucket_of: np.ndarray | None = None  # (N,) the number of each image's size, where there are several
    buckets: Sequence[tuple[int, int]] = ()  # heights and widths in px

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of an image in px."""
        return (self.size, self.size) if self.bucket_of is None else self.buckets[int(self.bucket_of[index])]

    def use_buckets(self, multiple: int) -> None:  # noqa: B027  most images have one size
        """Where images keep their shapes: choose for each the size, in multiples of so many px, that is most like it."""

    def map(self, index: int, draw: int = 0) -> Tensor:
        """uint8 (3,H,W): what is where in the image, as colours; uint16 of maps of 16 bits, as of depths."""
        raise NotImplementedError(f"{type(self).__name__} has no maps")

    @abstractmethod
    def pixels(self, index: int, draw: int = 0) -> Tensor:
        """uint8 (channels, size, size), uint16 or float32 in [-1, 1]; draw: a number that chooses what is random in it.

        UserError where the file cannot be read.
        """

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """What an image is called in messages."""
        return self.records.ids[index]

    @property
    def names(self) -> list[str]:
        return self.records.names

    def split(self, val_fraction: float, seed: int) -> Split:
        """Training and held-out indices."""
        return split(self.records, val_fraction, seed)

    def fingerprint(self) -> str:
        """Changes when an image, their order or their size changes."""
        return hashlib.sha256(f"{type(self).__name__} {self.size} {self.records.digest()}".encode()).hexdigest()


class Carried(Images):
    """Images that the package carries; their split goes by position, as their number never changes."""

    report = Report("the package")

    def split(self, val_fraction: float, seed: int) -> Split:
        return split_by_position(len(self), val_fraction, seed)


class EmojiImages(Carried):
    """1,911 Noto Emoji (Apache-2.0) on white, 64 px; label "category/subcategory", text the Unicode name."""

    def __init__(self, size: int = 64) -> None:
        entries = [json.loads(line) for line in (ASSETS / "emoji.jsonl").read_text(encoding="utf-8").splitlines()]
        self.size = size
        self.records = Records(Record(e["char"], f"{e['category']}/{e['subcategory']}", e["name"]) for e in entries)

    def pixels(self, index: int, draw: int = 0) -> Tensor:
        row, column = divmod(index, _emoji_sheet().width // 64)
        tile = _emoji_sheet().crop((column * 64, row * 64, column * 64 + 64, row * 64 + 64))
        return as_tensor(tile if self.size == 64 else tile.resize((self.size, self.size), Image.Resampling.LANCZOS))


@cache
def _emoji_sheet() -> Image.Image:
    return Image.open(ASSETS / "emoji.webp").convert("RGB")


class DigitImages(Carried):
    """1,797 handwritten digits of the UCI set, 8x8 scans shown larger (bicubic), white on black; label "0".."9"."""

    def __init__(self, size: int = 32) -> None:
        sheet = np.asarray(Image.open(ASSETS / "digits.png")).reshape(-1, 8, 9)
        self.size, self.scans = size, sheet[:, :, :8]
        self.records = Records(Record(f"{i:04d}", str(label), f"the digit {label}") for i, label in enumerate(sheet[:, 0, 8]))

    def pixels(self, index: int, draw: int = 0) -> Tensor:
        image = Image.fromarray(self.scans[index]).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return as_tensor(image.convert("RGB"))


class SourceImages(Images):
    """The images of any path, resized to cover size x size and cut to it; see open_source and rule_of.

    crop: what is left of a longer side, the centre or a random part; none: images keep about their shape.
    maps: a folder with a map (PNG) for each image.
    """

    def __init__(
        self, path: str, size: int, channels: int | None = None, window: Window | None = None, maps: str | None = None,
        crop: Crop = "centre", resize: Resize = "area", depth: Depth = "slices", own: Path | None = None,
    ) -> None:  # fmt: skip
        self.source = open_source(path, own, depth)
        self.rule = rule_of(self.source, channels, window, resize)
        self.size, self.channels, self.window, self.crop = size, self.rule.channels, window, crop
        self.values, self.records, self.report, self.runs = self.rule.values, self.source.records, self.source.report, self.source.runs
        self.maps = None if maps is None else Path(maps).expanduser()
        self.has_maps = maps is not None
        if self.maps is not None:
            missing = [path for path in map(self._map_path, range(len(self))) if not path.is_file()]
            if missing:
                raise UserError(f"{len(missing)} of {len(self)} images have no map in data.maps; the first that is missing is {missing[0]}")

    def pixels(self, index: int, draw: int = 0) -> Tensor:
        return self.rule.pixels(self.source.read(index), self.name(index), self.shape(index), self._centre(draw))

    def use_buckets(self, multiple: int) -> None:
        if self.crop == "none" and self.bucket_of is None:
            self.buckets = bucket_sizes(self.size, multiple)
            shapes = np.array([self.rule.shape(self.source.read(i), self.name(i)) for i in range(len(self))], float)
            ratios = np.array([height / width for height, width in self.buckets])
            self.bucket_of = np.abs(np.log(shapes[:, :1] / shapes[:, 1:]) - np.log(ratios)).argmin(1).astype(np.int16)

    def _centre(self, draw: int) -> tuple[float, float]:
        """(x, y) of what is left, in shares of what is cut off."""
        if self.crop != "random" or draw == 0:
            return 0.5, 0.5
        across, down = np.random.default_rng(draw).random(2).tolist()
        return across, down

    @cached_property
    def deep_maps(self) -> bool:
        """Whether maps have 16 bits: those of one set all have, or none, by the headers of a few."""
        kinds = set[str]()
        for path in map(self._map_path, evenly(len(self), 20)):
            with opened(path, header_only=True) as image:
                kinds.add(kind_of(image))
        return kinds != {"8"}

    def _map_path(self, index: int) -> Path:
        assert self.maps is not None
        return self.maps / Path(self.name(index)).with_suffix(".png")

    def map(self, index: int, draw: int = 0) -> Tensor:
        with opened(path := self._map_path(index)) as image, naming(path):
            if not self.deep_maps:
                return as_tensor(fitted(upright(image).convert("RGB"), self.shape(index), "nearest", self._centre(draw)))
            grey = shares(upright(image), DEEP) if kind_of(image) != "8" else np.asarray(upright(image).convert("L")) / 255
            found = np.asarray(fitted(Image.fromarray(grey.astype(np.float32)), self.shape(index), "nearest", self._centre(draw)))
            return torch.from_numpy(np.round(found * 65535).astype(np.uint16))[None].expand(3, -1, -1)

    def split(self, val_fraction: float, seed: int) -> Split:
        return super().split(val_fraction, seed) if self.source.held_out is None else given_split(self.source.held_out)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint()} {self.size} {self.rule} {self.crop}".encode()).hexdigest()


class Subset(Images):
    """The images at some indices of others."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.size, self.channels, self.values = images, images.size, images.channels, images.values
        self.records, self.indices = Records(images.records[i] for i in indices), list(indices)

    def pixels(self, index: int, draw: int = 0) -> Tensor:
        return self.images.pixels(self.indices[index], draw)


def bucket_sizes(size: int, multiple: int) -> list[tuple[int, int]]:
    """Heights and widths in multiples of so many px, of about size x size px and of a ratio of at most 1:2; the square is the first.

    NovelAI's aspect-ratio buckets.
    """
    if size % multiple:
        raise UserError(
            f"data.size is {size}; with --data.crop none allowed are multiples of {multiple}, such as {max(1, size // multiple) * multiple}"
        )
    sizes = {(size, size): None}
    for height in range(multiple, 2 * size, multiple):
        width = size * size // height // multiple * multiple
        if width and max(height, width) <= 2 * min(height, width):
            sizes |= {(height, width): None, (width, height): None}
    return list(sizes)


CARRIED: dict[str, type[EmojiImages] | type[DigitImages]] = {"emoji": EmojiImages, "digits": DigitImages}


def open_images(path: str, size: int, channels: int | None = None) -> Images:
    """The images of any path, or what the package carries under a name; of a folder that `ldm sample` wrote its pictures."""
    if path in CARRIED and not Path(path).is_dir():
        return CARRIED[path](size)
    if path in CARRIED:
        warnings.warn(f"{path!r} is taken for the folder of that name here, not for what the package carries", stacklevel=2)
    return SourceImages(path, size, channels)
