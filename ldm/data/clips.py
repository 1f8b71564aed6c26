"""Clips of films, to train on."""

import hashlib
import warnings
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from ldm.data.decode import SUFFIXES
from ldm.data.films import ANIMATED, VIDEO, count_frames, frames_of
from ldm.data.images import Images
from ldm.data.modes import as_tensor
from ldm.data.open import folder_of
from ldm.data.pixels import fitted
from ldm.data.records import Record, Records
from ldm.data.sources.annotations import TABLES
from ldm.data.sources.rows import Rows
from ldm.data.sources.tree_source import suffix_of
from ldm.data.sources.trees import Folder
from ldm.errors import UserError


class ClipImages(Images):
    """Clips of `frames` frames as images of 3 * frames channels, cut one after the other from films.

    A film is a video file, an animated image or a folder of single images; stride: every so-manieth frame is
    taken.  Label and text are found for films as for images.
    """

    def __init__(self, path: str, size: int, frames: int, stride: int = 1) -> None:
        self.size, self.frames, self.stride, self.channels = size, frames, stride, 3 * frames
        if min(frames, stride) < 1:
            raise UserError(f"data.frames is {frames}, data.stride {stride}; both must be at least 1")
        self.tree = Folder(folder_of(path, "films"))
        self.report = self.tree.report
        span, lengths = (frames - 1) * stride + 1, self._lengths()
        if not (enough := [film for film, length in lengths.items() if length >= span]):
            found = f"there are no films{self.report.words()}"
            if lengths:
                found = f"the longest of {len(lengths)} films has {max(lengths.values())}"
            wanted = f"a clip of {frames} frames, every {stride}., needs {span} frames"
            raise UserError(f"{wanted}; in {path!r} {found}: give fewer or other films")
        if len(enough) < len(lengths):
            short = f"{len(lengths) - len(enough)} of {len(lengths)}"
            warnings.warn(f"{short} films have fewer than {span} frames and are left out", stacklevel=2)
        self.places = [(self.tree.path / film, start) for film in enough for start in range(0, lengths[film] - span + 1, span)]
        rows = self._rows()
        known = {film: _record(film, rows) for film in enough}
        self.records = Records(
            replace(known[film], id=f"{film}#{start}") for film in enough for start in range(0, lengths[film] - span + 1, span)
        )
        self.report.what, self.report.rows_without_file = "a folder of films", rows.without_file()
        self.report.files_without_row = rows.without_row

    def _rows(self) -> Rows:
        """What the folder's metadata say of films."""
        rows = Rows()
        for suffix in TABLES:
            if (file := self.tree.path / f"metadata{suffix}").is_file():
                rows.read(file.name, file.read_bytes(), self.report)
        return rows

    def _lengths(self) -> dict[str, int]:
        """Frames of every film, in the order of their names; each file is opened once."""
        lengths, folders = dict[str, int](), dict[str, None]()
        for index, name in enumerate(self.tree.names):
            suffix = suffix_of(name)
            if suffix not in VIDEO | ANIMATED | SUFFIXES:
                continue
            try:
                count = count_frames(self.tree.read(index)) if suffix in VIDEO | ANIMATED else 1
            except UserError as error:
                if suffix != ".png":
                    self.report.leave_out("films that cannot be read", str(error))
                    continue
                count = 1  # a damaged still is counted where it is read (data.max_damaged)
            if suffix in VIDEO or count > 1:
                lengths[name] = count
            elif suffix in SUFFIXES:
                folders[name.rpartition("/")[0]] = None
        lengths |= {folder or ".": count_frames(self.tree.path / folder) for folder in folders}
        return dict(sorted(lengths.items()))

    def pixels(self, index: int, draw: int = 0) -> Tensor:
        film, start = self.places[index]
        wanted = islice(frames_of(film), start, start + (self.frames - 1) * self.stride + 1, self.stride)
        shown = [as_tensor(fitted(frame.image, (self.size, self.size), "lanczos")) for frame in wanted]
        if len(shown) < self.frames:
            last = start + (self.frames - 1) * self.stride
            raise UserError(f"{str(film)!r} ends before its frame {last}: repair it, or take it away")
        return torch.cat(shown)

    def fingerprint(self) -> str:
        stats = [(film.stat().st_size, film.stat().st_mtime_ns) for film, _ in self.places]
        facts = f"{super().fingerprint()} {self.frames} {self.stride} {stats}"
        return hashlib.sha256(facts.encode()).hexdigest()


def _record(film: str, rows: Rows) -> Record:
    """What a row says of a film, or without any classes in rows its sub-folder."""
    row = rows.of(film)
    label = (row.label if row else None) if rows.has_labels else film.split("/")[0] if "/" in film else None
    return Record.of(film, label, row.texts if row else (), row.numbers if row else None)
