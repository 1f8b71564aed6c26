"""LMDB databases of the LSUN kind: a picture under each key."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.data.decode import naming
from ldm.data.records import Record, Records
from ldm.data.sources.source import Report, Source
from ldm.errors import UserError, extra


class LMDBSource(Source):
    """The values of an LMDB database, which are pictures in any format; there are no classes in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.report = path, Report("an LMDB database")
        with naming(path):
            self.records = Records(Record(key) for key in self._keys())
        if not len(self.records):
            raise UserError(f"the database {str(path)!r} has no entries: give one with pictures")

    def _keys(self) -> Iterator[str]:
        with self._environment().begin() as transaction, transaction.cursor() as cursor:
            for key in cursor.iternext(values=False):
                yield key.decode("utf-8", "surrogateescape")

    def _environment(self) -> Any:
        return _environment(str(self.path), self.path.is_dir(), os.getpid())

    def read(self, index: int) -> bytes:
        with naming(self.path / self.records.ids[index]), self._environment().begin() as transaction:
            found = transaction.get(self.records.ids[index].encode("utf-8", "surrogateescape"))
            if found is None:
                raise ValueError("it is no longer in the database")
            return found

    def stamps(self) -> Iterator[object]:
        file = self.path / "data.mdb" if self.path.is_dir() else self.path
        return iter([file.stat().st_size, file.stat().st_mtime_ns])


@lru_cache(maxsize=16)
def _environment(path: str, is_folder: bool, process: int) -> Any:
    """A database as a process has opened it: LMDB allows one environment for each."""
    lmdb = extra("lmdb", "lmdb", path)
    return lmdb.open(path, subdir=is_folder, readonly=True, lock=False, readahead=False, max_readers=1)
