"""Films, which are video files, animated images or folders of frames: in, out, and as clips to train on."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.data.datasets import SUFFIXES, Images, read_metadata, record_of, require_folder
from ldm.data.transforms import as_tensor, converted, fit_square

VIDEO = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
ANIMATED = {".gif", ".webp", ".avif"}  # which may hold one frame or many


class Frame(NamedTuple):
    file: Path
    number: int  # in the file
    image: Image.Image  # upright, of 8 bits


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("video files need the package av (pip install ldm[video]); GIF, WebP and folders of frames do not") from error
    return av


@contextmanager
def _opened(film: Path) -> Iterator[Any]:
    """A video file's container."""
    av = _av()
    try:
        with av.open(str(film)) as container:
            yield container
    except (av.FFmpegError, IndexError) as error:  # without a video stream: IndexError
        raise ValueError(f"{str(film)!r} cannot be read as a video ({error}): repair it, or take it away") from error


def frames_of(film: Path, channels: int = 3, window: tuple[float, float] | None = None) -> Iterator[Frame]:
    """One after the other; those of a folder in the order of their names.  A file with one image is a film of one frame.  channels, window:
    as read_image."""
    if film.is_dir():
        files = sorted(file for file in film.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"no images in {str(film)!r}: allowed are {' '.join(sorted(SUFFIXES))}")
        for file in files:
            with Image.open(file) as image:
                yield Frame(file, 0, converted(image, channels, window))
    elif film.suffix.lower() in VIDEO:
        with _opened(film) as container:
            for number, frame in enumerate(container.decode(video=0)):
                yield Frame(film, number, converted(frame.to_image(), channels))
    else:
        with Image.open(film) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                yield Frame(film, number, converted(image, channels, window))


def count_frames(film: Path) -> int:
    """Without decoding, but for GIF."""
    if film.is_dir():
        return sum(file.suffix.lower() in SUFFIXES for file in film.iterdir())
    if film.suffix.lower() in VIDEO:
        with _opened(film) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    with Image.open(film) as image:
        return getattr(image, "n_frames", 1)


def milliseconds_of(film: Path) -> float:
    """Of a frame; 100 where the film does not say."""
    if film.suffix.lower() in VIDEO:
        with _opened(film) as container:
            return 1000 / float(container.streams.video[0].average_rate or 10)
    if film.is_dir():
        return 100.0
    with Image.open(film) as image:
        image.load()  # WebP tells then
        return float(image.info.get("duration") or 100)


def write_film(images: Sequence[Image.Image], target: Path, milliseconds: float = 100) -> None:
    """A GIF, a lossless WebP, or a video (H.264) by the target's suffix."""
    if target.suffix not in VIDEO:
        images[0].save(target, save_all=True, append_images=images[1:], duration=round(milliseconds), loop=0, lossless=True)
        return
    av = _av()
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(1000 / milliseconds).limit_denominator(1001), options={"crf": "12"})
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuv444p" if stream.width % 2 or stream.height % 2 else "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


class ClipImages(Images):
    """Clips of `frames` frames as images of 3 * frames channels, cut from the films of a folder one after the other.

    A film is a video file, an animated GIF or WebP, or a folder of single images; stride: every so-manieth frame is taken.  Label and
    text are found for films as FolderImages finds them for images.
    """

    def __init__(self, path: str, size: int, frames: int, stride: int = 1) -> None:
        self.size, self.frames, self.stride, self.root, self.channels = size, frames, stride, Path(path).expanduser(), 3 * frames
        if min(frames, stride) < 1:
            raise ValueError(f"data.frames is {frames}, data.stride {stride}; both must be at least 1")
        require_folder(self.root, path, "films")
        span, lengths = (frames - 1) * stride + 1, self._lengths()
        if not (enough := [film for film, length in lengths.items() if length >= span]):
            found = f"the longest of {len(lengths)} films has {max(lengths.values())}" if lengths else "there are no films"
            raise ValueError(
                f"a clip of {frames} frames, every {stride}., needs {span} frames; in {path!r} {found}: give fewer or other films"
            )
        if len(enough) < len(lengths):
            warnings.warn(
                f"{len(lengths) - len(enough)} of {len(lengths)} films have fewer than {span} frames and are left out", stacklevel=2
            )
        self.places = [(film, start) for film in enough for start in range(0, lengths[film] - span + 1, span)]
        metadata = read_metadata(self.root)
        named = {film: record_of(film.relative_to(self.root), metadata) for film in enough}
        self.records = [replace(named[film], id=f"{named[film].id}#{start}") for film, start in self.places]

    def _lengths(self) -> dict[Path, int]:
        """Frames of every film, in the order of their names; each file is opened once."""
        lengths, folders = dict[Path, int](), set[Path]()
        for file in self.root.rglob("*"):
            suffix = file.suffix.lower()
            if not file.is_file() or suffix not in VIDEO | SUFFIXES:
                continue
            count = count_frames(file) if suffix in VIDEO | ANIMATED else 1
            if suffix in VIDEO or count > 1:
                lengths[file] = count
            else:
                folders.add(file.parent)
        lengths |= {folder: count_frames(folder) for folder in folders}
        return dict(sorted(lengths.items()))

    def pixels(self, index: int) -> Tensor:
        film, start = self.places[index]
        wanted = islice(frames_of(film), start, start + (self.frames - 1) * self.stride + 1, self.stride)
        shown = [as_tensor(fit_square(frame.image, self.size)) for frame in wanted]
        if len(shown) < self.frames:
            raise ValueError(f"{film} ends before its frame {start + (self.frames - 1) * self.stride}")
        return torch.cat(shown)

    def fingerprint(self) -> str:
        stats = [(film.stat().st_size, film.stat().st_mtime_ns) for film, _ in self.places]
        return hashlib.sha256(f"{super().fingerprint()} {self.frames} {self.stride} {stats}".encode()).hexdigest()
