"""Layouts of data that people have, and what each is opened as: the table of docs/data.md.

    python tools/layouts.py FOLDER     # builds all of them there
    python tools/layouts.py --table    # the table, as docs/data.md has it

Picture number i is of the colour `colour(i)`, so that a picture with somebody else's label shows.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from layouts_builders import BUILDERS

from ldm.data.images import SourceImages
from ldm.data.sources.source import Source
from ldm.errors import UserError


@dataclass(frozen=True)
class Layout:
    """One layout; `build(folder)` returns what is given to --data.path."""

    name: str
    build: Callable[[Path], str]
    images: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    split: tuple[int, int] | None = None  # training and held-out images, where the layout says
    left_out: dict[str, int] = field(default_factory=dict)
    rows_without_file: int = 0
    files_without_row: int = 0
    refused: str = ""  # a part of the sentence


def layouts() -> list[Layout]:
    """All layouts, in the order of the table."""
    return [Layout(name, build, **expected) for name, build, expected in BUILDERS]


def opened(layout: Layout, folder: Path) -> SourceImages:
    """A layout, built and opened."""
    folder.mkdir(parents=True, exist_ok=True)
    return SourceImages(layout.build(folder), 8)


def facts(source: Source) -> dict[str, object]:
    """What a source says, in the terms of a Layout."""
    records, report, held_out = source.records, source.report, source.held_out
    labels = [record.label for record in records]
    return {
        "images": len(records),
        "classes": {name: labels.count(name) for name in records.names},
        "captions": sum(bool(record.text) for record in records),
        "split": None if held_out is None else (int((~held_out).sum()), int(held_out.sum())),
        "left_out": {reason: count.number for reason, count in report.left_out.items()},
        "rows_without_file": report.rows_without_file.number,
        "files_without_row": report.files_without_row.number,
    }


def row(layout: Layout, folder: Path) -> str:
    """A line of the table, of what is really opened."""
    try:
        images = opened(layout, folder)
    except UserError as error:
        told = str(error).replace(str(folder), "…").replace("|", "\\|")
        return f"| {layout.name} | | | | | refused: {told[:150]}{'…' * (len(told) > 150)} |"
    found = facts(images.source)
    classes = ", ".join(f"{name} {count}" for name, count in list(found["classes"].items())[:4])  # type: ignore[attr-defined]
    classes += ", ..." * (len(found["classes"]) > 4)  # type: ignore[arg-type]
    split = found["split"]
    told = [f"{count} {reason}" for reason, count in found["left_out"].items()]  # type: ignore[attr-defined]
    told += [f"{found[key]} {key.replace('_', ' ')}" for key in ("rows_without_file", "files_without_row") if found[key]]
    told += [note.replace(str(folder), "…") for note in images.report.notes]
    sides = "by name" if split is None else f"{split[0]} / {split[1]}"  # type: ignore[index]
    return f"| {layout.name} | {found['images']} | {classes} | {found['captions'] or ''} | {sides} | {'; '.join(told)} |"


def table() -> str:
    """The table of docs/data.md."""
    lines = ["| what lies there | images | classes | captions | split | told |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        lines += [row(layout, Path(folder) / str(number)) for number, layout in enumerate(layouts())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
    elif arguments.folder is None:
        parser.error("give a folder, or --table")
    else:
        for number, layout in enumerate(layouts()):
            folder = arguments.folder / f"{number:02d}"
            folder.mkdir(parents=True)
            print(json.dumps([layout.name, layout.build(folder)], ensure_ascii=False))


if __name__ == "__main__":
    main()
