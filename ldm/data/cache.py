"""The latent cache: what frozen networks make of every training image and of its mirror image."""

import errno
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.devices import send
from ldm.errors import UserError
from ldm.files import sync
from ldm.locking import lock, try_lock

CARD, ROWS, LOCK = "latents.json", "rows.npy", "lock"
ROW = np.dtype([("state", "u1"), ("crc", "<u4")])
MISSING, THERE, DAMAGED = range(3)  # states of a row; a damaged image has no encoding of its own
Place = Literal["disk", "memory", "device"]


def folder_of(root: str | Path, key: str) -> Path:
    """Where the cache of a key lies."""
    return Path(root).expanduser() / key[:16]


class LatentCache:
    """Arrays float16 (N, 2, ...), an image's encoding and that of its mirror image, in the folder <root>/<key>.

    Opening costs the same for any number of images, a batch as much as it has images.  on: where batches are read from; memory and
    device hold the whole cache.
    """

    def __init__(self, root: str | Path, key: str, on: Place = "disk", device: torch.device | None = None) -> None:
        self.folder, self.key, self.on, self.device = folder_of(root, key), key, on, device
        self._opened: dict[str, Any] | None = None
        self._successors: dict[int, int] = {}

    @property
    def card(self) -> dict[str, Any] | None:
        """What is in it; None where it is not there, or not whole."""
        return read_card(self.folder, self.key)

    def open(self) -> dict[str, Any]:
        """The arrays by name, memory-mapped or as tensors."""
        if self._opened is None:
            card = self.card
            assert card is not None, f"there is no cache in {self.folder}"
            self._successors = _successors(card["damaged"], card["rows"])
            self._opened = {name: self._array(name) for name in card["arrays"]}
        return self._opened

    def _array(self, name: str) -> Any:
        if self.on == "disk":
            mapped = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
                mapped.base.madvise(mmap.MADV_RANDOM)  # rows are read in a random order: what lies behind one is not wanted
            return mapped
        array = torch.from_numpy(np.load(self.folder / f"{name}.npy"))
        if self.on == "memory":
            return array.pin_memory() if torch.cuda.is_available() else array
        return array.to(self.device)

    def __getitem__(self, keys: tuple[Sequence[int], Sequence[int]]) -> tuple[dict[str, Tensor], list[int]]:
        """(mirrored, indices) -> arrays float32 (B, ...) by name, and the images that they are of (a damaged one's successor)."""
        arrays = self.open()
        used = [self._successors.get(index, index) for index in keys[1]]
        if self.on == "disk":
            return {name: torch.from_numpy(array[used, list(keys[0])]).float() for name, array in arrays.items()}, used
        device = self.device if self.on == "device" and self.device else torch.device("cpu")
        rows = send(torch.tensor([used, list(keys[0])]), device)
        return {name: array[rows[0], rows[1]].float() for name, array in arrays.items()}, used

    def __getstate__(self) -> dict[str, Any]:
        """For processes of a loader, which open it themselves."""
        return {**vars(self), "_opened": None if self.on == "disk" else self._opened}


def read_card(folder: Path, key: str | None = None) -> dict[str, Any] | None:
    """The description of a whole cache of this version; None where there is none."""
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
    except (OSError, ValueError):
        return None
    return card if "arrays" in card and key in (None, card["key"]) else None


def _successors(damaged: Sequence[int], rows: int) -> dict[int, int]:
    """The next image that is not damaged, of each that is."""
    found, bad = dict[int, int](), set(damaged)
    for index in sorted(bad, reverse=True) * 2:  # twice: the last ones' successors are the first
        after = (index + 1) % rows
        found[index] = found.get(after, after)
    return found


class CacheWriter:
    """Fills a cache beside its place: all ranks and any number of runs write disjoint blocks of rows of <root>/.<key>.partial.

    Where a run was killed, the next one goes on: rows whose checksum is right stay.  `finish` renames the folder when every row is
    there.  block: rows that are encoded together, so that the same rows are always made by the same arithmetic.
    """

    def __init__(self, root: str | Path, key: str) -> None:
        self.target, self.key = folder_of(root, key), key
        self.folder = self.target.with_name(f".{key[:16]}.partial")
        self.errors = np.zeros(2)  # squares of what float16 lost, and of the values
        self._files: dict[str, tuple[int, int, int]] = {}  # descriptor, offset of the first row, bytes of a row
        self._arrays: dict[str, list[int]] = {}

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """While no other run writes this cache; False where another one has finished it meanwhile."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOCK).open("a") as file:
                lock(file, lambda: print(f"another run is encoding into {self.target}: waiting for it"))
                if read_card(self.target, self.key) is not None:
                    self._discard_empty()
                    yield False
                    return
                if _is(file, self.folder / LOCK):  # otherwise it was renamed, or thrown away, while we waited
                    yield True
                    return

    def _discard_empty(self) -> None:
        """Leave no folder of the wait behind."""
        if self.folder.is_dir() and not (self.folder / ROWS).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)

    def create(self, rows: int, arrays: Mapping[str, Sequence[int]], block: int) -> None:
        """Make room for arrays of `rows` rows, or go on with those of a run that was killed."""
        plan = {"key": self.key, "rows": rows, "arrays": {name: [rows, 2, *shape] for name, shape in arrays.items()}, "block": block}
        try:
            found = json.loads((self.folder / "plan.json").read_text())
        except (OSError, ValueError):
            found = None
        if found is not None and {**found, "block": block} == plan:
            return
        try:
            for name, shape in arrays.items():
                _allocate(self.folder / f"{name}.npy", np.dtype(np.float16), (rows, 2, *shape))
            _allocate(self.folder / ROWS, ROW, (rows,))
            (self.folder / "plan.json").write_text(json.dumps(plan))
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def open(self) -> None:
        """On every rank, after `create`."""
        plan = json.loads((self.folder / "plan.json").read_text())
        self.rows, self.block, self._arrays = plan["rows"], plan["block"], plan["arrays"]
        for name in (*self._arrays, "rows"):
            path = self.folder / f"{name}.npy"
            array = np.load(path, mmap_mode="r")
            self._files[name] = os.open(path, os.O_RDWR), array.offset, array.nbytes // self.rows
        self.states = np.array(np.load(self.folder / ROWS))

    def pending(self) -> list[range]:
        """Blocks of rows that are not there, or not whole."""
        blocks = [range(start, min(start + self.block, self.rows)) for start in range(0, self.rows, self.block)]
        return [block for block in blocks if not self._whole(block)]

    def _whole(self, rows: range) -> bool:
        states = self.states[rows.start : rows.stop]
        return bool((states["state"] != MISSING).all()) and all(self.checksum(row) == states[i]["crc"] for i, row in enumerate(rows))

    def checksum(self, row: int) -> int:
        """Of all that is stored of a row."""
        found = 0
        for name in self._arrays:
            handle, offset, size = self._files[name]
            found = zlib.crc32(os.pread(handle, size, offset + row * size), found)
        return found

    def write(self, rows: range, read: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """values (len(rows), 2, ...) of the images `read`; one that is not its row's is another's, as that is damaged."""
        states, checks = np.zeros(len(rows), ROW), [0] * len(rows)
        for name, tensor in values.items():
            handle, offset, size = self._files[name]
            full = tensor.detach().float().cpu()
            half = full.half()
            if not torch.isfinite(half).all():
                top = f"{full.abs().max():g}, which 16 bits cannot hold"
                raise UserError(f"the {name} of images {rows.start} to {rows.stop - 1} reach {top}: train the first stage again")
            self.errors += [float((half.float() - full).double().square().sum()), float(full.double().square().sum())]
            content = half.numpy().tobytes()
            _write_all(handle, content, offset + rows.start * size)
            checks = [zlib.crc32(content[i * size : (i + 1) * size], check) for i, check in enumerate(checks)]
        states["crc"] = checks
        states["state"] = [THERE if row == own else DAMAGED for row, own in zip(rows, read, strict=True)]
        handle, offset, size = self._files["rows"]
        _write_all(handle, states.tobytes(), offset + rows.start * size)

    def finish(self) -> None:
        """Check that every row is there as it was written, and give the cache its name."""
        self.states = np.array(np.load(self.folder / ROWS))
        if wrong := self.pending():
            raise UserError(
                f"{len(wrong)} blocks of the latents in {self.folder} are not as they were written: is the disk failing? Start again"
            )
        damaged = np.flatnonzero(self.states["state"] == DAMAGED).tolist()
        card = {"key": self.key, "rows": self.rows, "arrays": self._arrays, "damaged": damaged}
        digest = hashlib.sha256(self.states["crc"].tobytes()).hexdigest()
        (self.folder / CARD).write_text(json.dumps({**card, "digest": digest}))
        self.close()
        (self.folder / "plan.json").unlink()
        for path in (*self.folder.iterdir(), self.folder):
            sync(path)
        if self.target.is_dir():  # of an earlier version, or not whole
            shutil.rmtree(self.target)
        os.replace(self.folder, self.target)
        (self.target / LOCK).unlink()
        sync(self.target.parent)

    def close(self) -> None:
        """Let go of the files."""
        for handle, _, _ in self._files.values():
            os.close(handle)
        self._files = {}


def verify(cache: LatentCache, rows: Sequence[int]) -> list[int]:
    """Those of the rows whose bytes are not the ones that were written."""
    states = np.load(cache.folder / ROWS, mmap_mode="r")
    card = cache.card
    assert card is not None
    arrays = [np.load(cache.folder / f"{name}.npy", mmap_mode="r") for name in card["arrays"]]
    wrong = []
    for row in rows:
        found = 0
        for array in arrays:
            found = zlib.crc32(np.ascontiguousarray(array[row]).tobytes(), found)
        if found != states[row]["crc"]:
            wrong.append(row)
    return wrong


def others(root: str | Path, key: str) -> dict[Path, int]:
    """Caches of other images or first stages below a root, and those of killed runs, with their sizes in bytes."""
    own, found = folder_of(root, key), dict[Path, int]()
    for path in sorted(Path(root).expanduser().iterdir()) if Path(root).expanduser().is_dir() else ():
        known = (path / CARD).is_file() or path.name.endswith(".partial")
        if path.is_dir() and known and path.name.removeprefix(".").removesuffix(".partial") != own.name:
            found[path] = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return found


def remove(folder: Path) -> bool:
    """Remove a cache; False where a run is writing it."""
    if not (folder / LOCK).is_file():
        shutil.rmtree(folder)
        return True
    with (folder / LOCK).open("a") as file:
        if not try_lock(file):
            return False
        shutil.rmtree(folder)
        return True


def _is(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _allocate(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """A file of zeros as an array, whose room on the disk is taken now.  UserError where there is not enough."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": shape}
    needed = int(np.prod(shape)) * dtype.itemsize
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
            end = file.tell() + needed
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, end)
            else:  # pragma: no cover  macOS
                if shutil.disk_usage(path.parent).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                file.truncate(end)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"the latents need {needed / 1e6:,.1f} MB in {path.parent.parent}, where {free / 1e6:,.1f} MB are free ({error.strerror}): "
            "make room, name another folder with --data.cache, or give --data.cache null"
        ) from error


def _write_all(handle: int, content: bytes, offset: int) -> None:
    """All of the content at an offset, however the system splits it."""
    view = memoryview(content)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
