"""Trees of named files: a folder's, a zip's, tar shards', a list's.  What their names mean is said in layout.py."""

import io
import os
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ldm.data.decode import is_hidden, naming
from ldm.data.records import Strings
from ldm.data.sources.source import Report, Runs
from ldm.errors import UserError

MANIFEST = "manifest.jsonl"  # that `ldm sample` writes
STAGES = ("autoencoder", "diffusion", "classifier")
Place = TypeVar("Place")


class Tree(ABC):
    """Files by number; `names` are their paths with `/`, in the order of their parts.

    depth: how many first parts of a name are no folders of the user, such as the name of a shard.
    """

    path: Path
    names: Strings
    report: Report
    depth: int = 0
    one_is_a_class: bool = False  # whether a folder that holds all images says their class
    has_keys: bool = False  # whether files of one sample have a name up to the first dot, as in WebDataset
    runs: Runs | None = None

    @abstractmethod
    def read(self, index: int) -> Path | bytes:
        """A file, or its content."""

    def content(self, index: int) -> bytes:
        """The content of a file; UserError where it cannot be read."""
        found = self.read(index)
        if isinstance(found, bytes):
            return found
        with naming(found):
            return found.read_bytes()

    @abstractmethod
    def stamp(self, index: int) -> object:
        """What changes when a file does."""


class Folder(Tree):
    """All files below a folder.  Links are followed, but not in circles; runs and pictures of ldm below it are left out.

    own: the folder of the run that reads it, whose files are no images of the user.
    """

    def __init__(self, root: Path, own: Path | None = None) -> None:
        self.path, self.report, self.own = root, Report("a folder"), None if own is None else own.resolve()
        self.one_is_a_class = True
        with naming(root):
            status = root.stat()
            self.names = Strings(self._walk(root, "", ((status.st_dev, status.st_ino),)))

    def _walk(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = prefix + entry.name
            if reason := self._unwanted(entry):
                self.report.leave_out(reason, name)
            elif _is(entry, stat.S_ISDIR):
                status = entry.stat()
                if (status.st_dev, status.st_ino) in above:
                    self.report.leave_out("link in a circle", name)
                else:
                    yield from self._walk(Path(entry.path), f"{name}/", (*above, (status.st_dev, status.st_ino)))
            else:
                yield name

    def _unwanted(self, entry: os.DirEntry[str]) -> str | None:
        """Why an entry is left out; None where it is not."""
        if is_hidden(Path(entry.name)):
            return "hidden"
        if _is(entry, stat.S_ISDIR):
            path = Path(entry.path)
            if self.own is not None and path.resolve() == self.own:
                return "this run's folder"
            if is_run(path) or any(is_run(path / stage) for stage in STAGES):
                return "folder of a run"
            return "folder of `ldm sample`" if is_samples(path) else None
        if not _is(entry, stat.S_ISREG):
            return "broken link" if entry.is_symlink() else "no file"
        return None

    def read(self, index: int) -> Path:
        return self.path / self.names[index]

    def stamp(self, index: int) -> object:
        return _stamp(self.read(index))


def _is(entry: os.DirEntry[str], kind: Callable[[int], bool]) -> bool:
    """Whether an entry, or what it links to, is of a kind; a link that leads nowhere is of none."""
    try:
        return kind(entry.stat().st_mode)
    except OSError:
        return False


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `ldm fit` wrote for a stage."""
    if (folder / "model" / "model.safetensors").is_file():
        return True
    return (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("*.ckpt"))


def is_samples(folder: Path) -> bool:
    """Whether a folder is one that `ldm sample` wrote."""
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as file:
            return "model_sha256" in file.readline()
    except (OSError, ValueError):  # none, or no text
        return False


class Listed(Tree):
    """Files that a list names, relative to its folder or absolute."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.report, self.names = path, Report("a list of files"), Strings(names)

    def read(self, index: int) -> Path:
        return self.path.parent / self.names[index]

    def stamp(self, index: int) -> object:
        return _stamp(self.read(index))


def _stamp(path: Path) -> object:
    with naming(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


class Zips(Tree):
    """The files of one or several zip archives."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.path, self.depth = list(paths), paths[0], int(len(paths) > 1)
        self.report = Report("a zip" if len(paths) == 1 else "zip files")
        self._open: tuple[int, dict[int, zipfile.ZipFile]] = (0, {})
        rows = sorted(user_files(self.report, self._members()), key=lambda row: row[0].split("/"))
        self.names = Strings(name for name, _ in rows)
        # archive, offset, compressed size, size, checksum, method, flags: 56 bytes where a ZipInfo has hundreds
        self.places = np.array([place for _, place in rows], np.int64).reshape(-1, 7)

    def _members(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for number, path in enumerate(self.paths):
            with naming(path), zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
            for info in infos:
                if info.flag_bits & 1:
                    raise UserError(f"{str(path)!r} is encrypted: unpack it, and give the folder")
                if not info.is_dir():
                    place = (number, info.header_offset, info.compress_size, info.file_size, info.CRC)
                    name = f"{path.stem}/{info.orig_filename}" if self.depth else info.orig_filename
                    yield name, (*place, info.compress_type, info.flag_bits)

    def read(self, index: int) -> bytes:
        number, offset, packed, size, checksum, method, flags = (int(value) for value in self.places[index])
        name = self.names[index]
        info = zipfile.ZipInfo(name.split("/", 1)[1] if self.depth else name)
        info.header_offset, info.compress_size, info.file_size, info.CRC = offset, packed, size, checksum
        info.compress_type, info.flag_bits = method, flags
        with naming(self.paths[number] / info.filename):
            return self._archive(number).read(info)

    def _archive(self, number: int) -> zipfile.ZipFile:
        """An archive as this process has opened it: its list of files, which `places` holds, is not read again."""
        if self._open[0] != os.getpid():  # a file's position must not be shared by processes
            self._open = (os.getpid(), {})
        if number not in self._open[1]:
            archive = zipfile.ZipFile(io.BytesIO(b"PK\5\6" + bytes(18)))
            archive.fp = self.paths[number].open("rb")
            self._open[1][number] = archive
        return self._open[1][number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (0, {})}

    def stamp(self, index: int) -> object:
        return self.places[index].tolist()


class Tars(Tree):
    """The files of tar shards, found by one pass over their headers.

    Compressed ones have no random access: runs of RUN files are read at once.
    """

    RUN = 256

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.path, self.depth, self.has_keys = list(paths), paths[0], int(len(paths) > 1), True
        self.report = Report("a tar" if len(paths) == 1 else "tar shards")
        names, places, packed = list[str](), array("q"), list[bool]()
        for number, path in enumerate(self.paths):
            with naming(path), tarfile.open(path) as archive:
                packed.append(not isinstance(archive.fileobj, io.BufferedReader))
                for name, (offset, size) in user_files(self.report, _members(archive)):
                    names.append(f"{path.name.split('.')[0]}/{name}" if self.depth else name)
                    places.extend((number, offset, size))
        self.names = Strings(names)
        self.places = np.frombuffer(places.tobytes(), np.int64).reshape(-1, 3)
        if any(packed):
            starts = np.searchsorted(self.places[:, 0], np.arange(len(self.paths)))
            within = np.arange(len(names)) - starts[self.places[:, 0]]
            first = (within % self.RUN == 0).cumsum() - 1
            self.runs = Runs(first, self.places[np.flatnonzero(within % self.RUN == 0), 0], self._run)
            self.report.notes.append(
                f"{self.paths[packed.index(True)].name} is compressed, so that it is read in order and shuffled in runs; "
                "unpack it for random access"
            )

    def read(self, index: int) -> bytes:
        if self.runs is not None:
            return self.runs.read(index)
        number, offset, size = (int(value) for value in self.places[index])
        with naming(self.paths[number]), self.paths[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _run(self, indices: np.ndarray) -> list[bytes]:
        """The contents of files that follow one another in one archive."""
        path = self.paths[int(self.places[indices[0], 0])]
        with naming(path):
            stream = self._stream(path)
            found = []
            for _, offset, size in self.places[indices].tolist():
                stream.seek(offset)  # forwards; backwards it begins anew
                found.append(stream.read(size))
            return found

    def _stream(self, path: Path) -> Any:
        """The unpacked bytes of an archive, opened once by each process."""
        if self._opened is None or self._opened[:2] != (os.getpid(), path):
            self._opened = (os.getpid(), path, tarfile.open(path).fileobj)  # noqa: SIM115  stays open
        return self._opened[2]

    _opened: tuple[int, Path, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def stamp(self, index: int) -> object:
        return self.places[index].tolist()


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, int]]]:
    while (info := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # which would hold an object for each of millions of files
        if info.isfile():
            yield info.name.removeprefix("./"), (info.offset_data, info.size)


def user_files(report: Report, members: Iterable[tuple[str, Place]]) -> Iterator[tuple[str, Place]]:
    """The files of an archive that are the user's; the others are counted."""
    for name, place in members:
        if is_hidden(Path(name)):
            report.leave_out("hidden", name)
        else:
            yield name, place
