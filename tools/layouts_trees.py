"""Layouts of plain folders: classes, splits, captions, tables of metadata, what is left out, what is refused."""

import io
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layouts_files import CLASSES, Build, Content, Entry, colour, files, jsonl, links, named, said, table
from PIL import Image

FLAT = named("{i}.png", range(6))
SIX = named("{c}/{i}.png", range(6))
TWO = {"cat": 3, "dog": 3}
FOUR_EACH = {"cat": 4, "dog": 4}
FIRST, SECOND = range(4), range(4, 8)  # of a split
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


def coco(numbers: range) -> str:
    """Two captions for each image."""
    captions = [{"id": 9 * i + k, "image_id": i, "caption": f"{said(i)}, {k}"} for i in numbers for k in range(2)]
    return json.dumps({"images": [{"id": i, "file_name": f"{i}.png"} for i in numbers], "annotations": captions})


def heic(folder: Path) -> str:
    from pillow_heif import from_pillow

    from_pillow(Image.new("RGB", (16, 16), colour(1))).save(folder / "1.heic", quality=-1)
    return files(["0.jfif"])(folder)


def labels(*values: Any) -> str:
    """A table of file names and labels."""
    return table([["file_name", "label"], *([f"{i}.png", value] for i, value in enumerate(values))])


def edm(count: int, known: bool = True) -> Mapping[str, str]:
    """The dataset.json of StyleGAN and EDM2."""
    return {"dataset.json": json.dumps({"labels": [[f"00000/{i}.png", i % 2] for i in range(count)] if known else None})}


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


FOLDERS: list[Entry] = [
    ("a flat folder", files(FLAT), {"images": 6}),
    ("folders of any depth around all pictures", files(named("a/b/{i}.png", range(6))), {"images": 6, "classes": {"b": 6}}),
    ("class sub-folders", files(SIX), {"images": 6, "classes": TWO}),
    (
        "class sub-folders, deeper folders in them",
        files(named("{c}/x/{i}/{i}.png", range(6))),
        {"images": 6, "classes": TWO},
    ),
    ("class folders that are links", links(CLASSES), {"images": 6, "classes": TWO}),
    ("one class folder of two is a link", links(["cat"]), {"images": 6, "classes": TWO}),
    ("links in a circle", links([], circle=True), {"images": 6, "classes": TWO, "left_out": {"link in a circle": 1}}),
    (
        "train/CLASS, val/CLASS (ImageNet)",
        files(named("train/{c}/{i}.png", FIRST) + named("val/{c}/{i}.png", SECOND)),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4)},
    ),
    (
        "train/CLASS, test/CLASS (torchvision)",
        files(named("train/{c}/{i}.png", FIRST) + named("test/{c}/{i}.png", SECOND)),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4)},
    ),
    (
        "train, validation, test/CLASS (Hugging Face)",
        files(named("train/{c}/{i}.png", FIRST) + named("validation/{c}/{i}.png", SECOND) + named("test/{c}/{i}.png", (8, 9))),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4), "left_out": {"test, as val is held out": 2}},
    ),
    (
        "CLASS/train, CLASS/test",
        files(named("{c}/train/{i}.png", FIRST) + named("{c}/test/{i}.png", SECOND)),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4)},
    ),
    (
        "train and val without classes",
        files(named("train/{i}.png", FIRST) + named("val/{i}.png", SECOND)),
        {"images": 8, "split": (4, 4)},
    ),
    (
        "digits as class folders: 0 to 10",
        files([f"{i % 11}/{i}.png" for i in range(22)]),
        {"images": 22, "classes": {str(c): 2 for c in range(11)}},
    ),
    (
        "COCO: train2017, val2017, annotations/",
        files(
            named("train2017/{i}.png", FIRST) + named("val2017/{i}.png", SECOND),
            {
                "annotations/captions_train2017.json": coco(FIRST),
                "annotations/captions_val2017.json": coco(SECOND),
            },
        ),
        {"images": 8, "captions": 8, "texts": 16, "split": (4, 4)},
    ),
    (
        "captions in .txt beside (kohya)",
        files(FLAT, {f"{i}.txt": said(i) for i in range(6)}),
        {"images": 6, "captions": 6},
    ),
    (
        "captions in .caption beside, class folders",
        files(SIX, {"cat/0.caption": said(0)}),
        {"images": 6, "classes": TWO, "captions": 1},
    ),
    ("dataset.json (StyleGAN, EDM2)", files(named("00000/{i}.png", range(4)), edm(4)), {"images": 4, "classes": {"0": 2, "1": 2}}),
    ("dataset.json with labels null", files(named("00000/{i}.png", range(4)), edm(4, known=False)), {"images": 4}),
]

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
        metadata('{"file_name": "1.png", "label": NaN, "text": NaN}\n' + jsonl(OBJECTS[0]), "metadata.jsonl", 2),
        {"images": 2, "classes": {"cat": 1}, "captions": 1},
    ),
    (
        "a column `prompt`",
        metadata(table([["file_name", "prompt"], *([row[0], row[2]] for row in COLUMNS[1:])])),
        {"images": 6, "captions": 6},
    ),
    (
        "a column `caption` with lists",
        metadata(jsonl(*({"file_name": f"{i}.png", "caption": [said(i), f"number {i}"]} for i in range(2))), "metadata.jsonl", 2),
        {"images": 2, "captions": 2, "texts": 4},
    ),
    (
        "several rows for an image (Flickr30k)",
        metadata(
            table([["image_name", "comment"], *([f"{i}.png", f"{said(i)}, {k}"] for i in range(2) for k in range(5))]),
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
        metadata(jsonl(*({**row, "file_name": "train/" * (i < 3) + f"{i}.png"} for i, row in enumerate(OBJECTS))), "metadata.jsonl"),
        {"images": 6, "classes": {"cat": 1, "dog": 2}, "captions": 3, "rows_without_file": 3, "files_without_row": 3},
    ),
    (
        "lists and objects as attributes",
        metadata(jsonl({"file_name": "0.png", "tags": ["a"], "bbox": {"x": 1}}, {"file_name": "1.png", "age": 3}), "metadata.jsonl", 2),
        {"images": 2, "numbers": ("age",)},
    ),
    (
        "a text of 200,000 characters",
        metadata(table([["file_name", "text"], ["0.png", said(0) + "!" * 200_000]]), count=1),
        {"images": 1, "captions": 1},
    ),
    ("no row names a file", files(["8.png", "9.png"], {"metadata.jsonl": jsonl(*OBJECTS)}), {"refused": "none of the 6 rows"}),
    (
        "a comma without quotes",
        metadata("file_name,text\n0.png,a cat, sitting\n"),
        {"refused": "line 2: 3 values for 2 columns"},
    ),
    (
        "Infinity as a number",
        metadata('{"file_name": "0.png", "age": Infinity}\n', "metadata.jsonl"),
        {"refused": "metadata.jsonl, line 1: age is inf"},
    ),
    ("broken JSON", metadata('{"file_name": "0.png"\n', "metadata.jsonl"), {"refused": "metadata.jsonl cannot be read"}),
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
        metadata(table([["path", "label"], *(row[:2] for row in COLUMNS[1:]), ["gone.png", "cat"]]), "list.csv", give="list.csv"),
        {"images": 6, "classes": TWO, "rows_without_file": 1},
    ),
    ("a TSV of paths, labels and texts", metadata(table(COLUMNS, "\t"), "list.tsv", give="list.tsv"), LABELLED),
    ("a JSONL of paths, labels and texts", metadata(jsonl(*OBJECTS), "list.jsonl", give="list.jsonl"), LABELLED),
]

UNWANTED: list[Entry] = [
    (
        "hidden and system files",
        files(
            [*SIX, ".60.png", "cat/._0.png", "cat/.ipynb_checkpoints/0.png", "@eaDir/0.png", "__MACOSX/cat/._0.png"],
            {"cat/Thumbs.db": "x", ".DS_Store": "x"},
        ),
        {"images": 6, "classes": TWO, "left_out": {"hidden": 7}},
    ),
    (
        "other files beside",
        files(FLAT[:2], {"a.mp4": "x", "b.xcf": "x", "README": "x"}),
        {"images": 2, "left_out": {".mp4": 1, ".xcf": 1, "files without a suffix": 1}},
    ),
    (
        "a run of ours in it",
        files(
            [*FLAT[:2], "run/autoencoder/pictures/60.png"],
            {f"run/autoencoder/{name}": "x" for name in ("checkpoints/last.ckpt", "model/config.yaml", "model/model.safetensors")},
        ),
        {"images": 2, "left_out": {"folder of a run": 1}},
    ),
    (
        "pictures of `ldm sample`",
        files(
            [*FLAT[:2], "60.png"],
            {"manifest.jsonl": jsonl(*({"file": f"{i}.png", "seed": 0, "model_sha256": "00"} for i in range(2)))},
        ),
        {"images": 2, "left_out": {"not in manifest.jsonl": 1}},
    ),
    ("HEIC and JFIF", heic, {"images": 2}),
]

REFUSED: list[Entry] = [
    ("an empty folder", files([]), {"refused": "no images in"}),
    ("films only", files([], {"a.mp4": "x"}), {"refused": "use -c data/clips.yaml"}),
    ("one picture", files(["0.png"], give="0.png"), {"refused": "is one picture"}),
    ("a text file that lists nothing", files([], {"notes.txt": "hello"}, "notes.txt"), {"refused": "none of the 1 files"}),
    ("a path that is not there", files([], give="gone"), {"refused": "there is no file or folder"}),
    ("a URL", lambda folder: "https://example.org/photos.zip", {"refused": "download it first"}),
    ("the name of a data set of the hub", lambda folder: "user/flowers", {"refused": "download it first"}),
]
