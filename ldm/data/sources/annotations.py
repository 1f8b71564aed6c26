"""Rows of files that say what images show: metadata.jsonl, .csv, .tsv, .json, .parquet, COCO captions, dataset.json."""

import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ldm.data.sources.source import Count
from ldm.errors import UserError, extra

FILE = ("file_name", "filename", "file", "image", "image_name", "image_path", "path", "filepath", "img", "image_file")
LABEL = ("label", "class", "class_name", "category")
TEXT = ("text", "caption", "captions", "prompt", "description", "sentences", "comment")
TABLES = (".jsonl", ".csv", ".tsv", ".json", ".parquet")


@dataclass
class Row:
    """What a file says of an image."""

    label: str | None = None
    texts: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)


def normal(file: str) -> str:
    """A path as names are compared: with `/`, and without `./` and `//`."""
    parts = file.strip().replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def table(name: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table by column, each with the place where it stands, for messages."""
    if name.endswith(".parquet"):
        parquet = extra("pyarrow.parquet", "parquet", name)
        for number, entry in enumerate(parquet.read_table(io.BytesIO(content)).to_pylist(), 1):
            yield f"{name}, row {number}", entry
        return
    text = decoded(name, content)
    if name.endswith((".csv", ".tsv")):
        yield from _csv(name, text)
        return
    if name.endswith(".json"):
        found = _json(name, content)
        if not isinstance(found, list):
            raise UserError(f"{name} holds no list of objects with a file_name")
        entries = [(f"{name}, row {number}", entry) for number, entry in enumerate(found, 1)]
    else:
        lines = ((f"{name}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        entries = [(where, _json(where, line.encode("utf-8", "surrogatepass"))) for where, line in lines]
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise UserError(f"{where}: it is no object with a file_name")
        yield where, {key.strip(): value for key, value in entry.items()}


def _csv(name: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    first = text.split("\n", 1)[0]
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        for values in filter(None, reader):
            if len(values) > len(columns):
                hint = "put texts with commas in quotes"
                raise UserError(f"{name}, line {reader.line_num}: {len(values)} values for {len(columns)} columns; {hint}")
            cells = [*(value.strip() for value in values), *[""] * (len(columns) - len(values))]
            yield f"{name}, line {reader.line_num}", dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num}: {error}: check the quotes") from error


def decoded(name: str, content: bytes) -> str:
    """A text file's content, UTF-8 or UTF-16 with its mark."""
    kind = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(kind)
    except ValueError as error:
        raise UserError(f"{name} cannot be read: it is no UTF-8 text ({error}); save it as UTF-8") from error


def beside(name: str, content: bytes) -> Row:
    """What a file beside a picture says: .txt and .caption its text, .cls its class, .json both."""
    text = decoded(name, content).strip()
    if name.endswith(".cls"):
        return Row(label=label_of(name, text))
    if not name.endswith(".json"):
        return Row(texts=texts_of(name, " ".join(text.split())))
    entry = _json(name, content)
    if not isinstance(entry, dict):
        return Row()
    keys = {str(key).lower(): key for key in entry}
    label, said = (next((entry[keys[key]] for key in names if key in keys), None) for names in ((*LABEL, "cls"), TEXT))
    return Row(label_of(name, label), texts_of(name, said))


def _empty(value: Any) -> bool:
    """Whether a cell says nothing; pandas writes NaN for that."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip().lower() in ("", "nan")


def label_of(where: str, value: Any) -> str | None:
    """A class, None where the cell is empty; UserError for a list."""
    if _empty(value):
        return None
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: the label is {value!r}; give one class")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return clean(str(value).strip())


def texts_of(where: str, value: Any) -> tuple[str, ...]:
    """The texts of a cell, which may hold a list of them."""
    if isinstance(value, dict):
        raise UserError(f"{where}: the text is {value!r}; give a text, or a list of them")
    found = value if isinstance(value, list) else [value]
    return tuple(clean(str(text).strip()) for text in found if not _empty(text))


def clean(text: str) -> str:
    """A text that can be written as UTF-8: halves of surrogate pairs become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def number_of(where: str, key: str, value: Any, strange: dict[str, Count]) -> float | None:
    """A numeric attribute; None where there is none; UserError where it is not finite."""
    if value is None or value == "" or isinstance(value, (list, dict, bool)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        strange.setdefault(key, Count()).add(f"{where}: {str(value)[:40]!r}")
        return None
    if not math.isfinite(number):
        raise UserError(f"{where}: {key} is {value}; give a finite number, or leave it empty where it is not known")
    return number


def whole_labels(read: list[tuple[str, Row]]) -> None:
    """1, 1.0 and 01 are one class, where all are whole numbers."""
    numbers = dict[str, str]()
    for label in {row.label for _, row in read if row.label is not None}:
        try:
            value = float(label)
        except ValueError:
            return
        if not value.is_integer():
            return
        numbers[label] = str(int(value))
    for _, row in read:
        row.label = None if row.label is None else numbers[row.label]


def coco(name: str, content: bytes) -> list[tuple[str, Row]] | None:
    """File names and captions of COCO annotations; None where a JSON file is something else."""
    found = _json(name, content)
    if not isinstance(found, dict) or not isinstance(found.get("annotations"), list) or not isinstance(found.get("images"), list):
        return None
    try:
        files = {image["id"]: str(image["file_name"]) for image in found["images"]}
        rows = {key: Row() for key in files}
        for annotation in found["annotations"]:
            if "caption" in annotation and annotation["image_id"] in rows:
                rows[annotation["image_id"]].texts += (clean(str(annotation["caption"]).strip()),)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name} is no file of COCO annotations: {error!r} is wrong in it") from error
    return [(files[key], row) for key, row in rows.items()] if any(row.texts for row in rows.values()) else None


def dataset_json(name: str, content: bytes) -> list[tuple[str, Row]]:
    """File names and labels of the dataset.json of StyleGAN and EDM2, whose labels may be null."""
    found = _json(name, content)
    labels = found.get("labels") if isinstance(found, dict) else None
    try:
        return [(str(file), Row(label_of(name, _hot(label)))) for file, label in labels or []]
    except (TypeError, ValueError) as error:
        raise UserError(f'{name} has no list of [file, label] in "labels"') from error


def _hot(label: Any) -> Any:
    """The place of the one in a one-hot vector."""
    return label.index(1) if isinstance(label, list) and sorted(label)[-1:] == [1] and sum(label) == 1 else label


def _json(name: str, content: bytes) -> Any:
    try:
        return json.loads(decoded(name, content))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error
