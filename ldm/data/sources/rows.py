"""Rows that say what images show, by the path of their image."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.data.sources.annotations import (
    FILE,
    LABEL,
    TEXT,
    Row,
    coco,
    dataset_json,
    label_of,
    normal,
    number_of,
    table,
    texts_of,
    whole_labels,
)
from ldm.data.sources.source import Count, Report
from ldm.errors import UserError


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
            found = coco(name, content)
        elif base == "dataset.json":
            found, self.has_labels = dataset_json(name, content), True
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
                if key not in columns.names and (number := number_of(where, key, value, strange)) is not None:
                    row.numbers[key] = number
            found.append((file, row))
        self._drop(name, found, strange, report)
        if columns.label is not None:
            whole_labels(found)
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
