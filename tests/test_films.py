"""Clips: films in and out, the autoencoder and the UNet of frames, and models of clips from the command line."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_DIFFUSION, normal, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from torch import nn

from ldm import model_folder
from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.cli import main
from ldm.data.clips import ClipImages
from ldm.data.film_writer import write_film
from ldm.data.films import VIDEO, count_frames, frames_of, timing_of
from ldm.degradations import LUMA, Grayscale
from ldm.errors import UserError
from ldm.frames import merge_frames, side_by_side, split_frames
from ldm.interfaces import Cond
from ldm.latents.clips import FrameStack
from ldm.latents.model import LatentDiffusion
from ldm.nn.attention import attend, attend_within
from ldm.nn.frames import FrameMixing
from ldm.nn.unet import UNet
from ldm.sampling.settings import settings_in
from ldm.sampling.writer import frames_in
from ldm.stages.inherit import start_from


def film(count: int, size: int = 64, seed: int = 0) -> list[Image.Image]:
    """A bright square that moves to the right, on a ground of its own colour."""
    ground = np.random.default_rng(seed).integers(0, 100, 3)
    frames = np.broadcast_to(ground, (count, size, size, 3)).astype(np.uint8).copy()
    for number, frame in enumerate(frames):
        frame[size // 4 : size // 2, 4 * number : 4 * number + size // 4] = 250 - ground
    return [Image.fromarray(frame) for frame in frames]


def pixels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames])


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven films of 7 frames: animated WebP, GIF, folders, and one that is too short."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(6):
        write_film(film(7, seed=number), folder / f"film{number}.webp")
    for number in range(6, 10):
        (folder / "stills" / f"film{number}").mkdir(parents=True)
        for index, frame in enumerate(film(7, seed=number)):
            frame.save(folder / "stills" / f"film{number}" / f"{index}.png")
    write_film(film(7, seed=10), folder / "film10.gif")
    write_film(film(2), folder / "short.webp")
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def test_apart_and_together_are_inverse_and_a_strip_shows_the_frames_in_order() -> None:
    clips = normal(2, 12, 4, 5)
    assert torch.equal(merge_frames(split_frames(clips, 4), 4), clips)
    assert torch.equal(split_frames(clips, 4)[5], clips[1, 3:6])
    assert torch.equal(side_by_side(clips, 4)[1, :, :, 10:15], clips[1, 6:9])
    assert torch.equal(side_by_side(clips, 1), clips)


@pytest.mark.parametrize("suffix", [".webp", ".mp4"])
def test_films_come_back_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    path, written = tmp_path / f"film{suffix}", film(9)
    write_film(written, path, 40)
    read = list(frames_of(path))
    assert [frame.number for frame in read] == list(range(9))
    assert count_frames(path) == 9
    assert np.mean(timing_of(path).milliseconds) == pytest.approx(40)
    error = np.abs(pixels([frame.image for frame in read]).astype(int) - pixels(written))
    assert error.max() == 0 if suffix == ".webp" else np.percentile(error, 90) <= 3, "H.264 keeps colour at half the size"


def test_clips_are_cut_from_films_one_after_the_other(films: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 12 films have fewer than 3 frames and are left out"):
        images = ClipImages(str(films), 32, frames=3)
    assert len(images) == 22, "two clips of each film of 7 frames"
    assert images.channels == 9
    by_id = {record.id: index for index, record in enumerate(images.records)}
    assert images.names == ["stills"], "a film's label is its sub-folder"
    for name, seed in (("film2.webp", 2), ("stills/film7", 7)):
        clip = images.pixels(by_id[f"{name}#3"])
        wanted = [frame.resize((32, 32), Image.Resampling.LANCZOS) for frame in film(7, seed=seed)[3:6]]
        assert np.array_equal(split_frames(clip[None], 3).permute(0, 2, 3, 1).numpy(), pixels(wanted))
    with pytest.warns(UserWarning, match="fewer than 7 frames"):
        strided = ClipImages(str(films), 32, frames=3, stride=3)
    assert len(strided) == 11
    assert torch.equal(
        split_frames(strided.pixels(1)[None], 3)[1], split_frames(images.pixels(by_id[f"{strided.records[1].id[:-1]}3"])[None], 3)[0]
    )
    assert strided.fingerprint() != images.fingerprint()


def test_bad_films(films: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a clip of 9 frames, every 1\., needs 9 frames; in .* the longest of 12 films has 7"):
        ClipImages(str(films), 32, frames=9)
    with pytest.raises(ValueError, match="there are no films"):
        ClipImages(str(tmp_path), 32, frames=2)
    with pytest.raises(ValueError, match=r"data.frames is 0, data.stride 1; both must be at least 1"):
        ClipImages(str(films), 32, frames=0)
    pytest.importorskip("av")
    (tmp_path / "no.mp4").write_bytes(b"no film")
    for use in (lambda path: list(frames_of(path)), count_frames, timing_of, lambda path: ClipImages(str(path.parent), 32, frames=2)):
        with pytest.raises(ValueError, match=r"no.mp4' cannot be read: .*; repair it, or take it away"):
            use(tmp_path / "no.mp4")


# -----------------------------------------------------------------------------------------------------------
# What is a film, and in which order
# -----------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return [frame.file.name for frame in frames_of(folder)]


def fill(folder: Path, *files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(files):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)
    return folder


def test_frames_of_a_folder_are_in_natural_order(tmp_path: Path) -> None:
    wanted = ["1.png", "01.png", "2.png", "10.PNG", "a1b10.png", "a1b9.png", "a02b1.png", "b.jpg"]
    fill(tmp_path, *sorted(wanted))
    wanted = ["01.png", "1.png", "2.png", "10.PNG", "a1b9.png", "a1b10.png", "a02b1.png", "b.jpg"]
    assert names(tmp_path) == wanted
    assert count_frames(tmp_path) == len(wanted)
    assert timing_of(tmp_path) == ([100.0] * len(wanted), 0, None)


def test_files_of_the_system_are_no_frames(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "1.png")
    for name in ("._0.png", ".hidden.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / "2.png").mkdir()
    assert names(tmp_path) == ["0.png", "1.png"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "._0.png").touch()
    with pytest.raises(UserError, match=r"no images in '.*none': allowed are \.apng "):
        list(frames_of(tmp_path / "none"))


def test_a_folder_of_ours_is_read_as_its_manifest_says(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "1.png", "2.png", "10.png", "grid.png", "preview.png", "0-steps.png")
    write_film(film(2), tmp_path / "animation.webp")
    lines = [json.dumps({"file": name, "seed": 0}) for name in ("10.png", "2.png", "1.png", "gone.png")]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n\n")
    assert names(tmp_path) == ["10.png", "2.png", "1.png"]
    assert count_frames(tmp_path) == 3
    assert timing_of(tmp_path).milliseconds == [100.0] * 3


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"\n",
        b"not json",
        b"\xff\xfe{}",
        b"[1]\n",
        b'{"audio_filepath": "a.wav"}\n',
        b'{"file": 3}\n',
        b'{"file": ["1.png"]}\n',
        b'{"file": "2.png"}\n{"files": "1.png"}\n',
        b'{"file": "2.png"}\n{"file": \n',
        b'{"file": "gone.png"}\n',
        b'{"file": "../outside.png"}\n',
        b'{"file": "sub/1.png"}\n',
        b'{"file": "\\u0000.png"}\n{"file": "\\ud800.png"}\n',
        b'{"file": "%s.png"}\n' % (b"x" * 5000),
        b"[" * 100_000,
        b'{"file": ' + b"9" * 10_000 + b"}\n",
        None,
    ],
    ids=range(18),
)
def test_a_manifest_that_is_not_ours_is_ignored(tmp_path: Path, manifest: bytes | None) -> None:
    fill(tmp_path, "outside.png")
    folder = fill(tmp_path / "frames", "1.png", "2.png", "grid.png")
    if manifest is None:
        (folder / "manifest.jsonl").mkdir()
    else:
        (folder / "manifest.jsonl").write_bytes(manifest)
    assert names(folder) == ["1.png", "2.png", "grid.png"]


@pytest.mark.parametrize(("kind", "name"), [("MPO", "phone.jpg"), ("TIFF", "scan.tif"), ("ICO", "x.ico")])
def test_images_that_do_not_follow_in_time_are_one_frame(tmp_path: Path, kind: str, name: str) -> None:
    first, *others = film(3)
    options = {"save_all": True} if kind != "ICO" else {"sizes": [(16, 16), (64, 64)]}
    first.save(tmp_path / name, kind, append_images=others, **options)
    (frame,) = frames_of(tmp_path / name)
    assert (frame.file, frame.number, frame.milliseconds) == (tmp_path / name, 0, 100)
    assert np.abs(np.asarray(frame.image).astype(int) - np.asarray(first)).mean() < 3
    assert count_frames(tmp_path / name) == 1
    assert timing_of(tmp_path / name) == ([100.0], 0, None)


def test_what_an_apng_shows_where_it_is_not_understood_is_no_frame(tmp_path: Path) -> None:
    still, *frames = film(4)
    options = {"default_image": True, "duration": [30, 40, 50]}
    still.save(tmp_path / "x.png", save_all=True, append_images=frames, **options)
    read = list(frames_of(tmp_path / "x.png"))
    assert [frame.number for frame in read] == [0, 1, 2]
    assert [frame.milliseconds for frame in read] == [30, 40, 50]
    assert np.array_equal(pixels([frame.image for frame in read]), pixels(frames))
    assert count_frames(tmp_path / "x.png") == 3


def test_transparent_parts_of_a_gif_are_white_in_every_frame(tmp_path: Path) -> None:
    wanted = film(3)
    frames = []
    for opaque in wanted:
        values = np.asarray(opaque)
        alpha = np.where((values == values[0, 0]).all(-1), 0, 255).astype(np.uint8)  # the ground
        frames.append(Image.fromarray(np.dstack([values, alpha])))
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], disposal=2)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.mode == "P"
        assert "transparency" in image.info
    for frame, opaque in zip(frames_of(tmp_path / "x.gif"), wanted, strict=True):
        values = np.asarray(opaque)
        shown = np.where((values == values[0, 0]).all(-1, keepdims=True), 255, values)
        assert np.array_equal(np.asarray(frame.image), shown)


# -----------------------------------------------------------------------------------------------------------
# Time, loops
# -----------------------------------------------------------------------------------------------------------

UNEVEN = [100, 1000, 100, 2000]
UNITS = {".gif": 10, ".webp": 1, ".png": 1, ".mp4": 1 / 90, ".mov": 1 / 90}  # ms


@pytest.mark.parametrize("loop", [None, 0, 3])
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_images_keep_their_durations_and_loops(tmp_path: Path, suffix: str, loop: int | None) -> None:
    path = tmp_path / f"x{suffix}"
    assert write_film(film(4), path, UNEVEN, loop) is None
    assert timing_of(path) == (UNEVEN, loop, None)
    assert [frame.milliseconds for frame in frames_of(path)] == UNEVEN
    with Image.open(path) as image:  # what others read
        assert image.info.get("loop") == (1 if loop is None and suffix != ".gif" else loop)
    copy = tmp_path / "copy.webp"
    write_film([frame.image for frame in frames_of(path)], copy, *timing_of(path))
    assert timing_of(copy) == (UNEVEN, loop, None)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif_keeps_its_durations(tmp_path: Path) -> None:
    first, *others = film(4)
    first.save(tmp_path / "x.avif", save_all=True, append_images=others, duration=UNEVEN)
    assert timing_of(tmp_path / "x.avif") == (UNEVEN, 0, None)
    assert [frame.milliseconds for frame in frames_of(tmp_path / "x.avif")] == UNEVEN
    assert count_frames(tmp_path / "x.avif") == 4


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_one_picture_is_a_film(tmp_path: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    path = tmp_path / f"x{suffix}"
    assert write_film(film(1), path, 250) is None
    assert len(list(frames_of(path))) == count_frames(path) == len(timing_of(path).milliseconds) == 1


@settings(deadline=None, max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("suffix", UNITS)
def test_whatever_the_durations_no_error_grows(scratch: Path, suffix: str, data: st.DataObject) -> None:
    if suffix in VIDEO:
        pytest.importorskip("av")
    step = UNITS[suffix]
    durations = data.draw(st.lists(st.floats(step, 3000), min_size=2, max_size=9))
    path = scratch / f"x{suffix}"
    note = write_film(film(len(durations)), path, durations)
    kept = timing_of(path).milliseconds
    assert len(kept) == len(durations)
    assert np.abs(np.cumsum(kept) - np.cumsum(durations)).max() <= step + 1e-3
    assert (note is not None) == (suffix == ".gif" and np.abs(np.subtract(kept, durations)).max() > 1.001)
    if note is not None:
        assert note == f"in '{path}' the durations of frames are rounded to steps of 10 ms, 655350 at most"


def test_films_that_cannot_be_written(tmp_path: Path) -> None:
    endings = r"\.gif \.m4v \.mkv \.mov \.mp4 \.png \.webp"
    with pytest.raises(UserError, match=rf"x.avi': choose one of the endings {endings}$"):
        write_film(film(2), tmp_path / "x.avi")
    for images, milliseconds in ((film(2), [100]), ([], 100)):
        with pytest.raises(ValueError, match="make no film") as error:
            write_film(images, tmp_path / "x.gif", milliseconds)
        assert not isinstance(error.value, UserError), "a mistake of ours"


# -----------------------------------------------------------------------------------------------------------
# Videos: time, turns, sound
# -----------------------------------------------------------------------------------------------------------

TIMES = (0, 100, 200, 1200, 1300, 1400, 3400, 3500)  # ms
STEPS = [100, 100, 1000, 100, 100, 2000, 100]


def record(
    path: Path,
    images: list[Image.Image],
    times: Sequence[int] = (),
    start: int = 0,
    **facts: Any,
) -> Path:
    """A video as others write it; facts: sound (a codec), matrix, ratio of pixels, options of x264, title."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", metadata_encoding="latin-1") as container:
        container.metadata["title"] = facts.get("title", "none")
        stream = container.add_stream("libx264", rate=10, options=facts.get("options", {}))
        (stream.width, stream.height), stream.pix_fmt = images[0].size, "yuv444p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = facts.get("ratio", Fraction(1))
        if "matrix" in facts:
            stream.set_display_matrix(facts["matrix"])
        sound = container.add_stream(facts["sound"], rate=48000, layout="mono") if "sound" in facts else None
        for image, time in zip(images, times or [None] * len(images), strict=True):
            frame = av.VideoFrame.from_image(image)
            if time is not None:
                frame.pts, frame.time_base = start + time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for number in range(170 if sound else 0):
            size = sound.codec_context.frame_size or 1024
            wave = np.sin(np.arange(number * size, (number + 1) * size) / 20) / 3
            kind = sound.codec_context.format.name
            values = wave.astype(np.float32) if kind.startswith("flt") else (wave * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(values[None], format=kind, layout="mono")
            frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
            frame.pts = number * size + start * 48
            container.mux(sound.encode(frame))
        if sound:
            container.mux(sound.encode())
    return path


def sound_of(path: Path) -> tuple[np.ndarray, list[bytes]]:
    """Times (ms) and bytes of all packets."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.dts is not None]
        times = [float(1000 * packet.pts * packet.time_base) for packet in packets]
        return np.array(times), [bytes(packet) for packet in packets]


@pytest.mark.parametrize("options", [{}, {"bf": "0"}], ids=["B-frames", "none"])
@pytest.mark.parametrize(("suffix", "start"), [(".mp4", 0), (".mkv", 0), (".mkv", 2000), (".mov", 0)])
def test_each_frame_of_a_video_keeps_its_time(tmp_path: Path, suffix: str, start: int, options: dict) -> None:
    images = film(8)
    path = record(tmp_path / f"in{suffix}", images, TIMES, start, options=options)
    read = list(frames_of(path))
    assert [frame.milliseconds for frame in read[:-1]] == STEPS
    assert 50 <= read[-1].milliseconds <= 250, "the last one's is estimated in some containers"
    assert timing_of(path).milliseconds == [frame.milliseconds for frame in read]
    assert count_frames(path) == 8
    assert np.abs(pixels([frame.image for frame in read]).astype(int) - pixels(images)).mean() < 12
    out = tmp_path / "out.mp4"
    assert write_film([frame.image for frame in read], out, timing_of(path).milliseconds) is None
    assert timing_of(out).milliseconds == pytest.approx(timing_of(path).milliseconds, abs=0.02)


@pytest.mark.parametrize("options", [{"bf": "3"}, {"bf": "0"}], ids=["B-frames", "none"])
def test_an_avi_has_one_rate(tmp_path: Path, options: dict) -> None:
    path = record(tmp_path / "in.avi", film(9), options=options)
    assert timing_of(path).milliseconds == [100.0] * 9


TURNED = {  # display matrix -> the colours of the four corners as they are to be seen, row by row
    (1, 0, 0, 1): "RGBW",
    (-1, 0, 0, 1): "GRWB",
    (1, 0, 0, -1): "BWRG",
    (-1, 0, 0, -1): "WBGR",
    (0, 1, -1, 0): "BRWG",  # clockwise, as phones held upright write
    (0, -1, 1, 0): "GWRB",
    (0, 1, 1, 0): "RBGW",
    (0, -1, -1, 0): "WGBR",
}
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


@pytest.mark.parametrize("matrix", TURNED)
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_videos_are_upright(tmp_path: Path, suffix: str, matrix: tuple[int, int, int, int]) -> None:
    stream = pytest.importorskip("av").video.stream.VideoStream
    if not hasattr(stream, "set_display_matrix"):
        pytest.skip("this av cannot write a display matrix")
    image = Image.new("RGB", (64, 32))
    for colour, place in zip("RGBW", [(0, 0), (32, 0), (0, 16), (32, 16)], strict=True):
        image.paste(COLOURS[colour], (*place, place[0] + 32, place[1] + 16))
    a, b, c, d = (value * 2**16 for value in matrix)
    path = record(tmp_path / f"x{suffix}", [image] * 3, matrix=[a, b, 0, c, d, 0, 0, 0, 2**30])
    for frame in frames_of(path):
        width, height = frame.image.size
        assert (width, height) == ((64, 32) if matrix[0] else (32, 64))
        corners = [frame.image.getpixel((x, y)) for y in (4, height - 5) for x in (4, width - 5)]
        wanted = [COLOURS[colour] for colour in TURNED[matrix]]
        assert np.abs(np.subtract(corners, wanted)).max() < 30


def test_pixels_that_are_not_square_become_so(tmp_path: Path) -> None:
    path = record(tmp_path / "x.mkv", film(3), ratio=Fraction(3, 2))
    assert {frame.image.size for frame in frames_of(path)} == {(96, 64)}


@pytest.mark.parametrize(
    ("name", "codec", "start"),
    [
        ("in.mp4", "aac", 0),
        ("in.mkv", "aac", 2000),
        ("in.mkv", "libopus", 0),
        ("in.mkv", "flac", 0),
        ("in.mov", "pcm_s16le", 0),
    ],
)
def test_sound_is_copied_as_it_is_and_in_time(tmp_path: Path, name: str, codec: str, start: int) -> None:
    path = record(tmp_path / name, film(8), TIMES, start, sound=codec)
    timing = timing_of(path)
    assert timing.sound == path
    images = [frame.image for frame in frames_of(path)]
    assert write_film(images, tmp_path / "out.mp4", *timing) is None
    (times, data), (kept_times, kept) = sound_of(path), sound_of(tmp_path / "out.mp4")
    assert data == kept
    assert np.abs(kept_times - (times - start)).max() < 1.5, "relative to the pictures"
    assert timing_of(tmp_path / "out.mp4").sound == tmp_path / "out.mp4"
    assert timing_of(tmp_path / "out.mp4").milliseconds == pytest.approx(timing.milliseconds, abs=0.02)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_sound_that_images_cannot_hold_is_told(tmp_path: Path, suffix: str) -> None:
    note = write_film(film(4), tmp_path / f"out{suffix}", [15] * 4, sound=Path("in.mp4"))
    assert note is not None
    assert note.endswith("the sound of 'in.mp4' is lost, which only a video can hold")
    assert ("rounded to steps of 10 ms" in note) == (suffix == ".gif")


def test_sound_that_a_video_cannot_hold_is_told(tmp_path: Path) -> None:
    path = record(tmp_path / "in.avi", film(4), sound="adpcm_ms")
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    sounds = {
        path: "'mp4' format does not support 'adpcm_ms' codec",
        record(tmp_path / "mute.mp4", film(4)): "there is none",
        tmp_path / "broken.mp4": "Invalid data found when processing input",
        tmp_path / "gone.mp4": "No such file or directory",
    }
    for sound, reason in sounds.items():
        note = write_film(film(4), tmp_path / "out.mp4", UNEVEN, sound=sound)
        assert note == f"the sound of '{sound}' is lost: 'out.mp4' cannot hold it as it is ({reason})"
        assert timing_of(tmp_path / "out.mp4") == (UNEVEN, None, None)


def test_a_title_that_is_not_utf_8_is_no_obstacle(tmp_path: Path) -> None:
    path = record(tmp_path / "x.mp4", film(3), title="été")
    assert len(list(frames_of(path))) == count_frames(path) == 3


def test_sound_alone_is_no_film(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux([*stream.encode(frame), *stream.encode()])
    for use in (lambda path: list(frames_of(path)), count_frames, timing_of):
        with pytest.raises(UserError, match=r"x.mp4' cannot be read: it has no pictures; repair it"):
            use(tmp_path / "x.mp4")


def test_without_av_a_sentence_tells_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (lambda: list(frames_of(tmp_path / "x.mp4")), lambda: write_film(film(2), tmp_path / "x.mp4")):
        with pytest.raises(UserError, match=r"^video files need the package av \(pip install ldm\[video\]\)"):
            use()


# -----------------------------------------------------------------------------------------------------------
# Damaged films
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Pillow's
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4", ".mkv"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_damaged_film_is_read_or_named(scratch: Path, suffix: str, data: st.DataObject) -> None:
    if suffix in VIDEO:
        pytest.importorskip("av")
    whole, path = scratch / f"whole{suffix}", scratch / f"damaged{suffix}"
    if not whole.exists():
        write_film(film(3, 16), whole, UNEVEN[:3])
    damaged = bytearray(whole.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(damaged) * 8 - 1), max_size=3)):
        damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    uses = {"frames": lambda path: list(frames_of(path)), "timing": timing_of, "count": count_frames}
    use, said = data.draw(st.sampled_from(sorted(uses))), None
    try:
        uses[use](path)
    except UserError as error:
        said = str(error)
    assert said is None or (str(path) in said and "\n" not in said)


def test_clips_of_apng_and_of_folders_in_natural_order(tmp_path: Path) -> None:
    write_film(film(4), tmp_path / "moving.png")
    stills = tmp_path / "stills"
    stills.mkdir()
    for number, frame in enumerate(film(12, seed=1)):
        frame.save(stills / f"{number}.png")
    for name in ("._moving.png", "stills/._0.png", "stills/.3.png"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    clips = ClipImages(str(tmp_path), 64, frames=4)
    assert [record.id for record in clips.records] == ["moving.png#0", "stills#0", "stills#4", "stills#8"]
    wanted = pixels(film(12, seed=1))
    for index in range(3):
        shown = split_frames(clips.pixels(index + 1)[None], 4).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(shown, wanted[4 * index : 4 * index + 4])


def test_a_damaged_still_is_told_where_it_is_read(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "1.png", "2.png", "3.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    clips = ClipImages(str(tmp_path), 4, frames=2)
    assert clips.pixels(0).shape == (6, 4, 4)
    with pytest.raises(UserError, match=r"2.png' cannot be read: it is in none of the formats"):
        clips.pixels(1)
    (tmp_path / "moving.gif").write_bytes(b"GIF89a")
    clips = ClipImages(str(tmp_path), 4, frames=2)
    assert len(clips) == 2
    assert "1 films that cannot be read" in clips.report.words()
    assert "moving.gif' cannot be read: " in clips.report.words()


# -----------------------------------------------------------------------------------------------------------
# Models of clips
# -----------------------------------------------------------------------------------------------------------


def test_a_stack_is_the_autoencoder_of_images_on_every_frame() -> None:
    images = randomise(ConvAutoencoder(KL(2), channels=16, multipliers=[1, 2], num_blocks=1)).eval()
    stack, x, noise = FrameStack(images, 3), normal(2, 9, 16, 16), normal(2, 6, 8, 8)
    with torch.no_grad():
        posterior = stack.encode(x)
        for frame in range(3):
            mine, z = slice(3 * frame, 3 * frame + 3), slice(2 * frame, 2 * frame + 2)
            wanted = images.encode(x[:, mine])
            torch.testing.assert_close(posterior.mode()[:, z], wanted.mode(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(posterior.sample(noise)[:, z], wanted.sample(noise[:, z]), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stack.decode(noise)[:, mine], images.decode(noise[:, z]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("token_dim", "learn_variance"), [(0, False), (6, True)])
def test_a_unet_of_clips_begins_as_that_of_images_where_frames_are_alike(token_dim: int, learn_variance: bool) -> None:
    arguments = {"in_channels": 2, "channels": 16, "multipliers": [1, 2], "num_blocks": 1, "attention_levels": [1], "vector_dim": 8}
    arguments |= {"token_dim": token_dim, "learn_variance": learn_variance, "concat_channels": 1}
    images, clips = randomise(UNet(**arguments)), UNet(**arguments, frames=3)
    assert (clips.in_channels, clips.concat_channels) == (6, 3)
    assert not clips.load_state_dict(images.state_dict(), strict=False).unexpected_keys
    x, t, concat = normal(2, 2, 8, 8), torch.tensor([3.0, 700.0]), normal(2, 1, 8, 8, seed=1)
    known = Cond(normal(2, 8), normal(2, 4, 6) if token_dim else None, torch.ones(2, 4, dtype=torch.bool) if token_dim else None)
    wanted = images(x, t, replace(known, concat=concat)).chunk(1 + learn_variance, dim=1)
    known = replace(known, concat=concat.repeat(1, 3, 1, 1))
    alike = clips(x.repeat(1, 3, 1, 1), t, known)
    torch.testing.assert_close(alike, torch.cat([part.repeat(1, 3, 1, 1) for part in wanted], dim=1), rtol=1e-5, atol=1e-5)
    moved = clips(torch.cat([x, x, normal(2, 2, 8, 8, seed=2)], dim=1), t, known)
    assert (moved - alike)[:, :2].abs().max() > 1e-4, "frames know of each other from the start"
    randomise(clips)
    frames = clips(x.repeat(1, 3, 1, 1), t, known)[:, :6].unflatten(1, (3, 2))
    assert (frames[:, 1:] - frames[:, :1]).abs().amax((0, 2, 3, 4)).min() > 1e-4, "a trained one knows which frame it makes"
    with pytest.raises(ValueError, match="frames is 0; allowed is 1"):
        UNet(**arguments, frames=0)


def test_grey_is_that_of_each_frame() -> None:
    clips = normal(2, 9, 4, 4)
    wanted = merge_frames(Grayscale()(split_frames(clips, 3)), 3)
    torch.testing.assert_close(Grayscale()(clips), wanted)
    torch.testing.assert_close(wanted[:, 4], (clips[:, 3:6] * torch.tensor(LUMA).view(3, 1, 1)).sum(1))
    assert torch.equal(Grayscale()(clips[:, :1]).round(decimals=5), clips[:, :1].round(decimals=5))


def test_frames_are_mixed_with_their_neighbours_at_each_position_by_itself() -> None:
    mixing, x = randomise(FrameMixing(8, 4, 1e-5)), normal(8, 8, 3, 5)
    mixing.norm = nn.Identity()
    changed = x.clone()
    changed[2, 0, 1, 2] += 1  # the third frame of the first clip at one place
    differs = (mixing(changed) - mixing(x)).abs().amax(1) > 1e-6
    reached = torch.zeros(8, 3, 5, dtype=torch.bool)
    reached[1:4, 1, 2] = True
    assert torch.equal(differs, reached)
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    assert (mixing(x[order]) - mixing(x)[order]).abs().max() > 1e-3


def test_attention_within_a_clip_is_that_of_one_long_image() -> None:
    qkv = normal(6, 5, 24)
    wanted = attend(*qkv.unflatten(0, (2, 3)).flatten(1, 2).chunk(3, dim=2), heads=2)
    torch.testing.assert_close(attend_within(qkv, 2, frames=3).reshape(2, 15, 8), wanted)
    torch.testing.assert_close(attend_within(qkv, 2), attend(*qkv.chunk(3, dim=2), heads=2))


def test_a_model_of_clips_starts_as_the_model_of_images(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "diffusion" / "model"
    old = model_folder.load(path).model
    arguments = {**old.denoiser.network.init_args, "frames": 4}
    stack = FrameStack(model_folder.load(path).model.latents.autoencoder, 4)
    new = LatentDiffusion(stack, UNet(**arguments), old.conditioner, old.denoiser.schedule, old.denoiser.prediction)
    start_from(new, str(path))
    told = capsys.readouterr().out
    assert "more; not used of it: nothing" in told
    assert all("frame" in name for name in told.split("not in it: ")[1].split(" and ")[0].split(", "))
    x, sigma = normal(1, 3, 16, 16).repeat(1, 4, 1, 1), torch.tensor(2.0)
    z = new.latents.to_latents(x)
    torch.testing.assert_close(z[:, 2:4], old.latents.to_latents(x[:, 3:6]))
    cond = Cond(normal(1, old.conditioner.vector_dim))
    torch.testing.assert_close(
        new.denoiser.predict(z, sigma, cond)[:, 2:4], old.denoiser.predict(z[:, 2:4], sigma, cond), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:1 of 12 films")
def test_clips_from_the_command_line(trained: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, folder = str(trained / "diffusion" / "model"), tmp_path / "run"
    command = ["fit", "-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/clips.yaml", "-c", "diffusion/digits.yaml"]
    command += ["-c", "finetune/video.yaml", *TINY_DIFFUSION, "--trainer.enable_model_summary=false", "--trainer.max_steps=2"]
    command += [f"--model.first_stage={start}", f"--model.init={start}", "--run", str(folder), f"--data.path={films}", "--data.size=32"]
    command += ["--data.batch_size=2", "--trainer.val_check_interval=2", "--data.frames=3"]
    assert main([*command, "--model.network.frames=4"]) == 1
    assert "makes clips of 4 frames: use -c data/clips.yaml with --data.frames 4" in capsys.readouterr().err
    assert main([*command, "--model.network.frames=3"]) == 0
    shown = next((folder / "video" / "pictures").glob("samples_*.png"))
    assert Image.open(shown).size == (2 * (3 * 32 + 2) + 2, 3 * (32 + 2) + 2), "five clips, two in a row"
    model, out = str(folder / "video" / "model"), tmp_path / "out"
    assert main(["sample", model, "--n=2", "--steps=2", "--device=cpu", "--out", str(out)]) == 0
    made = Image.open(out / "1.png")
    assert made.size == (96, 32)
    with Image.open(out / "1.webp") as moving:
        assert moving.n_frames == 3
        moving.seek(2)
        assert np.array_equal(np.asarray(moving.convert("RGB")), np.asarray(made.crop((64, 0, 96, 32))))
    assert main(["again", str(out / "1.png"), model, "--device=cpu", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "1.png").read_bytes() == (out / "1.png").read_bytes()

    write_film(film(6), tmp_path / "six.gif")
    write_film(film(7), tmp_path / "seven.gif")
    edit = ["sample", model, "--strength=0.5", "--steps=2", "--device=cpu", "--out", str(tmp_path / "film")]
    assert main([*edit, "--image", str(tmp_path / "seven.gif")]) == 1
    assert "clips of 3 frames" in capsys.readouterr().err
    assert main([*edit, "--image", str(tmp_path / "six.gif")]) == 0
    with Image.open(tmp_path / "film" / "animation.webp") as moving:
        assert moving.n_frames == 6
    second = settings_in(tmp_path / "film" / "1.png")
    assert second is not None
    assert second["frame"] == 3
    arguments = [str(tmp_path / "film" / "1.png"), model, "--image", str(tmp_path / "six.gif"), "--device=cpu"]
    assert main(["again", *arguments, "--out", str(tmp_path / "again2")]) == 0
    assert (tmp_path / "again2" / "1.png").read_bytes() == (tmp_path / "film" / "1.png").read_bytes()


@pytest.mark.filterwarnings("ignore:1 of 12 films")
def test_a_film_is_inpainted_by_a_model_of_clips(trained: Path, films: Path, tmp_path: Path) -> None:
    start = str(trained / "diffusion" / "model")
    command = ["fit", "-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/clips.yaml", "-c", "diffusion/digits.yaml"]
    command += ["-c", "finetune/video.yaml", "-c", "task/inpainting.yaml", *TINY_DIFFUSION, "--trainer.enable_model_summary=false"]
    command += [f"--model.first_stage={start}", f"--model.init={start}", "--run", str(tmp_path), f"--data.path={films}", "--data.size=32"]
    command += ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.batch_size=2", "--data.frames=3", "--data.cache=null"]
    command += ["--model.network.frames=3", "--model.network.concat_channels=3", "--model.conditioner.frames=3"]
    assert main([*command, "--model.conditioner.channels=2", "--trainer.limit_val_batches=1"]) == 0
    write_film(film(3, 32), tmp_path / "film.gif")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = ["--image", str(tmp_path / "film.gif"), "--mask", str(tmp_path / "mask.png"), "--watermark=false"]
    sample = ["sample", str(tmp_path / "inpainting" / "model"), *files, "--steps=2", "--device=cpu", "--out", str(tmp_path / "out")]
    assert main([*sample, "--n=2"]) == 0
    for made in (pixels(frames_in(tmp_path / "out" / f"{i}.png", 3)) for i in range(2)):
        shown = pixels([frame.image for frame in frames_of(tmp_path / "film.gif")])
        assert np.array_equal(made[:, :, :16], shown[:, :, :16]), "what is known has the given pixels in every frame"


def test_a_video_goes_in_and_a_video_of_the_same_pace_comes_out(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_film(film(3), tmp_path / "in.mp4", 50)
    command = ["sample", str(trained / "diffusion" / "model"), "--image", str(tmp_path / "in.mp4"), "--strength=0.5", "--steps=2"]
    assert main([*command, "--device=cpu", "--out", str(tmp_path / "out")]) == 0
    made = tmp_path / "out" / "animation.mp4"
    assert np.mean(timing_of(made).milliseconds) == pytest.approx(50)
    shown = pixels([frame.image.convert("L") for frame in frames_of(made)]).astype(int)
    wanted = pixels([Image.open(tmp_path / "out" / f"{i}.png").convert("L") for i in range(3)])
    assert shown.shape == wanted.shape == (3, 64, 64), "the shape of the film"
    assert np.abs(shown - wanted).mean() < 4, "brightness; H.264 keeps colour at half the size, and this model makes noise"
