"""Films, which are video files, animated images or folders of frames: in, out, and as clips to train on."""

import hashlib
import heapq
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.datasets import SUFFIXES, Images, read_metadata, record_of, require_folder
from ldm.data.decode import (
    as_tensor,
    converted,
    fit_square,
    image_numbers,
    is_hidden,
    naming,
    opened,
    unreadable,
)
from ldm.errors import UserError

VIDEO = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
WRITTEN_VIDEO = {".mp4", ".m4v", ".mov", ".mkv"}  # which hold H.264 and frames of any duration
ANIMATED = {".gif", ".webp", ".avif", ".png", ".apng"}  # which may hold one frame or many
USUAL = 100.0  # ms of a frame, where the film does not say
TICK = 1 / 90  # ms; the unit of time in videos that are written
STEPS = {".gif": (10, 655350), ".webp": (1, 2**24 - 1), ".png": (1, 65535)}  # unit and longest duration, ms
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


def frames_of(film: Path, channels: int = 3, window: tuple[float, float] | None = None) -> Iterator[Frame]:
    """Frames one after the other; of a folder, its pictures in natural order (2.png before 10.png).

    A folder that `ldm sample` wrote has the pictures and the order of its manifest.  A file with one picture,
    or with several that are no animation, is a film of one frame.  channels, window: see read_picture.
    UserError where a file cannot be read.
    """
    if film.is_dir():
        for file in _pictures_in(film):
            with opened(file) as image, naming(file):
                frame = converted(image, channels, window)
            yield Frame(file, 0, frame, USUAL)
    elif film.suffix.lower() in VIDEO:
        with _opened_video(film) as container:
            for number, (shown, milliseconds) in enumerate(_decoded(container)):
                yield Frame(film, number, converted(_upright(shown, container), channels), milliseconds)
    else:
        with opened(film) as image:
            for number, milliseconds in enumerate(_decoded_images(film, image)):
                with naming(film):
                    frame = converted(image, channels, window)
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


def milliseconds_of(film: Path) -> float:
    """Of a frame, on average."""
    milliseconds = timing_of(film).milliseconds
    return sum(milliseconds) / len(milliseconds)


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


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        others = "GIF, WebP and folders of frames do not"
        raise UserError(f"video files need the package av (pip install ldm[video]); {others}") from error
    return av


def _container(film: Path) -> Any:
    """A video or sound file, opened."""
    av = _av()
    # a title that is not UTF-8 is no reason to refuse a film; av 19 reads it anyway and has no such option
    strict = hasattr(av.container.InputContainer, "metadata_errors")
    return av.open(str(film), **({"metadata_errors": "replace"} if strict else {}))


@contextmanager
def _opened_video(film: Path) -> Iterator[Any]:
    """A video file's container; what is wrong with the file becomes a UserError, inside as well."""
    av = _av()
    try:
        with _container(film) as container:
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
    av = _av()
    image, ratio = shown.to_image(), container.streams.video[0].sample_aspect_ratio
    if ratio and 0.01 < abs(ratio - 1) < 9:  # less is rounding, more is damage
        image = image.resize((max(1, round(image.width * ratio)), image.height), Image.Resampling.LANCZOS)
    matrix = shown.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if matrix is None:
        return image
    (a, b, _), (c, d, _), _ = np.round(np.frombuffer(bytes(matrix), np.int32).reshape(3, 3) / 2**16).tolist()
    turn = TURNS.get((a, b, c, d))  # none where it stands upright, or leans
    return image if turn is None else image.transpose(turn)


def write_film(
    images: Sequence[Image.Image],
    target: Path,
    milliseconds: float | Sequence[float] = USUAL,
    loop: int | None = 0,
    sound: Path | None = None,
) -> str | None:
    """Write a GIF, a lossless WebP or PNG, or a video (H.264) by the target's suffix.

    milliseconds: of all frames or of each; loop: as in Timing, not for videos; sound: a file whose sound a
    video takes over as it is.  GIF, WebP and PNG join successive frames that are alike.  Returns one sentence
    on what is not kept, if anything.  UserError for other suffixes.
    """
    durations = list(milliseconds) if isinstance(milliseconds, Sequence) else [milliseconds] * len(images)
    if not images or len(durations) != len(images):
        raise ValueError(f"{len(images)} images with {len(durations)} durations make no film")
    suffix = target.suffix.lower()
    if suffix in WRITTEN_VIDEO:
        return _write_video(images, target, durations, sound)
    if suffix not in STEPS:
        allowed = " ".join(sorted(WRITTEN_VIDEO.union(STEPS)))
        raise UserError(f"a film cannot be written to {str(target)!r}: choose one of the endings {allowed}")
    return _write_animation(images, target, durations, loop, sound)


def _write_animation(
    images: Sequence[Image.Image],
    target: Path,
    durations: Sequence[float],
    loop: int | None,
    sound: Path | None,
) -> str | None:
    suffix, notes = target.suffix.lower(), []
    step, longest = STEPS[suffix]
    whole = [min(step * ticks, longest) for ticks in _in_steps(durations, step)]
    if loop is None and suffix != ".gif":  # where a GIF says nothing, the others say 1
        loop = 1
    images[0].save(target, save_all=True, append_images=images[1:], duration=whole, loop=loop, lossless=True)
    if any(abs(given - kept) > 1.001 for given, kept in zip(durations, whole, strict=True)):  # ms
        notes.append(f"the durations of frames are rounded to steps of {step} ms, {longest} at most")
    if sound is not None:
        notes.append(f"the sound of {str(sound)!r} is lost, which only a video can hold")
    return f"in {str(target)!r} {' and '.join(notes)}" if notes else None


def _in_steps(milliseconds: Iterable[float], step: float) -> list[int]:
    """Durations in whole steps of so many ms, at least one; sums are rounded, so that no error grows."""
    steps, end, given = list[int](), 0, 0.0
    for duration in milliseconds:
        given += duration / step
        steps.append(max(1, round(given) - end))
        end += steps[-1]
    return steps


def _write_video(
    images: Sequence[Image.Image],
    target: Path,
    durations: Sequence[float],
    sound: Path | None,
) -> str | None:
    av = _av()
    try:
        _mux(images, target, durations, sound)
    except (av.FFmpegError, ValueError) as error:
        if sound is None:
            raise
        _mux(images, target, durations, None)
        reason = getattr(error, "strerror", None) or error
        return f"the sound of {str(sound)!r} is lost: {target.name!r} cannot hold it as it is ({reason})"
    return None


def _mux(
    images: Sequence[Image.Image],
    target: Path,
    durations: Sequence[float],
    sound: Path | None,
) -> None:
    """Write a video, pictures and sound side by side as they are shown."""
    av = _av()
    with ExitStack() as stack:
        output = stack.enter_context(av.open(str(target), "w"))
        packets = _encoded(images, output, durations)
        if sound is not None:
            source = stack.enter_context(_container(sound))
            packets = heapq.merge(packets, _sound(source, output), key=_time)
        for packet in packets:
            output.mux(packet)


def _time(packet: Any) -> float:
    return float(packet.dts * packet.time_base)


def _encoded(images: Sequence[Image.Image], output: Any, durations: Sequence[float]) -> Iterator[Any]:
    """Packets of a stream of H.264 that is added to the output at once."""
    ticks, base = _in_steps(durations, TICK), Fraction(1, round(1000 / TICK))
    rate = max((Fraction(len(ticks), sum(ticks)) / base).limit_denominator(1001), Fraction(1, 1001))
    # With B-frames the times of decoding, from which an MP4 has its durations, were not those of showing.
    stream = output.add_stream("libx264", rate=rate, options={"crf": "12", "bf": "0"})
    stream.width, stream.height = images[0].size
    stream.pix_fmt = "yuv444p" if stream.width % 2 or stream.height % 2 else "yuv420p"
    stream.codec_context.time_base = base
    return _packets(images, stream, ticks)


def _packets(images: Sequence[Image.Image], stream: Any, ticks: Sequence[int]) -> Iterator[Any]:
    av = _av()
    durations, start = iter(ticks), 0

    def timed(packets: list[Any]) -> Iterator[Any]:
        for packet in packets:
            packet.duration = next(durations)  # packets come in the order of the frames
            yield packet

    for image, duration in zip(images, ticks, strict=True):
        frame = av.VideoFrame.from_image(image)
        frame.pts, frame.time_base = start, stream.codec_context.time_base
        start += duration
        yield from timed(stream.encode(frame))
    yield from timed(stream.encode())


def _sound(source: Any, output: Any) -> Iterator[Any]:
    """Packets of all sound of a file, as they are, but for their time: its first picture, if any, is at 0."""
    videos = [video for video in source.streams.video if video.start_time is not None]
    copies = {stream.index: output.add_stream_from_template(stream) for stream in source.streams.audio}
    if not copies:
        raise ValueError("there is none")

    def packets() -> Iterator[Any]:
        for packet in source.demux(*source.streams.audio):
            if packet.dts is None:  # at the end
                continue
            shift = round(videos[0].start_time * videos[0].time_base / packet.time_base) if videos else 0
            packet.dts -= shift
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.stream = copies[packet.stream.index]
            yield packet

    return packets()


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
