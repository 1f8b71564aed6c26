"""Films as files: animated images and videos, each frame for its own time."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.films import USUAL, container_of, video_library
from ldm.errors import UserError
from ldm.files import replacing

WRITTEN_VIDEO = {".mp4", ".m4v", ".mov", ".mkv"}  # which hold H.264 and frames of any duration
TICK = 1 / 90  # ms; the unit of time in videos that are written
STEPS = {".gif": (10, 655350), ".webp": (1, 2**24 - 1), ".png": (1, 65535)}  # unit and longest duration, ms


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
    if suffix not in WRITTEN_VIDEO.union(STEPS):
        allowed = " ".join(sorted(WRITTEN_VIDEO.union(STEPS)))
        raise UserError(f"a film cannot be written to {str(target)!r}: choose one of the endings {allowed}")
    with replacing(target) as temporary:
        if suffix in WRITTEN_VIDEO:
            lost = _write_video(images, temporary, durations, sound)
            return lost and f"the sound of {str(sound)!r} is lost: {target.name!r} cannot hold it as it is ({lost})"
        notes = _write_animation(images, temporary, durations, loop, sound)
    return f"in {str(target)!r} {' and '.join(notes)}" if notes else None


def _write_animation(
    images: Sequence[Image.Image], target: Path, durations: Sequence[float], loop: int | None, sound: Path | None
) -> list[str]:
    """What is not kept."""
    suffix, notes = target.suffix.lower(), list[str]()
    step, longest = STEPS[suffix]
    whole = [min(step * ticks, longest) for ticks in _in_steps(durations, step)]
    if loop is None and suffix != ".gif":  # where a GIF says nothing, the others say 1
        loop = 1
    images[0].save(target, save_all=True, append_images=images[1:], duration=whole, loop=loop, lossless=True)
    if any(abs(given - kept) > 1.001 for given, kept in zip(durations, whole, strict=True)):  # ms
        notes.append(f"the durations of frames are rounded to steps of {step} ms, {longest} at most")
    if sound is not None:
        notes.append(f"the sound of {str(sound)!r} is lost, which only a video can hold")
    return notes


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
    """Why the sound is lost; None: it is not."""
    av = video_library()
    try:
        _mux(images, target, durations, sound)
    except (av.FFmpegError, ValueError) as error:
        if sound is None:
            raise
        _mux(images, target, durations, None)
        return str(getattr(error, "strerror", None) or error)
    return None


def _mux(
    images: Sequence[Image.Image],
    target: Path,
    durations: Sequence[float],
    sound: Path | None,
) -> None:
    """Write a video, pictures and sound side by side as they are shown."""
    av = video_library()
    with ExitStack() as stack:
        output = stack.enter_context(av.open(str(target), "w"))
        packets = _encoded(images, output, durations)
        if sound is not None:
            source = stack.enter_context(container_of(sound))
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
    av = video_library()
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
