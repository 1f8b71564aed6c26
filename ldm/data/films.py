"""Films, which are video files, animated images or folders of frames, read frame by frame."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.decode import SUFFIXES, image_numbers, is_hidden, naming, opened, unreadable
from ldm.data.modes import converted
from ldm.errors import UserError

VIDEO = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
ANIMATED = {".gif", ".webp", ".avif", ".png", ".apng"}  # which may hold one frame or many
USUAL = 100.0  # ms of a frame, where the film does not say
# What a display matrix [[a, b], [c, d]] does to a picture: it moves x, y (down) to a x + c y, b x + d y.
TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


class Frame(NamedTuple):
    """One picture of a film."""

    file: Path
    number: int  # in the file
    image: Image.Image  # upright, of 8 bits
    milliseconds: float  # for which it is shown


class Timing(NamedTuple):
    """What a film says beside its pictures."""

    milliseconds: list[float]  # of each frame
    loop: int | None  # number of repetitions as the file has it, 0 endless; None: it is shown once
    sound: Path | None  # the file with the sound, if there is any


def frames_of(film: Path, channels: int = 3, window: tuple[float, float] | None = None, deep: bool = False) -> Iterator[Frame]:
    """Frames one after the other; of a folder, its pictures in natural order (2.png before 10.png).

    A folder that `ldm sample` wrote has the pictures and the order of its manifest.  A file with one picture,
    or with several that are no animation, is a film of one frame.  channels, window, deep: see converted.
    UserError where a file cannot be read.
    """
    if film.is_dir():
        for file in _pictures_in(film):
            with opened(file) as image, naming(file):
                frame = converted(image, channels, window, deep)
            yield Frame(file, 0, frame, USUAL)
    elif film.suffix.lower() in VIDEO:
        with _opened_video(film) as container:
            for number, (shown, milliseconds) in enumerate(_decoded(container)):
                yield Frame(film, number, converted(_upright(shown, container), channels), milliseconds)
    else:
        with opened(film) as image:
            for number, milliseconds in enumerate(_decoded_images(film, image)):
                with naming(film):
                    frame = converted(image, channels, window, deep)
                yield Frame(film, number, frame, milliseconds)


def count_frames(film: Path) -> int:
    """Number of frames, without decoding any but of GIF.  UserError where the file cannot be read."""
    if film.is_dir():
        return len(_pictures_in(film))
    if film.suffix.lower() in VIDEO:
        with _opened_video(film) as container:
            return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video=0))
    with opened(film, header_only=True) as image, naming(film):
        return len(image_numbers(image))


def timing_of(film: Path) -> Timing:
    """What a film says beside its pictures; it is decoded to the end.  UserError where it cannot be read."""
    if film.is_dir():
        return Timing([USUAL] * len(_pictures_in(film)), 0, None)
    if film.suffix.lower() in VIDEO:
        with _opened_video(film) as container:
            milliseconds = [milliseconds for _, milliseconds in _decoded(container)]
            return Timing(milliseconds, None, film if container.streams.audio else None)
    with opened(film) as image:
        loop, milliseconds = image.info.get("loop"), list(_decoded_images(film, image))
        if image.format != "GIF":  # which alone says "once" by saying nothing; Pillow tells nothing of AVIF
            loop = None if loop == 1 else loop or 0
        return Timing(milliseconds, loop if len(milliseconds) > 1 else 0, None)


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in their order.  UserError where there are none."""
    with naming(folder):
        images = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    files = {file.name: file for file in images if not is_hidden(Path(file.name))}
    if not files:
        raise UserError(f"no images in {str(folder)!r}: allowed are {' '.join(sorted(SUFFIXES))}")
    # names of the manifest are looked up, and never taken for paths
    listed = [files[name] for name in _names_in_manifest(folder / "manifest.jsonl") if name in files]
    return listed or [files[name] for name in sorted(files, key=lambda name: (_natural(name), name))]


def _natural(name: str) -> list[str | int]:
    """A key that orders numbers in names by their value; texts and numbers take turns in it."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _names_in_manifest(path: Path) -> list[str]:
    """Names of the pictures that `ldm sample` wrote, in its order; none where it is no manifest of ours."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError):
        return []
    names = [entry.get("file") if isinstance(entry, dict) else None for entry in entries]
    known = [name for name in names if isinstance(name, str)]
    return list(dict.fromkeys(known)) if len(known) == len(names) else []


def _decoded_images(film: Path, image: Image.Image) -> Iterator[float]:
    """Seek in an opened image from frame to frame; yields for how many ms each is shown."""
    with naming(film):
        numbers = image_numbers(image)
    for number in numbers:
        with naming(film):
            image.seek(number)
            image.load()  # WebP and AVIF tell the duration only then
        yield float(image.info.get("duration") or USUAL)


def video_library() -> Any:
    try:
        import av
    except ImportError as error:
        others = "GIF, WebP and folders of frames do not"
        raise UserError(f"video files need the package av (pip install ldm[video]); {others}") from error
    return av


def container_of(film: Path) -> Any:
    """A video or sound file, opened."""
    av = video_library()
    # a title that is not UTF-8 is no reason to refuse a film; av 19 reads it anyway and has no such option
    strict = hasattr(av.container.InputContainer, "metadata_errors")
    return av.open(str(film), **({"metadata_errors": "replace"} if strict else {}))


@contextmanager
def _opened_video(film: Path) -> Iterator[Any]:
    """A video file's container; what is wrong with the file becomes a UserError, inside as well."""
    av = video_library()
    try:
        with container_of(film) as container:
            if not container.streams.video:
                raise ValueError("it has no pictures")
            yield container
    except UserError:
        raise
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise unreadable(film, error) from error


def _decoded(container: Any) -> Iterator[tuple[Any, float]]:
    """Frames of a video, and for how many ms each is shown: until the next, whatever the rate is."""
    stream, shown = container.streams.video[0], None
    usual = 1000 / float(stream.average_rate or 1000 / USUAL)
    for shown, after in pairwise(chain(container.decode(stream), [None])):
        start, end = shown.pts, None if after is None else after.pts
        if after is None and start is not None:
            end = start + (getattr(shown, "duration", None) or 0)  # av 14 does not know it
        # an AVI has one rate for all frames, and its times are those of decoding
        known = container.format.name != "avi" and start is not None and end is not None and end > start
        yield shown, float(1000 * (end - start) * shown.time_base) if known else usual
    if shown is None:
        raise ValueError("it has no pictures")


def _upright(shown: Any, container: Any) -> Image.Image:
    """A frame as it is meant to be seen: with square pixels, turned and mirrored by the display matrix."""
    av = video_library()
    image, ratio = shown.to_image(), container.streams.video[0].sample_aspect_ratio
    if ratio and 0.01 < abs(ratio - 1) < 9:  # less is rounding, more is damage
        image = image.resize((max(1, round(image.width * ratio)), image.height), Image.Resampling.LANCZOS)
    matrix = shown.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if matrix is None:
        return image
    (a, b, _), (c, d, _), _ = np.round(np.frombuffer(bytes(matrix), np.int32).reshape(3, 3) / 2**16).tolist()
    turn = TURNS.get((a, b, c, d))  # none where it stands upright, or leans
    return image if turn is None else image.transpose(turn)
