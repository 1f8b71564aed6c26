"""Numbered pictures, and folders, archives and tables of them, for the layouts of layouts.py."""

import csv
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Build = Callable[[Path], str]  # writes a layout into a folder; returns what is given to --data.path
Entry = tuple[str, Build, dict[str, Any]]  # name, builder, and what it must be opened as
Content = str | bytes
CLASSES = ("cat", "dog")  # of picture i: CLASSES[i % 2]; of K classes the (i % K)-th in order


def colour(number: int) -> tuple[int, int, int]:
    """RGB of picture `number` (0 to 63): JPEG does not mix them up."""
    return 40 + 50 * (number % 4), 40 + 50 * (number // 4 % 4), 40 + 50 * (number // 16 % 4)


def number_of(pixel: Sequence[int]) -> int | None:
    """The picture that an RGB pixel is of; None where it is of none."""
    steps = [round((value - 40) / 50) for value in pixel]
    number = steps[0] + 4 * steps[1] + 16 * steps[2]
    close = max(abs(a - b) for a, b in zip(pixel, colour(number), strict=True)) <= 6
    return number if close else None


def picture(number: int, kind: str = "PNG") -> bytes:
    """A picture file of 16 x 16 px."""
    data = io.BytesIO()
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.new("RGB", (16, 16), colour(number)).save(data, kind, **options)
    return data.getvalue()


def said(number: int) -> str:
    """The caption of a picture."""
    return f"number {number}, a {CLASSES[number % 2]}"


def named(pattern: str, numbers: Iterable[int]) -> list[str]:
    """File names by number; `{c}` is the class, `{i}` the number."""
    return [pattern.format(c=CLASSES[i % 2], i=i) for i in numbers]


FLAT = named("{i}.png", range(6))
SIX = named("{c}/{i}.png", range(6))
TWO = {"cat": 3, "dog": 3}


def contents(names: Iterable[str], others: Mapping[str, Content] = {}) -> dict[str, bytes]:
    """Files by name: pictures, whose number ends the name (`cat/3.png`), and others."""
    found = dict[str, bytes]()
    for name in names:
        number = re.search(r"(\d+)\.\w+$", name)
        assert number is not None, name
        found[name] = picture(int(number[1]), "JPEG" if name.endswith((".jpg", ".jfif")) else "PNG")
    return found | {name: text.encode() if isinstance(text, str) else text for name, text in others.items()}


def files(names: Iterable[str], others: Mapping[str, Content] = {}, give: str = "") -> Build:
    """A folder; give: what below it is given to --data.path."""
    names = list(names)

    def build(folder: Path) -> str:
        for name, content in contents(names, others).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return str(folder / give)

    return build


def zipped(
    names: Iterable[str],
    others: Mapping[str, Content] = {},
    top: str = "",
    name: str = "set.zip",
) -> Build:
    """A zip; top: a folder around all."""
    names = list(names)

    def build(folder: Path) -> str:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, content in contents(names, others).items():
                archive.writestr(top + member, content)
        return str(folder / name)

    return build


def tarred(members: Mapping[str, bytes], name: str = "set.tar") -> Build:
    """A tar, compressed where its name says so."""

    def build(folder: Path) -> str:
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as archive:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return str(folder / name)

    return build


def together(*builds: Build, give: str = "") -> Build:
    """Several in one folder."""

    def build(folder: Path) -> str:
        for each in builds:
            each(folder)
        return str(folder / give)

    return build


def links(linked: Sequence[str], circle: bool = False) -> Build:
    """Class folders of which some are links, and one leads back to the top."""

    def build(folder: Path) -> str:
        files(named("real/{c}/{i}.png", range(6)))(folder)
        (folder / "set").mkdir()
        for name in CLASSES:
            if name in linked:
                (folder / "set" / name).symlink_to(folder / "real" / name)
            else:
                (folder / "real" / name).rename(folder / "set" / name)
        if circle:
            (folder / "set" / "cat" / "round").symlink_to(folder / "set")
        return str(folder / "set")

    return build


def jsonl(*rows: Mapping[str, Any]) -> str:
    """Objects, one a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: Iterable[Iterable[Any]], separator: str = ",") -> str:
    """A table with quotes where they are needed."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
    return text.getvalue()
