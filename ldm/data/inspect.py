"""A look at every image of a set: sizes, modes, values, damage, duplicates."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from ldm.data.batches import Keyed
from ldm.data.decode import naming, opened
from ldm.data.images import SourceImages
from ldm.data.modes import as_rgb, deep_values, kind_of
from ldm.data.report import sentences
from ldm.data.split import evenly
from ldm.data.transforms import as_image
from ldm.errors import UserError
from ldm.ranges import to_float, to_uint8

SHOWN = 100  # images of a contact sheet
HASHED = 8  # bits across and down of the hash that near duplicates share


@dataclass(frozen=True)
class Look:
    """What one image is."""

    width: int
    height: int
    mode: str  # as Pillow calls it; of arrays the type of their values
    low: float  # least and greatest value
    high: float
    digest: bytes  # of the file
    likeness: int  # of how it looks: 0 of one that is all of one colour


def look(images: SourceImages, index: int) -> Look:
    """Decode one image.  UserError where it cannot be read."""
    item, name = images.source.read(index), images.name(index)
    if isinstance(item, np.ndarray):
        shown = as_image(to_uint8(to_float(images.pixels(index)))).convert("L")  # refused where it is not finite
        low, high = float(item.min()), float(item.max())
        return Look(item.shape[2], item.shape[1], str(item.dtype), low, high, _digest(item.tobytes()), _likeness(shown))
    path = item if isinstance(item, Path) else Path(name)
    with naming(path):
        content = item.read_bytes() if isinstance(item, Path) else item
    height, width = images.rule.shape(content, name)
    with opened(content, name=path, at_least=(64, 64)) as image, naming(path):
        values = deep_values(image) if kind_of(image) != "8" else np.asarray(image.convert("RGB"))
        low, high = float(values.min()), float(values.max())
        return Look(
            width, height, image.mode, low, high, _digest(content), _likeness(as_rgb(image, window=images.rule.ranges).convert("L"))
        )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _likeness(grey: Image.Image) -> int:
    """Whether each of 8 x 8 parts is brighter than its neighbour, as a number (the difference hash of Krawetz)."""
    small = np.asarray(grey.resize((HASHED + 1, HASHED), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def inspect(
    path: str, size: int = 64, val_fraction: float = 0.1, split_seed: int = 0, tokens: Callable[[str], int] | None = None,
    max_tokens: int = 24, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a path holds, as plain values; every image is decoded.

    tokens: counts those of a caption, of which max_tokens are not cut; without it words are counted.
    options: those of SourceImages.  UserError where nothing is recognised.
    """
    images = SourceImages(path, size, **options)
    train, held_out = (Keyed(images, part) for part in images.split(val_fraction, split_seed))
    looks, damaged = _looks(images)
    report, records = images.report, images.records
    counts = np.bincount(records.labels + 1, minlength=len(records.names) + 1).tolist()
    return {
        "path": path,
        "what": report.what,
        "images": len(images),
        "train": len(train),
        "held_out": len(held_out),
        "classes": dict(zip(records.names, counts[1:], strict=True)),
        "captions": int((np.diff(records.first_text) > 0).sum()),
        "texts": _texts(records.texts, tokens, max_tokens),
        "numbers": {name: [float(np.nanmin(x)), float(np.nanmax(x))] for name, x in records.numbers.items()},
        "channels": images.channels,
        "bits": images.values.bits,
        "modes": dict(Counter(each.mode for each in looks.values()).most_common()),
        "values": _spread([each.low for each in looks.values()] + [each.high for each in looks.values()]),
        "left_out": {reason: count.number for reason, count in report.left_out.items()},
        "rows_without_file": report.rows_without_file.number,
        "files_without_row": report.files_without_row.number,
        "damaged": damaged,
        "range_used": _range_used(looks.values()),
        "duplicates": _duplicates(images, looks, set(held_out.indices.tolist())),
        "sizes": {
            "width": _spread([each.width for each in looks.values()]),
            "height": _spread([each.height for each in looks.values()]),
            "aspect": _spread([round(each.width / each.height, 3) for each in looks.values()]),
        },
        "sentences": sentences(train, held_out),
    }


def _looks(images: SourceImages) -> tuple[dict[int, Look], dict[str, str]]:
    """What each image is, and what is wrong with those that cannot be read."""
    found, damaged = dict[int, Look](), dict[str, str]()

    def one(index: int) -> Look | UserError:
        try:
            return look(images, index)
        except UserError as error:
            return error

    with ThreadPoolExecutor(1 if images.runs else min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(one, range(len(images)))
        for index, result in enumerate(tqdm(results, total=len(images), desc="Inspecting", unit="img", leave=False)):
            if isinstance(result, Look):
                found[index] = result
            else:
                damaged[images.name(index)] = str(result)
    return found, damaged


def _spread(values: Iterable[float]) -> dict[str, float]:
    """Least, median and greatest."""
    known = np.array([value for value in values if np.isfinite(value)])
    return dict(zip(("least", "median", "greatest"), np.quantile(known, [0, 0.5, 1]).tolist(), strict=True)) if len(known) else {}


def _texts(texts: Iterable[str], tokens: Callable[[str], int] | None, most: int) -> dict[str, Any]:
    """How many captions there are, and how long they are."""
    lengths = [len(text.split()) if tokens is None else tokens(text) for text in texts]
    cut = {"cut": sum(length > most for length in lengths)} if tokens else {}
    return {"number": len(lengths), "counted": "tokens" if tokens else "words", **_spread(lengths), **cut}


def _range_used(looks: Iterable[Look]) -> float | None:
    """Share of the range of their bits that pictures use; None of floats and arrays, whose range is what they use."""
    known = [
        (each.low, each.high, 65535 if each.mode.startswith("I") else 255)
        for each in looks
        if not each.mode.startswith(("F", "float", "int", "uint"))
    ]
    if not known:
        return None
    return (max(high for _, high, _ in known) - min(low for low, _, _ in known)) / max(white for *_, white in known)


def _duplicates(images: SourceImages, looks: dict[int, Look], held_out: set[int]) -> dict[str, Any]:
    """Images whose files are equal, and whose hashes of how they look are; the first of each kind is no duplicate.

    across: how many of them are in training where the first is held out, or the other way round.
    """
    exact, near = dict[bytes, int](), dict[int, int]()
    found: dict[str, Any] = {"exact": 0, "near": 0, "across": 0, "examples": []}
    for index, each in looks.items():
        kind, first = "exact", exact.setdefault(each.digest, index)
        if first == index and each.likeness:
            kind, first = "near", near.setdefault(each.likeness, index)
        if first != index:
            found[kind] += 1
            found["across"] += (first in held_out) != (index in held_out)
            if len(found["examples"]) < 10:
                found["examples"].append([images.name(first), images.name(index), kind])
    return found


def contact_sheet(path: str, side: int = 96, **options: Any) -> Image.Image:
    """Up to SHOWN images, evenly chosen, as a model sees them, each above its class and its caption."""
    images = SourceImages(path, side, **options)
    chosen = evenly(len(images), SHOWN)
    columns, words = min(10, len(chosen)), 14 * (bool(images.names) + images.records.has_texts)
    cell = (side + 6, side + words + 6)
    sheet = Image.new("RGB", (columns * cell[0] + 6, -(-len(chosen) // columns) * cell[1] + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        x, y = 6 + place % columns * cell[0], 6 + place // columns * cell[1]
        record = images.records[index]
        try:
            sheet.paste(_shown(images, index), (x, y))
        except UserError:
            draw.text((x + 4, y + side // 2), "damaged", fill="red")
        told = [record.label or "-"] * bool(images.names) + [record.text or "-"] * images.records.has_texts
        for line, text in enumerate(told):
            draw.text((x, y + side + 1 + 14 * line), text[: side // 6].encode("ascii", "replace"), fill="black")
    return sheet


def _shown(images: SourceImages, index: int) -> Image.Image:
    return as_image(to_uint8(to_float(images.pixels(index)))).convert("RGB")
