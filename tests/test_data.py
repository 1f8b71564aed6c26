"""Pixels, image sources, the order of training and damaged files (ldm/data)."""

import csv
import json
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from toys import Noise, NoiseData, epoch_of, fake_trainer

from ldm.data.augment import Augment
from ldm.data.batches import Keyed
from ldm.data.decode import SUFFIXES, read_pixels
from ldm.data.images import DigitImages, EmojiImages, SourceImages
from ldm.data.modes import as_rgb, as_tensor
from ldm.data.module import Digits, Emoji, Folder, ImageData
from ldm.data.order import Groups, HeldOutOrder, Key, Order
from ldm.data.pixels import PixelRule, fitted
from ldm.data.records import Record, Records
from ldm.data.split import split, split_by_position
from ldm.data.transforms import as_image, grid
from ldm.interfaces import Batch
from ldm.ranges import to_float, to_uint8

quick = settings(deadline=None, max_examples=60)

EXIF_ORIENTATION = 0x0112


def read_image(path: Path, size: int, channels: int = 3) -> Tensor:
    """A picture as a set of pictures has it, resized by Lanczos."""
    return PixelRule(channels, {"16": (0, 65535)}, resize="lanczos").pixels(path, path.name, (size, size))


def rgb(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_images(folder: Path, names: list[str], size: int = 4) -> list[np.ndarray]:
    arrays = [rgb(size, size, seed) for seed in range(len(names))]
    for name, array in zip(names, arrays, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name)
    return arrays


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def test_every_value_survives_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert x.dtype == torch.float32
    assert (float(x[0]), float(x[-1])) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(x.double()), values)


def test_rounded_and_clamped() -> None:
    offset = torch.tensor([-0.4, 0.4]) / 127.5
    for value in range(256):
        near = to_float(torch.tensor(value, dtype=torch.uint8)) + offset
        assert to_uint8(near).tolist() == [value, value], "rounded to the nearest, not truncated"
    outside = torch.tensor([-1.01, -50.0, -float("inf"), 1.01, 50.0, float("inf")])
    assert to_uint8(outside).tolist() == [0, 0, 0, 255, 255, 255]
    assert to_uint8(torch.tensor([-1 + 0.6 / 127.5, 1 - 0.6 / 127.5])).tolist() == [1, 254]


@pytest.mark.parametrize(("count", "columns", "gap"), [(1, 1, 0), (5, 3, 2), (6, 3, 1), (4, 7, 3), (8, 2, 2)])
def test_grid(count: int, columns: int, gap: int) -> None:
    height, width = 3, 4
    images = torch.randint(0, 255, (count, 3, height, width), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    rows = -(-count // columns)
    expected = torch.full((3, gap + rows * (height + gap), gap + columns * (width + gap)), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        expected[:, top : top + height, left : left + width] = image
    made = grid(images, columns, gap)
    assert made.dtype == torch.uint8
    assert torch.equal(made, expected)


def test_grid_has_a_gap_of_two() -> None:
    images = torch.zeros(4, 3, 5, 5, dtype=torch.uint8)
    assert torch.equal(grid(images, 2), grid(images, 2, gap=2))
    assert grid(images, 2).shape == (3, 2 + 2 * 7, 2 + 2 * 7)


def test_tensor_and_image_are_inverse(tmp_path: Path) -> None:
    array = rgb(3, 5)
    tensor = as_tensor(Image.fromarray(array))
    assert tensor.shape == (3, 3, 5)
    assert torch.equal(tensor, torch.from_numpy(array).permute(2, 0, 1))
    assert np.array_equal(np.asarray(as_image(tensor)), array)
    as_image(tensor).save(tmp_path / "x.png")
    assert torch.equal(read_pixels(tmp_path / "x.png"), tensor)


# what a viewer does with the stored pixels (EXIF 2.32, tag 0x0112), and its inverse
DISPLAY: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
STORE = {**DISPLAY, 6: DISPLAY[8], 8: DISPLAY[6]}


@pytest.mark.parametrize("orientation", sorted(DISPLAY))
@pytest.mark.parametrize("shape", [(6, 6), (4, 7)])
def test_exif_orientation(tmp_path: Path, orientation: int, shape: tuple[int, int]) -> None:
    upright = rgb(*shape)
    stored = np.ascontiguousarray(STORE[orientation](upright))
    assert np.array_equal(DISPLAY[orientation](stored), upright)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(as_rgb(image)), upright)
    if shape[0] == shape[1]:
        assert torch.equal(read_image(tmp_path / "x.png", shape[0]), torch.from_numpy(upright).permute(2, 0, 1))


def test_exif_orientation_of_a_jpeg(tmp_path: Path) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:, 16:] = 200
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1))).save(tmp_path / "x.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        made = np.asarray(as_rgb(image)).astype(int)
    assert made.shape == upright.shape
    assert np.abs(made - upright).max() <= 4


def over(colour: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    return colour * (alpha / 255.0) + background * (1 - alpha / 255.0)


@pytest.mark.parametrize(("background", "value"), [("white", 255), ("black", 0)])
def test_alpha_is_composited(tmp_path: Path, background: str, value: int) -> None:
    colour = rgb(4, 8)
    alpha = np.repeat(np.array([[0, 1, 64, 128, 200, 254, 255, 255]], dtype=np.uint8), 4, axis=0)[..., None]
    Image.fromarray(np.concatenate([colour, alpha], 2)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "RGBA"
        made = np.asarray(as_rgb(image, background)).astype(float)
        if background == "white":
            assert np.array_equal(np.asarray(as_rgb(image)), made.astype(np.uint8)), "white is the default"
    assert np.abs(made - over(colour, alpha, value)).max() <= 1
    assert (made[:, 0] == value).all()
    assert np.array_equal(made[:, -2:], colour[:, -2:])


def test_grey_with_alpha(tmp_path: Path) -> None:
    pixels = np.array([[[100, 0], [100, 255], [0, 128]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "LA"
        made = np.asarray(as_rgb(image)).astype(int)
    assert made[0, :2].tolist() == [[255] * 3, [100] * 3]
    assert np.abs(made[0, 2] - 127).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_transparency_is_white(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode=None).convert("P")
    image.putdata([0, 1, 2, 1])
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255])
    image.save(tmp_path / f"x.{suffix}", transparency=1)
    with Image.open(tmp_path / f"x.{suffix}") as opened:
        assert opened.mode == "P"
        made = np.asarray(as_rgb(opened))
    assert made.reshape(-1, 3).tolist() == [[10, 20, 30], [255, 255, 255], [0, 0, 255], [255, 255, 255]]


def test_grey_png(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(values).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png", 8), torch.from_numpy(values).expand(3, 8, 8))


def png16(values: np.ndarray) -> bytes:
    """A 16-bit grey PNG written by hand, so that no reader's idea of it is assumed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_16_bit_png_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65407], [65535, 65278, 1, 514], [256 * 77, 257 * 77, 40000, 50000]])
    (tmp_path / "x.png").write_bytes(png16(values))
    expected = torch.from_numpy(np.round(values / 65535 * 255).astype(np.uint8))
    assert expected.max() == 255
    assert torch.equal(read_image(tmp_path / "x.png", 4), expected.expand(3, 4, 4))


@pytest.mark.parametrize(
    ("cmyk", "expected"), [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 127), (0, 128, 128))]
)
def test_cmyk_jpeg(tmp_path: Path, cmyk: tuple[int, ...], expected: tuple[int, ...]) -> None:
    Image.new("CMYK", (16, 16), cmyk).save(tmp_path / "x.jpg", quality=100)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.mode == "CMYK"
    made = read_image(tmp_path / "x.jpg", 16).int()
    assert (made - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2


def test_one_bit_image(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).random((8, 8)) < 0.5
    Image.fromarray(bits).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "1"
    assert torch.equal(read_image(tmp_path / "x.png", 8), torch.from_numpy(bits).byte().mul(255).expand(3, 8, 8))


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    array = rgb(8, 20)
    Image.fromarray(array).save(tmp_path / "wide.png")
    Image.fromarray(np.ascontiguousarray(array.transpose(1, 0, 2))).save(tmp_path / "tall.png")
    centre = torch.from_numpy(array[:, 6:14]).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "wide.png", 8), centre)
    assert torch.equal(read_image(tmp_path / "tall.png", 8), centre.transpose(1, 2))
    whole = Image.fromarray(array[:, 6:14]).resize((4, 4), Image.Resampling.LANCZOS)
    assert torch.equal(as_tensor(fitted(Image.fromarray(array[:, 6:14]), (4, 4), "lanczos")), as_tensor(whole))


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def test_folder_recursion_and_labels(tmp_path: Path) -> None:
    names = ["b/x.png", "a/deep/y.png", "a/z.PNG", "top.bmp"]
    arrays = write_images(tmp_path, names)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    images = SourceImages(str(tmp_path), 4)
    assert len(images) == 4
    assert [r.id for r in images.records] == ["a/deep/y.png", "a/z.PNG", "b/x.png", "top.bmp"]
    assert [r.label for r in images.records] == ["a", "a", "b", None]
    assert [r.text for r in images.records] == [""] * 4
    assert images.names == ["a", "b"]
    for record, pixels in zip(images.records, map(images.pixels, range(4)), strict=True):
        assert torch.equal(pixels, torch.from_numpy(arrays[names.index(record.id)]).permute(2, 0, 1)), record.id


def test_common_suffixes_are_read() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= SUFFIXES


ROWS = [
    {"file_name": "a/1.png", "label": "cat", "text": "a cat, “sitting”"},
    {"file_name": "2.png", "label": "", "text": ""},
    {"file_name": "3.png", "label": "7", "text": "seven"},
    {"file_name": "gone.png", "label": "ghost", "text": "no such file"},
]
EXPECTED = [Record("2.png"), Record("3.png", "7", "seven"), Record("a/1.png", "cat", "a cat, “sitting”"), Record("b/4.png")]


def write_metadata(folder: Path, kind: str) -> None:
    if kind == "jsonl":
        rows = [ROWS[0], {"file_name": "2.png"}, {**ROWS[2], "label": 7}, ROWS[3]]
        (folder / "metadata.jsonl").write_text(lines(*rows) + "\n\n", encoding="utf-8")
        return
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file_name", "label", "text"])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path, ["a/1.png", "2.png", "3.png", "b/4.png"])
    write_metadata(tmp_path, kind)
    images = SourceImages(str(tmp_path), 4)
    assert list(images.records) == EXPECTED, "labels come from the metadata alone"
    assert images.names == ["7", "cat"]


def test_jsonl_goes_before_csv(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.png"])
    (tmp_path / "metadata.jsonl").write_text(lines({"file_name": "1.png", "label": "jsonl"}))
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,csv\n")
    assert [r.label for r in SourceImages(str(tmp_path), 4).records] == ["jsonl"]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.txt").write_text("no image")
    file = tmp_path / "file.png"
    write_images(tmp_path, ["file.png"])
    for path in (missing, empty, file):
        with pytest.raises(ValueError, match=path.name) as error:
            SourceImages(str(path), 4)
        assert repr(str(path)) in str(error.value)
        with pytest.raises(ValueError, match=path.name):
            Folder(str(path), size=4).setup("fit")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "1.png"}\n{"label": "x"}\n', "needs a file_name"),
        ("metadata.jsonl", '{"file_name": "1.png"}\n{broken\n', "cannot be read"),
        ("metadata.csv", "name,label\n1.png,x\n", "needs a file_name"),
    ],
)
def test_bad_metadata(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_images(tmp_path, ["1.png"])
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        SourceImages(str(tmp_path), 4)
    assert name in str(error.value)


def test_fingerprints_tell_sources_apart(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.png", "2.png"])
    first = SourceImages(str(tmp_path), 4).fingerprint()
    assert SourceImages(str(tmp_path), 4).fingerprint() == first
    assert SourceImages(str(tmp_path), 8).fingerprint() != first
    Image.fromarray(rgb(5, 5, 9)).save(tmp_path / "2.png")
    changed = SourceImages(str(tmp_path), 4).fingerprint()
    assert changed != first
    (tmp_path / "1.png").unlink()
    assert SourceImages(str(tmp_path), 4).fingerprint() not in (first, changed)


def test_emoji() -> None:
    images = EmojiImages()
    assert len(images) == 1911
    assert len(images.names) == 99
    assert len({name.split("/")[0] for name in images.names}) == 10
    assert len({record.id for record in images.records}) == 1911
    assert all(record.text and record.label in images.names for record in images.records)
    pixels = torch.stack([images.pixels(i) for i in range(1911)])
    assert pixels.shape == (1911, 3, 64, 64)
    assert pixels.dtype == torch.uint8
    corners = pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    white = (corners >= 245).flatten(1).all(1)
    assert 0.85 < float(white.float().mean()) < 1
    assert int((pixels.flatten(1).float().std(1) < 10).sum()) < 20, "nearly every tile shows something"
    grinning = images.pixels([record.id for record in images.records].index("😀"))
    assert (grinning[0].int() - grinning[2].int())[20:44, 20:44].float().mean() > 60, "a face is yellow"


def test_emoji_at_another_size() -> None:
    small, whole = EmojiImages(16), EmojiImages(64)
    for index in (0, 43, 44, 1910):
        expected = as_image(whole.pixels(index)).resize((16, 16), Image.Resampling.LANCZOS)
        assert torch.equal(small.pixels(index), as_tensor(expected))
    data = Emoji(size=16, batch_size=5)
    assert next(iter(data.val_dataloader()))["image"].shape == (5, 3, 16, 16)
    assert len(data.sets[0]) + len(data.sets[1]) == 1911


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    images = DigitImages(size=8)
    assert len(images) == 1797
    assert images.names == [str(i) for i in range(10)]
    assert [int(record.label or -1) for record in images.records] == original.target.tolist()
    assert [record.text for record in images.records[:2]] == ["the digit 0", "the digit 1"]
    scaled = np.round(original.images * (255 / 16)).astype(np.uint8)
    assert np.array_equal(images.scans, scaled)
    for index in range(0, 1797, 7):
        assert torch.equal(images.pixels(index), torch.from_numpy(scaled[index]).expand(3, 8, 8))
    larger = Image.fromarray(scaled[5]).resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(DigitImages().pixels(5), torch.from_numpy(np.array(larger)).expand(3, 32, 32))
    assert Digits().mirror is False


def named(count: int, classes: int = 1) -> Records:
    return Records(Record(f"{i}.png", str(i % classes)) for i in range(count))


@quick
@given(count=st.integers(2, 400), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**31), classes=st.integers(1, 40))
def test_split(count: int, fraction: float, seed: int, classes: int) -> None:
    records = named(count, classes)
    train, held_out = split(records, fraction, seed)
    assert sorted([*train, *held_out]) == list(range(count)), "disjoint and complete"
    assert min(len(train), len(held_out)) >= 1
    assert train.tolist() == sorted(train)
    assert held_out.tolist() == sorted(held_out)
    several = [label for label in range(len(records.names)) if (records.labels == label).sum() > 1]
    assert set(several) <= set(records.labels[train].tolist()), "each class has an image to train on"
    again = split(records, fraction, seed)
    assert np.array_equal(again[0], train)


def test_images_that_are_added_move_no_others() -> None:
    before, after = named(10_000, 10), Records([*named(10_000, 10), Record("one more.png", "3")])
    held_out = {before[i].id for i in split(before, 0.1, 0)[1].tolist()}
    later = {after[i].id for i in split(after, 0.1, 0)[1].tolist()}
    assert later - {"one more.png"} == held_out
    assert abs(len(held_out) - 1000) < 4 * (10_000 * 0.1 * 0.9) ** 0.5, "within four standard errors"


def test_what_the_package_carries_is_split_by_position() -> None:
    train, held_out = split_by_position(1911, 0.05, 0)
    assert held_out[:3].tolist() == sorted(torch.randperm(1911, generator=torch.Generator().manual_seed(0))[:96].tolist())[:3]
    assert np.array_equal(EmojiImages().split(0.05, 0)[0], train)


def test_split_depends_on_its_seed_and_refuses_nonsense() -> None:
    assert not np.array_equal(split(named(100), 0.5, 0)[0], split(named(100), 0.5, 1)[0])
    for fraction in (0.0, 1.0, -0.1, 2.0):
        with pytest.raises(ValueError, match=f"val_fraction is {fraction}"):
            split(named(10), fraction, 0)
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"{count} image"):
            split(named(count), 0.5, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


def keys(count: int, world: int, rank: int, batch: int, *, mirror: bool = True, seed: int = 0, epoch: int = 0, start: int = 0) -> list[Key]:
    order = Order(count, world, rank, batch, mirror, seed, lambda: start)
    order.set_epoch(epoch)
    return list(order)


@quick
@given(world=st.integers(1, 4), batch=st.integers(1, 5), batches=st.integers(1, 6), seed=st.integers(0, 999), epoch=st.integers(0, 99))
def test_an_epoch_is_every_image_once(world: int, batch: int, batches: int, seed: int, epoch: int) -> None:
    count = world * batch * batches
    ranks = [[image for image, *_ in keys(count, world, rank, batch, seed=seed, epoch=epoch)] for rank in range(world)]
    assert [len(rank) for rank in ranks] == [batch * batches] * world
    assert sorted(chain(*ranks)) == list(range(count)), "the ranks are disjoint and together complete"


@quick
@given(count=st.integers(1, 60), world=st.integers(1, 4), batch=st.integers(1, 7), epoch=st.integers(0, 9))
def test_an_epoch_of_any_count(count: int, world: int, batch: int, epoch: int) -> None:
    """Whole batches alone: what is left over waits for another epoch; too few images are repeated evenly."""
    ranks = [[image for image, *_ in keys(count, world, rank, batch, epoch=epoch)] for rank in range(world)]
    length = max(1, count // (world * batch)) * batch
    assert [len(rank) for rank in ranks] == [length] * world
    assert len(Order(count, world, 0, batch, True, 0, lambda: 0)) == length
    times = np.bincount(list(chain(*ranks)), minlength=count)
    assert len(times) == count
    assert times.max() - times.min() <= 1
    if count >= world * batch:
        assert times.max() == 1


@quick
@given(data=st.data(), world=st.integers(1, 3), batch=st.integers(1, 4), batches=st.integers(1, 6), mirror=st.booleans())
def test_resuming_inside_an_epoch_goes_on_with_the_rest(data: st.DataObject, world: int, batch: int, batches: int, mirror: bool) -> None:
    count, epoch = world * batch * batches + data.draw(st.integers(0, world * batch - 1)), data.draw(st.integers(0, 5))
    start, rank = data.draw(st.integers(0, batches)), data.draw(st.integers(0, world - 1))
    full = keys(count, world, rank, batch, mirror=mirror, epoch=epoch)
    assert keys(count, world, rank, batch, mirror=mirror, epoch=epoch, start=start * batch * world) == full[start * batch :]


def test_epochs_seeds_and_mirror_flags() -> None:
    variants = [keys(64, 1, 0, 8, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert variants[0] == keys(64, 1, 0, 8)
    orders = [tuple(image for image, *_ in variant) for variant in variants]
    flags = [tuple(mirrored for _, mirrored, *_ in variant) for variant in variants]
    assert len(set(orders)) == len(set(flags)) == 6
    assert orders[0] != tuple(range(64))
    assert all(type(mirrored) is bool for mirrored in flags[0])
    share = np.mean([mirrored for _, mirrored, *_ in keys(10_000, 1, 0, 10)])
    assert abs(share - 0.5) < 3 * 0.5 / 100, "half of the images, within three standard errors"
    plain = keys(64, 1, 0, 8, mirror=False)
    assert not any(mirrored for _, mirrored, *_ in plain)
    assert [image for image, *_ in plain] == list(orders[0])


def same(a: Batch, b: Batch) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a)


def test_training_batches() -> None:
    data = NoiseData(size=8, batch_size=4)
    source, (train, held_out) = Noise(), data.sets
    batches = epoch_of(data)
    assert len(batches) == len(train) // 4 == len(data.train_dataloader())
    order = keys(len(train), 1, 0, 4)
    for number, batch in enumerate(batches):
        mine = order[number * 4 : number * 4 + 4]
        indices = [train.indices[position] for position, *_ in mine]
        expected = [source.data[i].flip(-1) if m else source.data[i] for i, (_, m, *_) in zip(indices, mine, strict=True)]
        assert torch.equal(batch["image"], torch.stack(expected))
        assert batch["id"] == [f"n{i}" for i in indices]
        assert batch["text"] == [f"number {i}" for i in indices]
        assert batch["label"].tolist() == [i % 3 for i in indices]
        assert batch["label"].dtype == torch.int64
    assert len({mirrored for _, mirrored, *_ in order}) == 2
    assert data.classes == ["a", "b", "c"]
    seen = [name for batch in data.val_dataloader() for name in batch["id"]]
    assert seen == [f"n{i}" for i in held_out.indices]
    pixels = torch.cat([batch["image"] for batch in data.val_dataloader()])
    assert torch.equal(pixels, source.data[held_out.indices]), "held-out images are never mirrored"
    assert all(same(a, b) for a, b in zip(data.val_dataloader(), data.test_dataloader(), strict=True))


def test_loaders_of_two_ranks_and_of_a_resumed_run() -> None:
    whole = epoch_of(NoiseData(size=8, batch_size=3), 1)
    ranks = []
    for rank in range(2):
        data = NoiseData(size=8, batch_size=3)
        data.trainer = fake_trainer(2, rank)
        ranks.append(epoch_of(data, 1))
        data.trainer = fake_trainer(2, rank, batches_done=2)
        resumed = epoch_of(data, 1)
        assert len(resumed) == len(ranks[-1]) - 2 > 0
        assert all(same(a, b) for a, b in zip(resumed, ranks[-1][2:], strict=True))
    ids = [[name for batch in batches for name in batch["id"]] for batches in ranks]
    assert not set(ids[0]) & set(ids[1])
    interleaved = [name for both in zip(*ids, strict=True) for name in both]
    assert interleaved == [name for batch in whole for name in batch["id"]][: len(interleaved)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("world", "batch_size"), [(2, 1), (3, 2), (4, 3)])
def test_every_held_out_image_is_on_one_rank_once(world: int, batch_size: int) -> None:
    wanted = [name for batch in NoiseData(4, batch_size=batch_size, val_fraction=0.3).val_dataloader() for name in batch["id"]]
    seen, batches = [], set()
    for rank in range(world):
        data = NoiseData(4, batch_size=batch_size, val_fraction=0.3)
        data.trainer = fake_trainer(world, rank)
        epoch = list(data.val_dataloader())
        batches.add(len(epoch))
        seen += [name for batch in epoch for name in batch["id"]]
    assert sorted(seen) == sorted(wanted)
    assert len(batches) == 1, "ranks stay in step"
    data = NoiseData(4, val_fraction=0.3)
    data.trainer = fake_trainer(len(wanted) + 1, 0)
    with pytest.raises(ValueError, match=f"{len(wanted)} held-out images are too few for {len(wanted) + 1} devices"):
        data.val_dataloader()


def test_workers_change_nothing() -> None:
    alone, workers = NoiseData(size=8, batch_size=4), NoiseData(size=8, batch_size=4, num_workers=2)
    loader = workers.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        expected = epoch_of(alone, epoch)
        assert len(batches) == len(expected) > 2
        assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


def test_options_that_cannot_be() -> None:
    for options in ({"size": 0}, {"size": 8, "batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            NoiseData(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


def damaged_folder(folder: Path, bad: list[str], count: int = 12) -> list[str]:
    """`count` JPEGs in two classes, those named in `bad` cut off in the middle."""
    names = [f"{'ab'[i % 2]}/{i:02d}.jpg" for i in range(count)]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb(32, 32, seed)).save(folder / name, quality=95)
        if name in bad:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: len(data) // 2])
    return names


def read_all(data: ImageData) -> list[Batch]:
    """Every training image once, then every held-out one, as Lightning would hand the batches out."""
    batches = list(chain(data.train_dataloader(), data.val_dataloader()))  # to the end, so that the workers stop at once
    return [data.on_after_batch_transfer(batch, 0) for batch in batches]


def test_a_truncated_file_is_skipped_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = damaged_folder(tmp_path, ["b/05.jpg"])
    data = Folder(str(tmp_path), size=32, batch_size=1, mirror=False, val_fraction=0.3)
    with pytest.warns(UserWarning, match=r"cannot be read: b/05\.jpg"):
        batches = read_all(data)
    assert len(batches) == len(names), "nothing stops"
    good = {read_image(tmp_path / name, 32).sum().item() for name in names if name != "b/05.jpg"}
    assert {batch["image"].sum().item() for batch in batches} == good, "only whole images are shown"
    assert all("damaged" not in batch for batch in batches)
    assert len(data.damaged) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_all(data)  # the second time says nothing
    assert len(data.damaged) == 1
    capsys.readouterr()
    data.teardown("fit")
    assert capsys.readouterr().out.startswith("1 unreadable image was skipped: b/05.jpg (")
    assert data.damaged == set()


def test_the_image_instead_of_a_damaged_one_keeps_its_own_label(tmp_path: Path) -> None:
    names = damaged_folder(tmp_path, ["a/10.jpg"])
    originals = {name: read_image(tmp_path / name, 32) for name in names if name != "a/10.jpg"}
    images = SourceImages(str(tmp_path), 32)
    position = [record.id for record in images.records].index("a/10.jpg")
    batch = Keyed(images, list(range(len(names)))).__getitems__([position])
    shown = next(name for name, pixels in originals.items() if torch.equal(pixels, batch["image"][0]))
    assert batch["label"].tolist() == ["ab".index(shown[0])], f"{shown} is shown"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.timeout(60))])
def test_too_many_damaged_files_are_an_error(tmp_path: Path, workers: int) -> None:
    bad = ["a/02.jpg", "b/05.jpg", "a/08.jpg"]
    damaged_folder(tmp_path, bad)
    allowed = Folder(str(tmp_path), size=32, batch_size=1, val_fraction=0.3, max_damaged=3, num_workers=workers)
    with pytest.warns(UserWarning, match="cannot be read") as said:
        read_all(allowed)
    assert sorted(name.split(" ")[0] for name in allowed.damaged) == sorted(bad)
    assert len([warning for warning in said if "cannot be read" in str(warning.message)]) == 3

    limited = Folder(str(tmp_path), size=32, batch_size=1, val_fraction=0.3, max_damaged=2, num_workers=workers)
    message = r"3 images cannot be read, more than data\.max_damaged = 2 allows; the last is ([ab]/0\d\.jpg)"
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match=message) as error:
        read_all(limited)
    found = re.search(message, str(error.value))
    assert found is not None
    assert found[1] in bad


def test_a_folder_of_nothing_but_damaged_files(tmp_path: Path) -> None:
    names = damaged_folder(tmp_path, ["a/00.jpg", "b/01.jpg", "a/02.jpg"], count=3)
    images = SourceImages(str(tmp_path), 32)
    assert [record.id for record in images.records] == ["a/00.jpg", "a/02.jpg", "b/01.jpg"]
    with pytest.raises(ValueError, match="none of 3 images") as error:
        Keyed(images, [0, 1, 2]).read(1)
    assert [name for name in names if name in str(error.value)] == ["a/02.jpg"], "the one that was asked for"


# ---------------------------------------------------------------------------------------------------------------------
# Other numbers of channels
# ---------------------------------------------------------------------------------------------------------------------


def test_grey_rgb_and_rgba_images_of_one_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    rgba, rgb, grey = (read_image(tmp_path / "x.png", 8, channels) for channels in (4, 3, 1))
    assert np.array_equal(rgba.permute(1, 2, 0).numpy(), pixels)
    alpha = rgba[3:].float() / 255
    torch.testing.assert_close(rgb.float(), rgba[:3].float() * alpha + 255 * (1 - alpha), atol=1.0, rtol=0)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601
    torch.testing.assert_close(grey.float(), (rgb.float() * luma).sum(0, keepdim=True), atol=1.0, rtol=0)
    for image, mode in ((rgba, "RGBA"), (rgb, "RGB"), (grey, "L")):
        assert as_image(image).mode == mode
        assert torch.equal(as_tensor(as_image(image)), image)
    assert as_image(rgba.repeat(2, 1, 1)).mode == "RGB"
    assert as_image(rgba[:2]).mode == "L"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_folder_in_grey_or_with_alpha(tmp_path: Path, channels: Any) -> None:
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    data = Folder(str(tmp_path), size=4, channels=channels, batch_size=1, val_fraction=0.3)
    assert data.channels == channels
    assert next(iter(data.val_dataloader()))["image"].shape == (1, channels, 4, 4)
    assert len({SourceImages(str(tmp_path), 4, c).fingerprint() for c in (1, 3, 4)}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Runs and buckets, columns
# ---------------------------------------------------------------------------------------------------------------------


@quick
@given(data=st.data(), world=st.integers(1, 3), batch=st.integers(1, 4), epoch=st.integers(0, 5))
def test_batches_are_of_one_bucket_on_all_ranks(data: st.DataObject, world: int, batch: int, epoch: int) -> None:
    buckets = np.array(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=40)))
    ranks = []
    for rank in range(world):
        order = Order(len(buckets), world, rank, batch, True, 0, lambda: 0, Groups(buckets=buckets))
        order.set_epoch(epoch)
        ranks.append(list(order))
        assert len(ranks[-1]) == len(order)
    for start in range(0, len(ranks[0]), batch):
        assert len({int(buckets[key.position]) for rank in ranks for key in rank[start : start + batch]}) == 1
    assert {key.position for rank in ranks for key in rank} == set(range(len(buckets))), "every image is seen"
    held_out = [HeldOutOrder(len(buckets), world, rank, batch, buckets).positions.tolist() for rank in range(world)]
    assert sorted(position for rank in held_out for position in rank if position < len(buckets)) == list(range(len(buckets)))
    for start in range(0, len(held_out[0]), batch):
        assert len({int(buckets[i]) for rank in held_out for i in rank[start : start + batch] if i < len(buckets)}) <= 1


def test_runs_are_read_in_order_and_shuffled_a_few_at_a_time() -> None:
    runs, files = np.repeat(np.arange(24), 10), np.repeat(np.arange(6), 4)  # six files of four runs of ten images
    order = Order(240, 1, 0, 8, False, 0, lambda: 0, Groups(runs, files))
    positions = [key.position for key in order]
    assert sorted(positions) == list(range(240))
    for start in range(0, 240, 40):  # four runs are one window: here one file
        part = positions[start : start + 40]
        assert len({int(files[runs[i]]) for i in part}) == 1
        assert part != sorted(part)
    assert [int(files[runs[i]]) for i in positions[::40]] != list(range(6)), "files are shuffled"
    rest = Order(240, 1, 0, 8, False, 0, lambda: 56, Groups(runs, files))
    assert [key.position for key in rest] == positions[56:], "it resumes to the sample"


ROW = st.tuples(st.text(max_size=9), st.none() | st.sampled_from(["10", "9", "2", "-1"]), st.lists(st.text(min_size=1), max_size=3))


@quick
@given(st.lists(ROW, max_size=20))
def test_columns_hold_what_was_put_in(rows: list[tuple[str, str | None, list[str]]]) -> None:
    def utf8(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    clean = [(utf8(name), label, [utf8(text) for text in texts]) for name, label, texts in rows]
    given_ = [Record.of(name, label, texts, {"x": 1.5} if i % 2 else {}) for i, (name, label, texts) in enumerate(clean)]
    records = Records(given_)
    assert list(records) == given_
    assert records.names == sorted({label for _, label, _ in clean if label is not None}, key=int)
    for i, (_, _, texts) in enumerate(clean):
        assert records.text(i) == (texts[0] if texts else "")
        assert {records.text(i, draw) for draw in range(3)} == (set(texts) or {""})


def test_a_caption_is_drawn_anew_in_every_epoch(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}.png" for i in range(30)])
    (tmp_path / "metadata.jsonl").write_text(lines(*({"file_name": f"{i}.png", "text": ["a", "b"]} for i in range(30))))
    data = Folder(str(tmp_path), size=4, batch_size=1)
    seen = [{batch["id"][0]: batch["text"][0] for batch in epoch_of(data, epoch)} for epoch in range(4)]
    assert {text for epoch in seen for text in epoch.values()} == {"a", "b"}
    assert any(seen[0][name] != seen[1][name] for name in seen[0])
    assert all(batch["text"][0] == "a" for batch in data.val_dataloader()), "held-out images always say the same"


def test_crops_and_augmentations_depend_on_their_draw_alone(tmp_path: Path) -> None:
    from torchvision.transforms.v2 import RandomVerticalFlip

    Image.fromarray(rgb(8, 24)).save(tmp_path / "0.png")
    images = SourceImages(str(tmp_path), 8, crop="random")
    assert torch.equal(images.pixels(0, 5), images.pixels(0, 5))
    assert len({images.pixels(0, draw).sum().item() for draw in range(1, 20)}) > 5
    assert torch.equal(images.pixels(0), SourceImages(str(tmp_path), 8).pixels(0)), "held-out images are cut in the centre"
    augment = Augment([RandomVerticalFlip(0.5)])
    for draw in range(1, 20):
        image, _, told = augment(images.pixels(0), None, draw)
        assert torch.equal(image, images.pixels(0).flip(1) if told["augmented by RandomVerticalFlip"] else images.pixels(0))


def test_maps_of_16_bits_keep_their_values(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["0.png", "1.png"], 8)
    (tmp_path / "maps").mkdir()
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name in ("0.png", "1.png"):
        Image.fromarray(values).save(tmp_path / "maps" / name)
    images = SourceImages(str(tmp_path / "images"), 8, maps=str(tmp_path / "maps"))
    assert images.map(0).dtype == torch.uint16
    assert np.array_equal(images.map(0)[2].numpy(), values)


def test_a_range_that_is_hardly_used_is_told_with_the_option_to_give(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 4081, (8, 8), dtype=np.uint16)).save(tmp_path / f"{i}.png")
    notes = SourceImages(str(tmp_path), 8, channels=1).report.notes
    assert any("give --data.window '[0,4095]'" in note for note in notes), notes
    assert not any("--data.window" in note for note in SourceImages(str(tmp_path), 8, 1, (0, 4095)).report.notes)


def test_a_list_of_every_failure_that_metadata_can_have(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.png", "1.png"])
    for name, text, message in (
        ("metadata.csv", 'file_name,text\n0.png,"open\n1.png,x\n', "check the quotes"),
        ("metadata.jsonl", '{"file_name": ["0.png"]}', "is one path"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": ["a", "b"]}', "give one class"),
        ("metadata.jsonl", '{"file_name": "0.png", "age": NaN}', "age is nan; give a finite number"),
        ("metadata.jsonl", "[1]", "no object with a file_name"),
        ("metadata.csv", b"file_name,text\n0.png,\xff\xfa\n", "no UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message):
            SourceImages(str(tmp_path), 4)
        (tmp_path / name).unlink()
    huge = {"file_name": "0.png", "n": 10**400, "text": "x" * 200_000, "half": "\ud800"}
    (tmp_path / "metadata.jsonl").write_text(lines(huge))
    assert len(SourceImages(str(tmp_path), 4).records[0].text) == 200_000
