"""Layouts of folders with tables of metadata, and lists of files."""

import io
import unicodedata
from math import inf, nan
from pathlib import Path
from typing import Any

from layouts_files import CLASSES, FLAT, SIX, TWO, Build, Content, Entry, files, jsonl, named, said, table

OBJECTS = [{"file_name": f"{i}.png", "label": CLASSES[i % 2], "text": said(i)} for i in range(6)]
COLUMNS = [list(OBJECTS[0]), *(list(row.values()) for row in OBJECTS)]
LABELLED = {"images": 6, "classes": TWO, "captions": 6}


def metadata(content: Content, name: str = "metadata.csv", count: int = 6, give: str = "") -> Build:
    """Pictures without folders, and a table."""
    return files(FLAT[:count] if count <= 6 else named("{i}.png", range(count)), {name: content}, give)


def parquet(folder: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(OBJECTS), data)
    return metadata(data.getvalue(), "metadata.parquet")(folder)


def labels(*values: Any) -> str:
    """A table of file names and labels."""
    return table([["file_name", "label"], *([f"{i}.png", value] for i, value in enumerate(values))])


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


METADATA: list[Entry] = [
    ("metadata.jsonl", metadata(jsonl(*OBJECTS), "metadata.jsonl"), LABELLED),
    (
        "train/metadata.jsonl (Hugging Face)",
        files([f"train/{name}" for name in FLAT], {"train/metadata.jsonl": jsonl(*OBJECTS)}),
        LABELLED,
    ),
    (
        "metadata.jsonl in each of train and validation",
        files(
            named("train/{i}.png", range(3)) + named("validation/{i}.png", range(3, 6)),
            {"train/metadata.jsonl": jsonl(*OBJECTS[:3]), "validation/metadata.jsonl": jsonl(*OBJECTS[3:])},
        ),
        {**LABELLED, "split": (3, 3)},
    ),
    ("metadata.parquet", parquet, LABELLED),
    ("metadata.csv", metadata(table(COLUMNS)), LABELLED),
    ("metadata.csv with `;`", metadata(table(COLUMNS, ";")), LABELLED),
    ("metadata.csv with tabs", metadata(table(COLUMNS, "\t")), LABELLED),
    ("metadata.tsv", metadata(table(COLUMNS, "\t"), "metadata.tsv"), LABELLED),
    ("metadata.csv with spaces after the commas", metadata(table(COLUMNS).replace(",", ", ")), LABELLED),
    ("metadata.csv with a byte order mark", metadata(table(COLUMNS).encode("utf-8-sig")), LABELLED),
    ("metadata.csv in UTF-16", metadata(table(COLUMNS).encode("utf-16")), LABELLED),
    (
        "metadata.csv with texts only, class folders",
        files(SIX, {"metadata.csv": table([["file_name", "text"], ["cat/0.png", said(0)]])}),
        {"images": 6, "classes": TWO, "captions": 1, "files_without_row": 5},
    ),
    (
        "labels.csv with the columns path, class",
        metadata(table([["path", "class"], *(row[:2] for row in COLUMNS[1:])]), "labels.csv"),
        {"images": 6, "classes": TWO},
    ),
    (
        "a column of labels 0 to 11",
        metadata(jsonl(*({"file_name": f"{i}.png", "label": i} for i in range(12))), "metadata.jsonl", 12),
        {"images": 12, "classes": {str(i): 1 for i in range(12)}},
    ),
    (
        "labels as floats and with zeros: 0.0, 1, 00",
        metadata(labels("0.0", "1", "00", "1.0", "0", "01")),
        {"images": 6, "classes": {"0": 3, "1": 3}},
    ),
    (
        "NaN of pandas as label and text",
        metadata(jsonl(OBJECTS[0], {"file_name": "1.png", "label": nan, "text": nan}), "metadata.jsonl", 2),
        {"images": 2, "classes": {"cat": 1}, "captions": 1},
    ),
    (
        "a column `prompt`",
        metadata(table([["file_name", "prompt"], *([row[0], row[2]] for row in COLUMNS[1:])])),
        {"images": 6, "captions": 6},
    ),
    (
        "a column `caption` with lists",
        metadata(
            jsonl(*({"file_name": f"{i}.png", "caption": [said(i), f"number {i}, again"]} for i in range(2))),
            "metadata.jsonl",
            2,
        ),
        {"images": 2, "captions": 2, "texts": 4},
    ),
    (
        "several rows for an image (Flickr30k)",
        metadata(
            table(
                [
                    ["image_name", "comment"],
                    *([f"{i}.png", f"{said(i)}, {k}"] for i in range(2) for k in range(5)),
                ]
            ),
            "results.csv",
            2,
        ),
        {"images": 2, "captions": 2, "texts": 10},
    ),
    (
        "rows with ./ and backslashes, names in NFC and NFD",
        files(
            ["a/0.png", "a/1.png", decomposed("café 2.png"), "ñ 3.png"],
            {
                "metadata.jsonl": jsonl(
                    {"file_name": "./a/0.png", "label": "x"},
                    {"file_name": "a\\1.png", "label": "y"},
                    {"file_name": "café 2.png", "label": "z"},
                    {"file_name": decomposed("ñ 3.png"), "label": "x"},
                )
            },
        ),
        {"images": 4, "classes": {"x": 2, "y": 1, "z": 1}},
    ),
    (
        "half of the rows with a wrong folder",
        metadata(
            jsonl(*({**row, "file_name": "train/" * (i < 3) + f"{i}.png"} for i, row in enumerate(OBJECTS))),
            "metadata.jsonl",
        ),
        {
            "images": 6,
            "classes": {"cat": 1, "dog": 2},
            "captions": 3,
            "rows_without_file": 3,
            "files_without_row": 3,
        },
    ),
    (
        "lists and objects as attributes",
        metadata(
            jsonl({"file_name": "0.png", "tags": ["a"], "bbox": {"x": 1}}, {"file_name": "1.png", "age": 3}),
            "metadata.jsonl",
            2,
        ),
        {"images": 2, "numbers": ("age",)},
    ),
    (
        "texts of 200,000 characters",
        metadata(table([["file_name", "text"], *([f"{i}.png", f"{said(i):200000}!"] for i in range(2))]), count=2),
        {"images": 2, "captions": 2},
    ),
    (
        "no row names a file",
        files(["8.png", "9.png"], {"metadata.jsonl": jsonl(*OBJECTS)}),
        {"refused": "none of the 6 rows"},
    ),
    (
        "a comma without quotes",
        metadata("file_name,text\n0.png,a cat, sitting\n"),
        {"refused": "line 2: 3 values for 2 columns"},
    ),
    (
        "Infinity as a number",
        metadata(jsonl({"file_name": "0.png", "age": inf}), "metadata.jsonl"),
        {"refused": "metadata.jsonl, line 1: age is inf"},
    ),
    (
        "broken JSON",
        metadata('{"file_name": "0.png"\n', "metadata.jsonl"),
        {"refused": "metadata.jsonl, line 1 cannot be read"},
    ),
]

LISTS: list[Entry] = [
    ("a list of paths", files(SIX, {"list.txt": "\n".join(SIX)}, "list.txt"), {"images": 6, "classes": TWO}),
    (
        "a list of paths, classes after a tab",
        files(FLAT, {"list.txt": "".join(f"{i}.png\t{CLASSES[i % 2]}\n" for i in range(6))}, "list.txt"),
        {"images": 6, "classes": TWO},
    ),
    (
        "a CSV of paths and labels",
        metadata(
            table([["path", "label"], *(row[:2] for row in COLUMNS[1:]), ["gone.png", "cat"]]),
            "list.csv",
            give="list.csv",
        ),
        {"images": 6, "classes": TWO, "rows_without_file": 1},
    ),
    (
        "a TSV of paths, labels and texts",
        metadata(table(COLUMNS, "\t"), "list.tsv", give="list.tsv"),
        LABELLED,
    ),
    (
        "a JSONL of paths, labels and texts",
        metadata(jsonl(*OBJECTS), "list.jsonl", give="list.jsonl"),
        LABELLED,
    ),
]
