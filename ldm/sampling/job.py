"""A folder of pictures: what is pending in it, who may write, its manifest and its grid."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.sources.trees import MANIFEST
from ldm.data.transforms import grid
from ldm.errors import UserError
from ldm.files import sweep, write_atomically
from ldm.locking import lock
from ldm.sampling.request import SampleRequest
from ldm.sampling.settings import settings_in, to_json
from ldm.sampling.writer import picture_path, png, read_shown, write_picture, write_values

GRID, LOCK = "grid.png", ".ldm.lock"
GRID_CELLS = 100  # pictures that grid.png shows at most

Settings = Callable[[SampleRequest], dict[str, Any]]


class OutputFolder:
    """A folder of pictures of ours, into which several commands may write, also at once.

    A picture that is there with the same settings is kept; one of other settings, and files of somebody else, are only replaced where
    `overwrite` is given.
    """

    def __init__(self, folder: Path, settings: Settings, overwrite: bool = False) -> None:
        self.folder, self.settings, self.overwrite = folder, settings, overwrite

    def pending(self, requests: Sequence[SampleRequest], beside: Sequence[str] = ()) -> list[SampleRequest]:
        """The requests whose picture is not there; a UserError before any work where the folder holds something else.

        beside: names of files that will be written beside the pictures, `*` standing for a picture's index.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked():
            sweep(self.folder)
            begun, lines = (self.folder / MANIFEST).is_file(), self._lines()
            if lines is None and not self.overwrite:
                raise UserError(f"{self.folder / MANIFEST} is not of ldm: choose another --out, or give --overwrite")
            if not begun and (self.folder / GRID).exists() and settings_in(self.folder / GRID) is None and not self.overwrite:
                raise UserError(f"{self.folder / GRID} is not of ldm: choose another --out, or give --overwrite")
            pending = [request for request in requests if not self._is_there(request)]
            for name in beside if not begun and not self.overwrite else ():
                for request in pending if "*" in name else pending[:1]:
                    self._require_ours(self.folder / name.replace("*", str(request.index)), picture_path(self.folder, request.index))
            if not begun:  # what is here from now on is ours, also after a kill
                write_atomically(self.folder / MANIFEST, b"")
            return pending

    def _require_ours(self, path: Path, picture: Path) -> None:
        """A UserError where a file is there that neither says it is ours nor lies beside a picture of ours."""
        if path.exists() and settings_in(path) is None and settings_in(picture) is None:
            raise UserError(f"{path} is not of ldm: choose another --out, or give --overwrite")

    def write(self, request: SampleRequest, frames: list[Tensor], values: np.ndarray | None = None) -> None:
        """A picture of frames uint8 or uint16 (C,H,W), unless another command has made it meanwhile; values: of arrays."""
        with self.locked():
            if not self._is_there(request):
                if values is not None:
                    write_values(picture_path(self.folder, request.index), values)
                write_picture(picture_path(self.folder, request.index), frames, self.settings(request))

    def finish(self, requests: Sequence[SampleRequest], columns: int = 0) -> None:
        """Merge these pictures into the manifest, whose lines of pictures that are still there stay, and draw the grid of the folder's
        first pictures, about square without `columns`."""
        with self.locked():
            lines = {name: line for name, line in (self._lines() or {}).items() if (self.folder / name).is_file()}
            for request in requests:
                path = picture_path(self.folder, request.index)
                if path.is_file():
                    lines[path.name] = to_json({"file": path.name, **self.settings(request)})
            ordered = sorted(lines, key=lambda name: (len(name), name))
            write_atomically(self.folder / MANIFEST, "".join(f"{lines[name]}\n" for name in ordered).encode())
            self._draw([self.folder / name for name in ordered[:GRID_CELLS]], columns)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this process alone reads and writes the folder; a lock of the operating system, which ends with its process."""
        with (self.folder / LOCK).open("a") as file:
            lock(file)
            yield

    def _is_there(self, request: SampleRequest) -> bool:
        path = picture_path(self.folder, request.index)
        if not path.exists():
            return False
        same = settings_in(path) == json.loads(to_json(self.settings(request)))
        if not same and not self.overwrite:
            raise UserError(f"{path} was made with other settings: choose another --out, or give --overwrite")
        return same

    def _lines(self) -> dict[str, str] | None:
        """Lines of the manifest by the picture's name; None where the file is somebody else's."""
        path, found = self.folder / MANIFEST, dict[str, str]()
        if not path.is_file():
            return found
        try:
            for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
                entry = json.loads(line)
                if "model_sha256" not in entry or Path(entry["file"]).name != entry["file"]:
                    return None
                found[entry["file"]] = line
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return found

    def _draw(self, paths: Sequence[Path], columns: int) -> None:
        """grid.png of pictures of one size; of several sizes those of the first one's."""
        pictures = [read_shown(path) for path in paths]
        alike = [picture for picture in pictures if picture.shape == pictures[0].shape]
        if alike:
            height, width = alike[0].shape[1:]
            columns = columns or max(1, round((len(alike) * height / width) ** 0.5))
            write_atomically(self.folder / GRID, png(grid(torch.stack(alike), columns), {"grid": len(alike)}))
