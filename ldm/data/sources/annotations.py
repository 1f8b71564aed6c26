"""Rows of files that say what images show: metadata.jsonl, .csv, .tsv, .json, .parquet, COCO captions, dataset.json."""

import csv
import io
import json
import math
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.data.sources.source import Count, Report
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


class Rows:
    """Rows by the path of their image; `has_labels`: whether any table has a column of classes."""

    def __init__(self) -> None:
        self.by_file, self.anywhere, self.files = dict[str, Row](), dict[str, str](), list[str]()
        self.has_labels, self.conflicts, self.without_row = False, Count(), Count()
        self.paths = dict[str, None]()  # as they are written
        self._used = set[str]()

    def add(self, file: str, row: Row) -> None:
        """One row; where an image has one already, its further texts."""
        self.paths.setdefault(file.strip())
        file = unicodedata.normalize("NFC", normal(file))
        known = self.by_file.setdefault(file, row)
        if known is not row:
            known.texts += tuple(text for text in row.texts if text not in known.texts)
            known.numbers = {**row.numbers, **known.numbers}
            if row.label is not None and row.label != known.label:
                self.conflicts.add(file)

    def of(self, file: str) -> Row | None:
        """The row of an image, by its path, or its name where that says enough."""
        key = file if file in self.by_file else self.anywhere.get(file.rpartition("/")[2], "")
        row = self.by_file.get(key)
        if row is not None:
            self._used.add(key)
        elif self.by_file:
            self.without_row.add(file)
        return row

    @property
    def matched(self) -> int:
        """How many rows were asked for."""
        return len(self._used)

    def without_file(self) -> Count:
        """The rows that were not asked for."""
        unused = [file for file in self.by_file if file not in self._used]
        return Count(len(unused), unused[0] if unused else "")

    def read(self, name: str, content: bytes, report: Report, required: bool = True) -> bool:
        """Take in a table; False where it names no files and is not `required` to (then a UserError)."""
        folder, _, base = name.rpartition("/")
        is_coco = base.endswith(".json") and not base.startswith(("metadata.", "dataset.json"))
        if is_coco:
            found = _coco(name, content)
        elif base == "dataset.json":
            found, self.has_labels = _dataset_json(name, content), True
        else:
            found = self._table(name, content, report, required)
        if found is None:
            return False
        self.files.append(name)
        for file, row in found:
            path = f"{folder}/{file}" if folder else file
            if is_coco:  # whose names are without their folders
                path = f"{base}:{file}"
                self.anywhere[unicodedata.normalize("NFC", file.rpartition("/")[2])] = unicodedata.normalize("NFC", normal(path))
            self.add(path, row)
        return True

    def _table(self, name: str, content: bytes, report: Report, required: bool) -> list[tuple[str, Row]] | None:
        entries = list(table(name, content)) if required else _tried(name, content)
        columns = Columns.of(entries[0][1]) if entries else None
        if columns is None:
            if required:
                raise UserError(f"{name} needs a file_name in every row (and label, text where known)")
            return None
        self.has_labels |= columns.label is not None
        found, strange = list[tuple[str, Row]](), dict[str, Count]()
        for where, entry in entries:
            file = entry.get(columns.file)
            if not isinstance(file, str) or not file.strip():
                raise UserError(f"{where}: it needs a file_name, which is one path; {file!r} is there")
            row = Row(label_of(where, entry.get(columns.label or "")), texts_of(where, entry.get(columns.text or "")))
            for key, value in entry.items():
                if key not in columns.names and (number := _number(where, key, value, strange)) is not None:
                    row.numbers[key] = number
            found.append((file, row))
        self._drop(name, found, strange, report)
        if columns.label is not None:
            _whole(found)
        return found

    def _drop(self, name: str, found: list[tuple[str, Row]], strange: dict[str, Count], report: Report) -> None:
        """Columns in which some values are no numbers are none of numbers."""
        for key, count in strange.items():
            if any(key in row.numbers for _, row in found):
                what = f"{count.number} of {len(found)} rows"
                report.notes.append(f"{name}: the column {key} is not used: it is no number in {what} ({count.example})")
                for _, row in found:
                    row.numbers.pop(key, None)


def _tried(name: str, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file that may be a table of something else: none where it cannot be read."""
    try:
        return list(table(name, content))
    except UserError:
        return []


@dataclass(frozen=True)
class Columns:
    """The columns of a table that have a meaning."""

    file: str
    label: str | None
    text: str | None

    @property
    def names(self) -> set[str | None]:
        """Of those that are no attributes."""
        return {self.file, self.label, self.text}

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Columns | None":
        """By their names; None where none says a file."""
        known = {str(name).strip().lower(): name for name in entry}
        file, label, text = (next((known[name] for name in names if name in known), None) for names in (FILE, LABEL, TEXT))
        return None if file is None else cls(file, label, text)


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
    try:
        if name.endswith(".json"):
            entries = [(f"{name}, row {number}", entry) for number, entry in enumerate(json.loads(text), 1)]
        else:
            lines = enumerate(text.splitlines(), 1)
            entries = [(f"{name}, line {number}", json.loads(line)) for number, line in lines if line.strip()]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error
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


def _number(where: str, key: str, value: Any, strange: dict[str, Count]) -> float | None:
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


def _whole(read: list[tuple[str, Row]]) -> None:
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


def _coco(name: str, content: bytes) -> list[tuple[str, Row]] | None:
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


def _dataset_json(name: str, content: bytes) -> list[tuple[str, Row]]:
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
