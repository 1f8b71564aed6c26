"""Pixels of a set of images: one rule for all of them, of what their values mean and how they get their size."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.decode import naming, opened
from ldm.data.modes import Ranges, Window, as_tensor, converted, deep_values, kind_of, orientation, shares, upright
from ldm.data.sources.source import Item, Source
from ldm.errors import UserError
from ldm.ranges import ValueRange

Resize = Literal["area", "lanczos", "nearest"]
FILTERS = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
HEADERS = 20_000  # pictures whose headers are read to find out what their values are
MEASURED = 2_000  # images whose values are read to find out their range
LOOKED_AT = 20  # images whose values are read to find out how much of their range they use
FEW = 0.1  # of their range
SLACK = 0.05  # of a usual range, by which values may lie beyond it
ALWAYS_8 = {".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp"}
USUAL = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 65535.0))  # ranges of floats and of 32 bits


@dataclass(frozen=True)
class PixelRule:
    """How the stored images of a set become pixels.

    ranges: black and white of each kind of pictures.  values: what black and white are in the units of the data.
    of_values: images are arrays of values, not pictures.  resize: `area` is the mean over what a pixel covers, Lanczos where
    it covers less.
    """

    channels: int = 3
    ranges: Ranges = field(default_factory=dict)
    values: ValueRange = ValueRange()  # noqa: RUF009  frozen
    resize: Resize = "area"
    of_values: bool = False

    @property
    def deep(self) -> bool:
        """Whether pixels have 16 bits."""
        return not self.values.is_default and self.channels == 1

    def pixels(self, item: Item, name: str, size: tuple[int, int], centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
        """An image resized to cover size (height, width) and cut to it: uint8 (C,H,W), uint16 where `deep`, or of arrays
        float32 in [-1, 1].  centre: of what is left, in shares of what is cut off.  UserError where it cannot be read."""
        is_picture = not isinstance(item, np.ndarray) or (item.dtype == np.uint8 and len(item) in (1, 3, 4))
        if is_picture == self.of_values:
            kinds = ("arrays of values", "pictures") if self.of_values else ("pictures", "arrays of values")
            raise UserError(f"{name!r} cannot be read: the set is one of {kinds[0]}, not of {kinds[1]}; take it away")
        if isinstance(item, np.ndarray):
            if self.of_values:
                with naming(Path(name)):
                    return self._of_array(item, size, centre)
            return self._of_picture(
                Image.fromarray(item.transpose(1, 2, 0).squeeze(2) if len(item) == 1 else item.transpose(1, 2, 0)), size, centre
            )
        path = item if isinstance(item, Path) else Path(name)
        with opened(item, name=path, at_least=size if self.resize == "area" else None) as image, naming(path):
            return self._of_picture(image, size, centre)

    def shape(self, item: Item, name: str) -> tuple[int, int]:
        """Height and width of an image as it is stored, upright, by its header; a square's where it cannot be read."""
        if isinstance(item, np.ndarray):
            return item.shape[1], item.shape[2]
        try:
            with opened(item, header_only=True, name=item if isinstance(item, Path) else Path(name)) as image:
                return (image.height, image.width) if orientation(image) < 5 else (image.width, image.height)
        except UserError:  # which the loader will name
            return 1, 1

    def _of_picture(self, image: Image.Image, size: tuple[int, int], centre: tuple[float, float]) -> Tensor:
        if not self.deep:
            return as_tensor(fitted(converted(image, self.channels, self.ranges), size, self.resize, centre))
        if kind_of(image) == "8":
            grey = np.asarray(converted(image, 1), np.float32) / 255
        else:
            grey = shares(upright(image), self.ranges).astype(np.float32)
        found = np.asarray(fitted(Image.fromarray(grey), size, self.resize, centre))
        return torch.from_numpy(np.round(np.clip(found, 0, 1) * 65535).astype(np.uint16))[None]

    def _of_array(self, array: np.ndarray, size: tuple[int, int], centre: tuple[float, float]) -> Tensor:
        x = torch.from_numpy(np.array(array, np.float64))
        if len(x) != self.channels:
            raise ValueError(f"it has {len(x)} channels, the others have {self.channels}")
        if not x.isfinite().all():
            raise ValueError("it has values that are not finite numbers")
        x = ((x - self.values.low) / (self.values.high - self.values.low)).clamp(0, 1)
        x = _fitted_array(x, size, self.resize, centre)
        return (x * 2 - 1).float() if self.values.is_array else (x * 65535).round().to(torch.uint16)


def fitted(image: Image.Image, size: tuple[int, int], resize: Resize = "area", centre: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """An image resized to cover size (height, width) and cut to it; centre: (x, y) of what is left."""
    if image.size == size[::-1]:
        return image
    larger = image.height < size[0] or image.width < size[1]
    return ImageOps.fit(image, size[::-1], FILTERS["lanczos" if larger and resize == "area" else resize], centering=centre)


def _fitted_array(x: Tensor, size: tuple[int, int], resize: Resize, centre: tuple[float, float]) -> Tensor:
    scale = max(size[0] / x.shape[1], size[1] / x.shape[2])
    shape = [max(target, round(side * scale)) for target, side in zip(size, x.shape[1:], strict=True)]
    if shape != list(x.shape[1:]):
        options: dict[str, object] = {"mode": "nearest-exact"} if resize == "nearest" else {"mode": "bilinear", "antialias": True}
        x = F.interpolate(x[None], shape, **options)[0]  # type: ignore[arg-type]
    top, left = (round((have - target) * share) for have, target, share in zip(shape, size, centre[::-1], strict=True))
    return x[:, top : top + size[0], left : left + size[1]]


def rule_of(source: Source, channels: int | None = None, window: Window | None = None, resize: Resize = "area") -> PixelRule:
    """The rule of a set, by the headers of its pictures and by what is measured; sentences on it go into its report.

    channels: None for 3 of pictures, and as many as arrays have.  window: values of more than 8 bits, of floats and of
    arrays that become black and white.
    """
    if window is not None and not window[0] < window[1]:
        raise UserError(f"data.window is {list(window)}; give the value that becomes black, then a greater one that becomes white")
    first = next((item for _, item in _some(source, LOOKED_AT)), None)
    if isinstance(first, np.ndarray):
        return _array_rule(source, first, channels, window, resize)
    kinds = Counter(kind for _, kind in _kinds(source))
    deep = {kind: count for kind, count in kinds.items() if kind != "8"}
    ranges = {kind: window or ((0.0, 65535.0) if kind == "16" else _measured(source, kind)) for kind in deep}
    ranges.setdefault("16", window or (0.0, 65535.0))  # which the headers of a sample may have missed
    values = ValueRange()
    if deep and channels == 1:
        kind = max(deep, key=lambda kind: deep[kind])
        values = ValueRange(*ranges[kind], {"16": "uint16", "32": "int32", "F": "float32"}[kind])
    elif deep:
        source.report.notes.append(
            f"{sum(deep.values()):,} of {sum(kinds.values()):,} images have more than 8 bits and are read as 8: "
            "--data.channels 1 keeps more of grey ones"
        )
    if window is None and deep:
        _tell_little_used(source, ranges)
    elif window is not None and not deep:
        source.report.notes.append("data.window has no effect: all pictures have 8 bits")
    return PixelRule(channels or 3, ranges, values, resize)


def _array_rule(source: Source, first: np.ndarray, channels: int | None, window: Window | None, resize: Resize) -> PixelRule:
    """Of arrays and of slices of volumes, which hold values and no pictures."""
    stored, is_array = first.dtype, source.is_array
    if stored == np.uint8 and len(first) in (1, 3, 4):
        return PixelRule(channels or len(first), resize=resize)
    if channels not in (None, len(first)):
        raise UserError(f"data.channels is {channels}, the arrays have {len(first)}: leave it out, or give {len(first)}")
    given = window or source.window
    if stored.kind == "u" and given is None and stored.itemsize <= 2:
        given = (0.0, float(np.iinfo(stored).max))
    low, high = given or _measured(source, "array")
    kind = str(stored) if is_array or stored.kind == "f" else "uint16" if low >= 0 and high <= 65535 else "int16"
    if window is None:
        _tell_little_used(source, {"array": (low, high)})
    return PixelRule(len(first), {}, ValueRange(low, high, kind, is_array, source.depth), resize, of_values=True)


def _some(source: Source, most: int) -> Iterator[tuple[int, Item]]:
    """At most so many images, evenly chosen; where they are read in runs, of the first ones.  What cannot be read is left out."""
    count = len(source.records)
    places = range(min(count, most)) if source.runs else np.linspace(0, count - 1, min(count, most)).astype(int).tolist()
    for index in dict.fromkeys(places):
        try:
            yield index, source.read(index)
        except UserError:  # which the loader will name
            continue


def _kinds(source: Source) -> Iterator[tuple[int, str]]:
    """What the values of pictures are, by the headers of at most HEADERS of them."""
    for index, item in _some(source, HEADERS):
        if isinstance(item, Path) and item.suffix.lower() in ALWAYS_8:
            yield index, "8"
        elif not isinstance(item, np.ndarray):
            try:
                with opened(item, header_only=True, name=Path(source.name(index))) as image:
                    yield index, kind_of(image)
            except UserError:  # which the loader will name
                continue


def _values(source: Source, kind: str, most: int) -> Iterator[np.ndarray]:
    """The values of images of a kind, of at most so many."""
    for index, item in _some(source, most):
        try:
            if isinstance(item, np.ndarray):
                if np.isfinite(item).all():
                    yield item
            else:
                with opened(item, name=Path(source.name(index))) as image, naming(Path(source.name(index))):
                    if kind_of(image) == kind:
                        yield deep_values(image)
        except UserError:  # which the loader will name
            continue


def _measured(source: Source, kind: str) -> Window:
    """The range of values: a usual one where that fits them, else from the least to the greatest."""
    bounds = [(float(values.min()), float(values.max())) for values in _values(source, kind, MEASURED)]
    if not bounds:
        return 0.0, 1.0
    least, greatest = min(low for low, _ in bounds), max(high for _, high in bounds)
    if not least < greatest:
        return least, least + 1
    low, high = least, greatest
    if kind != "array":  # a picture may be cut off a little, a field may not
        low, high = next((usual for usual in USUAL if _fits(usual, least, greatest)), (least, greatest))
    what = {"32": "32-bit values", "F": "floats"}.get(kind, "values")
    cut = "; others are cut off" if low > least or high < greatest or len(source.records) > len(bounds) else ""
    source.report.notes.append(
        f"{what} from {least:g} to {greatest:g} in {len(bounds)} of {len(source.records)} images: {low:g} is black and "
        f"{high:g} white in all of them{cut} (--data.window)"
    )
    return low, high


def _fits(usual: Window, least: float, greatest: float) -> bool:
    """Whether values lie within a range, or a little beyond it, and use a quarter of it."""
    width = usual[1] - usual[0]
    inside = usual[0] - SLACK * width <= least and greatest <= usual[1] + SLACK * width
    return inside and greatest - least >= width / 4


def _tell_little_used(source: Source, ranges: Mapping[str, Window]) -> None:
    """A sentence where the images use a few percent of their range."""
    for kind, (low, high) in ranges.items():
        bounds = [(float(values.min()), float(values.max())) for values in _values(source, kind, LOOKED_AT)]
        if not bounds:
            continue
        least, greatest = min(low for low, _ in bounds), max(high for _, high in bounds)
        if greatest - least < FEW * (high - low):
            bits = max(1, int(greatest)).bit_length()
            wanted = (0, 2**bits - 1) if least >= 0 and greatest.is_integer() else (least, greatest)
            source.report.notes.append(
                f"the brightest value of {len(bounds)} images is {greatest:,.6g} of {high:,.6g}, so that they are dark: "
                f"give --data.window '[{wanted[0]:g},{wanted[1]:g}]'"
            )
