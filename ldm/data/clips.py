"""Clips of films, to train on."""

import hashlib
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.datasets import SUFFIXES, Images, read_metadata, record_of, require_folder
from ldm.data.decode import (
    as_tensor,
    fit_square,
    is_hidden,
)
from ldm.data.films import ANIMATED, VIDEO, count_frames, frames_of
from ldm.errors import UserError


class ClipImages(Images):
    """Clips of `frames` frames as images of 3 * frames channels, cut one after the other from films.

    A film is a video file, an animated image or a folder of single images; stride: every so-manieth frame is
    taken.  Label and text are found for films as FolderImages finds them for images.
    """

    def __init__(self, path: str, size: int, frames: int, stride: int = 1) -> None:
        self.size, self.frames, self.stride, self.channels = size, frames, stride, 3 * frames
        self.root = Path(path).expanduser()
        if min(frames, stride) < 1:
            raise UserError(f"data.frames is {frames}, data.stride {stride}; both must be at least 1")
        require_folder(self.root, path, "films")
        span, lengths = (frames - 1) * stride + 1, self._lengths()
        if not (enough := [film for film, length in lengths.items() if length >= span]):
            found = "there are no films"
            if lengths:
                found = f"the longest of {len(lengths)} films has {max(lengths.values())}"
            wanted = f"a clip of {frames} frames, every {stride}., needs {span} frames"
            raise UserError(f"{wanted}; in {path!r} {found}: give fewer or other films")
        if len(enough) < len(lengths):
            short = f"{len(lengths) - len(enough)} of {len(lengths)}"
            warnings.warn(f"{short} films have fewer than {span} frames and are left out", stacklevel=2)
        self.places = [(film, start) for film in enough for start in range(0, lengths[film] - span + 1, span)]
        metadata = read_metadata(self.root)
        named = {film: record_of(film.relative_to(self.root), metadata) for film in enough}
        self.records = [replace(named[film], id=f"{named[film].id}#{start}") for film, start in self.places]

    def _lengths(self) -> dict[Path, int]:
        """Frames of every film, in the order of their names; each file is opened once."""
        lengths, folders = dict[Path, int](), set[Path]()
        for file in self.root.rglob("*"):
            suffix = file.suffix.lower()
            if suffix not in VIDEO | ANIMATED | SUFFIXES or not file.is_file():
                continue
            if is_hidden(file.relative_to(self.root)):
                continue
            try:
                count = count_frames(file) if suffix in VIDEO | ANIMATED else 1
            except UserError:
                if suffix != ".png":
                    raise
                count = 1  # a damaged still is counted where it is read (data.max_damaged)
            if suffix in VIDEO or count > 1:
                lengths[file] = count
            elif suffix in SUFFIXES:
                folders.add(file.parent)
        lengths |= {folder: count_frames(folder) for folder in folders}
        return dict(sorted(lengths.items()))

    def pixels(self, index: int) -> Tensor:
        film, start = self.places[index]
        wanted = islice(frames_of(film), start, start + (self.frames - 1) * self.stride + 1, self.stride)
        shown = [as_tensor(fit_square(frame.image, self.size)) for frame in wanted]
        if len(shown) < self.frames:
            last = start + (self.frames - 1) * self.stride
            raise UserError(f"{str(film)!r} ends before its frame {last}: repair it, or take it away")
        return torch.cat(shown)

    def fingerprint(self) -> str:
        stats = [(film.stat().st_size, film.stat().st_mtime_ns) for film, _ in self.places]
        facts = f"{super().fingerprint()} {self.frames} {self.stride} {stats}"
        return hashlib.sha256(facts.encode()).hexdigest()
