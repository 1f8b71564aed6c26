"""Tables with the pictures in them: Parquet files of the Hugging Face hub, and folders of `datasets.save_to_disk`."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.decode import naming
from ldm.data.records import Record, Records
from ldm.data.sources.annotations import LABEL, TEXT, Row, label_of, texts_of
from ldm.data.sources.layout import TEST, TRAIN, VAL, split_of
from ldm.data.sources.source import Report, Runs, Source
from ldm.errors import UserError, extra

IMAGE = ("image", "img", "picture", "jpg", "png", "webp", "image_bytes", "bytes", "pixel_values")


class TableSource(Source):
    """The rows of Parquet or Arrow files: a column of pictures (their bytes, or Hugging Face's {bytes, path}), and
    columns label, text and numbers.  Names of classes are those in the features of the schema.

    Files called train-*, validation-*, test-* are a split.  Parquet is read by row groups, Arrow mapped into memory.
    """

    def __init__(self, paths: Sequence[Path], root: Path) -> None:
        kind = "Parquet" if paths[0].suffix.lower() == ".parquet" else "Arrow"
        self.report = Report(f"a{'n' * (kind == 'Arrow')} {kind} file" if len(paths) == 1 else f"{kind} files")
        self.paths, self.root = self._split(paths), root
        with naming(self.paths[0]):
            self.columns = _Columns(_schema(self.paths[0]), self.paths[0])
        groups = [(number, group, count) for number, path in enumerate(self.paths) for group, count in enumerate(_groups(path))]
        self.groups = np.array(groups, np.int64).reshape(-1, 3)
        self.ends = self.groups[:, 2].cumsum()
        of = np.repeat(np.arange(len(self.groups)), self.groups[:, 2])
        self._opened: tuple[int, dict[int, Any]] = (0, {})
        # row groups, which may be read in any order; what is mapped into memory needs no runs
        self.items = Runs(of, np.arange(len(self.groups)), self._load) if kind == "Parquet" else None
        self.runs = None if self.items is None else (of, self.items.files)
        self.records = Records(self._records())
        held_out = np.array([split not in (TRAIN, None) for split in self.splits])[self.groups[of, 0]]
        self.held_out = held_out if 0 < held_out.sum() < len(held_out) else None

    def _split(self, paths: Sequence[Path]) -> list[Path]:
        """The files to read; of those called test where others are called validation none."""
        splits = {path: split_of(path.stem) or split_of(path.parent.name) for path in paths}
        if TRAIN not in splits.values():
            splits = dict.fromkeys(paths)
        chosen = [path for path in paths if not (splits[path] == TEST and VAL in splits.values())]
        for path in paths:
            if path not in chosen:
                self.report.leave_out("test, as validation is held out", path.name)
        self.splits = [splits[path] for path in chosen]
        return chosen

    def _records(self) -> Iterator[Record]:
        for path in self.paths:
            with naming(path):
                for place, entry in enumerate(_entries(path, self.columns.told)):
                    row = self.columns.row(f"{path.name}, row {place + 1}", entry)
                    name = f"{path.stem}/{place}" if len(self.paths) > 1 else str(place)
                    yield Record.of(name, row.label, row.texts, row.numbers)

    def read(self, index: int) -> Path | bytes:
        found = self._mapped(index) if self.items is None else self.items.read(index)
        if isinstance(found, dict):
            found = found.get("bytes") or self.root / str(found.get("path"))
        return found

    def _load(self, indices: np.ndarray) -> list[Any]:
        """The pictures of a row group of Parquet."""
        number, part = self.groups[int(np.searchsorted(self.ends, indices[0], side="right")), :2].tolist()
        path = self.paths[number]
        with naming(path):
            return _parquet(path).read_row_group(part, columns=[self.columns.image]).column(0).to_pylist()

    def _mapped(self, index: int) -> Any:
        """A picture of an Arrow file, which each process maps into memory once."""
        if self._opened[0] != os.getpid():
            self._opened = (os.getpid(), {})
        group = int(np.searchsorted(self.ends, index, side="right"))
        number, first = int(self.groups[group, 0]), int(np.searchsorted(self.groups[:, 0], self.groups[group, 0]))
        path = self.paths[number]
        with naming(path):
            if number not in self._opened[1]:
                self._opened[1][number] = _arrow(path).column(self.columns.image)
            return self._opened[1][number][index - (int(self.ends[first - 1]) if first else 0)].as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (0, {})}

    def stamps(self) -> Iterator[object]:
        return ((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths)


class _Columns:
    """The columns that have a meaning."""

    def __init__(self, schema: Any, path: Path) -> None:
        known = {name.lower(): name for name in schema.names}
        image = next((known[name] for name in IMAGE if name in known and _holds_bytes(schema.field(known[name]).type)), None)
        if image is None:
            raise UserError(f"{str(path)!r} has the columns {', '.join(schema.names)}, none of which is one of pictures: call it `image`")
        self.image = image
        self.label, self.text = (next((known[name] for name in names if name in known), None) for names in (LABEL, TEXT))
        numeric = [f.name for f in schema if str(f.type).startswith(("int", "uint", "float", "double", "halffloat"))]
        self.numbers = [name for name in numeric if name not in (self.label, self.text)]
        self.told = [name for name in (self.label, self.text, *self.numbers) if name is not None]
        self.classes = _classes(schema, self.label)

    def row(self, where: str, entry: dict[str, Any]) -> Row:
        """What a row says of its picture."""
        label = entry.get(self.label or "")
        if self.classes is not None and isinstance(label, int):
            label = self.classes[label] if 0 <= label < len(self.classes) else None
        numbers = {name: float(entry[name]) for name in self.numbers if entry[name] is not None}
        if wrong := [name for name, value in numbers.items() if not np.isfinite(value)]:
            raise UserError(f"{where}: {wrong[0]} is {numbers[wrong[0]]}; give a finite number, or leave it empty where it is not known")
        return Row(label_of(where, label), texts_of(where, entry.get(self.text or "")), numbers)


def _holds_bytes(kind: Any) -> bool:
    return "binary" in str(kind)


def _classes(schema: Any, label: str | None) -> list[str] | None:
    """Names of the classes by number, where the schema has Hugging Face's features."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (TypeError, KeyError, ValueError):
        return None


def _schema(path: Path) -> Any:
    if path.suffix.lower() == ".parquet":
        return _parquet(path).schema_arrow
    return _arrow(path).schema


def _groups(path: Path) -> list[int]:
    """Numbers of rows of the parts that are read at once."""
    with naming(path):
        if path.suffix.lower() == ".parquet":
            meta = _parquet(path).metadata
            return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        return [batch.num_rows for batch in _arrow(path).to_batches()]


def _entries(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for count in _groups(path) for _ in range(count))
    elif path.suffix.lower() == ".parquet":
        for batch in _parquet(path).iter_batches(columns=columns):
            yield from batch.to_pylist()
    else:
        for batch in _arrow(path).select(columns).to_batches():
            yield from batch.to_pylist()


def _parquet(path: Path) -> Any:
    return extra("pyarrow.parquet", "parquet", path.name).ParquetFile(path)


def _arrow(path: Path) -> Any:
    """A table in memory that is the file's."""
    pyarrow, ipc = extra("pyarrow", "parquet", path.name), extra("pyarrow.ipc", "parquet", path.name)
    source = pyarrow.memory_map(str(path))
    try:
        return ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return ipc.open_file(pyarrow.memory_map(str(path))).read_all()
