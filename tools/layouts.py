"""Layouts of data that people have, and what each is opened as: the table of docs/data.md.

    python tools/layouts.py FOLDER     # builds all of them there
    python tools/layouts.py --table    # the table, as docs/data.md has it

The colour or the value of a picture encodes its number, from which class and caption follow: mix-ups show.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layouts_builders import BUILDERS
from layouts_files import number_of

from ldm.data.images import Images, SourceImages
from ldm.data.sources.source import Source
from ldm.errors import UserError
from ldm.ranges import to_float

SHOWN = 4  # classes
LONGEST = 150  # characters of a refusal


@dataclass(frozen=True)
class Layout:
    """One layout: its name as in the table, and what it must be opened as.

    build: writes it into a folder and returns what is given to --data.path.  captions: images with one;
    texts: all captions, where images have several.  split: training and held-out images, where it says.
    unit: of pictures of values, those of number i are i times this.  refused: a part of the sentence.
    """

    name: str
    build: Callable[[Path], str]
    images: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    texts: int = 0
    numbers: tuple[str, ...] = ()
    split: tuple[int, int] | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    rows_without_file: int = 0
    files_without_row: int = 0
    unit: float = 0
    refused: str = ""


LAYOUTS = [Layout(name, build, **expected) for name, build, expected in BUILDERS]


def facts(source: Source) -> dict[str, Any]:
    """What a source says, in the terms of a Layout."""
    records, report, held_out = source.records, source.report, source.held_out
    labels = [record.label for record in records]
    return {
        "images": len(records),
        "classes": {name: labels.count(name) for name in records.names},
        "captions": sum(bool(record.text) for record in records),
        "texts": sum(len(record.texts) for record in records),
        "numbers": tuple(records.numbers),
        "split": None if held_out is None else (int((~held_out).sum()), int(held_out.sum())),
        "left_out": {reason: count.number for reason, count in report.left_out.items()},
        "rows_without_file": report.rows_without_file.number,
        "files_without_row": report.files_without_row.number,
    }


def expected(layout: Layout) -> dict[str, Any]:
    """What `facts` must be."""
    told = asdict(layout)
    told = {name: told[name] for name in told if name not in ("name", "build", "unit", "refused")}
    return told | {"texts": layout.texts or layout.captions}


def number_shown(images: Images, index: int, unit: float) -> int | None:
    """The number of the picture that is read at an index; None where its pixels are of no picture."""
    corner = images.pixels(index)[:, 0, 0]
    if not unit:
        return number_of(corner.tolist())
    low, high = images.values.low, images.values.high
    number = (low + (float(to_float(corner)[0]) + 1) / 2 * (high - low)) / unit
    return round(number) if abs(number - round(number)) < 0.05 else None


def row(layout: Layout, folder: Path) -> str:
    """A line of the table, of how a layout is really opened."""
    path = layout.build(folder)
    given = f"`{path.replace(str(folder), 'PICTURES')}`"
    try:
        images = SourceImages(path, 8)
    except UserError as error:
        sentence = str(error).replace(str(folder), "PICTURES").replace("|", "\\|")
        told = f"refused: {sentence[:LONGEST]}{'…' * (len(sentence) > LONGEST)}"
        return f"| {layout.name} | {given} | | | | | {told} |"
    found = facts(images.source)
    classes = [f"{name} {count}" for name, count in found["classes"].items()]
    shown = ", ".join([*classes[:SHOWN], *["..."] * (len(classes) > SHOWN)])
    captions = str(found["captions"] or "")
    if found["texts"] > found["captions"]:
        captions += f" images, {found['texts']} texts"
    sides = "by name" if found["split"] is None else "{} / {}".format(*found["split"])
    told = [f"{count} {reason}" for reason, count in found["left_out"].items()]
    counted = ("rows_without_file", "files_without_row")
    told += [f"{found[key]} {key.replace('_', ' ')}" for key in counted if found[key]]
    told += [note.replace(str(folder), "PICTURES") for note in images.report.notes]
    cells = (layout.name, given, found["images"], shown, captions, sides, "; ".join(told))
    return f"| {' | '.join(map(str, cells))} |"


def table(folder: Path) -> str:
    """The table of docs/data.md; folder: where the layouts are built."""
    columns = ("what lies there", "given to --data.path", "images", "classes", "captions", "split", "told")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for number, layout in enumerate(LAYOUTS):
        (own := folder / f"{number:02d}").mkdir(parents=True)
        lines.append(row(layout, own))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            print(table(Path(folder)))
    elif arguments.folder is None:
        parser.error("give a folder, or --table")
    else:
        for number, layout in enumerate(LAYOUTS):
            (folder := arguments.folder / f"{number:02d}").mkdir(parents=True)
            print(json.dumps([layout.name, layout.build(folder)], ensure_ascii=False))


if __name__ == "__main__":
    main()
