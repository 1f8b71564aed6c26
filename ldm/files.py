"""Files that are there whole or not at all, whatever ends the process that writes them."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from ldm.errors import UserError
from ldm.locking import try_lock

PART = ".part"  # in the name of a file that is being written, which its writer has locked
MOST_VALUES, DEEPEST = 1_000_000, 60  # of a YAML file: a million class names are possible
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_THE_DISK = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end; whatever goes wrong leaves what was there, and nothing else.

    UserError, with the path and how many bytes were written, where the disk refuses.
    """
    temporary, written = None, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, held = _temporary(path)
        with held:
            try:
                yield temporary
                sync(temporary)
                os.chmod(temporary, 0o644)
                if os.name != "posix":  # pragma: no cover  Windows renames no open file
                    held.close()
                os.replace(temporary, path)
            except BaseException:
                written = temporary.stat().st_size if temporary.exists() else 0
                temporary.unlink(missing_ok=True)
                raise
        sync(path.parent)
    except OSError as error:
        if error.errno not in OF_THE_DISK or error.filename not in (None, str(path), str(path.parent), str(temporary)):
            raise
        raise UserError(refusal(path, error, written)) from error


def refusal(path: Path, error: OSError, written: int) -> str:
    """What a disk refused, in a sentence."""
    if error.errno not in NO_ROOM:
        return f"cannot write {path}: {error.strerror}"
    folder = next((parent for parent in path.parents if parent.is_dir()), Path.cwd())
    free = shutil.disk_usage(folder).free
    room = f"{error.strerror} after {written:,} bytes, {free:,} are free"
    return f"cannot write {path}: {room}; what was there before is unchanged: make room there"


def write_atomically(path: Path, data: bytes) -> None:
    """The file is there whole or not at all, also after a crash."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


def _temporary(path: Path) -> tuple[Path, IO[Any]]:
    """An empty file beside `path` of the same kind, and a lock on it that ends with this process."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=f"{PART}{path.suffix}")
        held = os.fdopen(handle, "r+b")
        if try_lock(held) and os.fstat(held.fileno()).st_nlink:
            return Path(name), held
        held.close()  # `sweep` of another process was faster than the lock


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, without those that are being written."""
    return sorted((path for path in folder.glob(pattern) if PART not in path.name), key=lambda path: path.stat().st_mtime, reverse=True)


def sweep(folder: Path) -> list[Path]:
    """Remove what killed processes had begun to write in a folder; what is being written stays.  Returns what was removed."""
    removed = []
    for path in folder.glob(f".*{PART}*"):
        if not path.is_file():
            continue
        with path.open("r+b") as file:
            if try_lock(file):
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def read_yaml(path: Path) -> Any:
    """The plain content of a YAML file: numbers, texts, lists, mappings.  UserError where it is none, too deep or too much."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:  # ValueError: of a date or a number
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not valid YAML: {said}") from error
    _require_bounded(content, path)
    return content


def _require_bounded(content: Any, path: Path) -> None:
    """Aliases let a small file mean an endless content."""
    waiting, seen = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise UserError(f"{path} holds more than {MOST_VALUES:,} values, or is nested more than {DEEPEST} deep: it is no file of ldm")
        if isinstance(value, dict):
            waiting += [(one, depth + 1) for pair in value.items() for one in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(one, depth + 1) for one in value]


def sync(path: Path) -> None:
    """What was written there is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
