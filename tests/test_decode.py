"""The one reader of users' pictures (ldm/data/decode.py): formats, turns, masks, limits and damaged files."""

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from ldm.data import decode
from ldm.data.decode import (
    MAX_PIXELS,
    is_hidden,
    naming,
    opened,
    read_mask,
    read_picture,
    read_pixels,
)
from ldm.data.pixels import PixelRule
from ldm.errors import UserError

ORIENTATION = 0x0112
READERS = {
    "read_picture": read_picture,
    "read_mask": read_mask,
    "read_pixels": read_pixels,
    "pixels": lambda path: PixelRule().pixels(path, path.name, (8, 8)),
}


def photo(height: int = 12, width: int = 20, seed: int = 0) -> Image.Image:
    """Smooth, so that lossy formats keep it."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of 1 bit whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def saved(values: np.ndarray, path: Path, mode: str | None = None) -> Path:
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return path


# -----------------------------------------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------------------------------------

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"]


@pytest.mark.parametrize("kind", [*FORMATS, "MPO", "TGA", "PCX", "SGI", "DDS", "QOI"])
def test_formats_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF", "MPO") else {}
    image = photo(16, 24)
    (tmp_path / "x.png").write_bytes(encoded(image.quantize() if kind == "GIF" else image, kind, **options))
    made = read_picture(tmp_path / "x.png")
    assert made.shape == (3, 16, 24)
    assert made.dtype == torch.uint8
    assert np.abs(made.permute(1, 2, 0).numpy().astype(int) - np.asarray(image)).mean() < 4


def test_pictures_are_upright_and_in_full_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = photo(10, 30)
    image.rotate(90, expand=True).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(read_picture(tmp_path / "x.png").permute(1, 2, 0), torch.from_numpy(np.array(image)))
    assert read_picture(tmp_path / "x.png", channels=1).shape == (1, 10, 30)
    assert read_picture(tmp_path / "x.png", channels=4).shape == (4, 10, 30)


def test_alpha_is_on_white_and_kept_where_it_is_wanted(tmp_path: Path) -> None:
    saved(np.array([[[9, 8, 7, 255], [9, 8, 7, 0]]], dtype=np.uint8), tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").permute(1, 2, 0).tolist() == [[[9, 8, 7], [255, 255, 255]]]
    assert read_picture(tmp_path / "x.png", channels=4)[3].tolist() == [[255, 0]]


def test_a_window_is_what_becomes_black_and_white(tmp_path: Path) -> None:
    saved(np.array([[0, 1000, 1500, 2000, 9000]], dtype=np.uint16), tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", 1, (1000, 2000)).tolist() == [[[0, 0, 128, 255, 255]]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_dark_picture_of_16_bits_stays_dark_in_either_byte_order(tmp_path: Path, order: str) -> None:
    saved(np.full((4, 4), 200, dtype=f"{order}u2"), tmp_path / "x.tif")
    assert read_picture(tmp_path / "x.tif").unique().tolist() == [1]


@pytest.mark.parametrize("kind", ["MPO", "TIFF"])
def test_of_several_images_that_are_no_film_the_first_is_read(tmp_path: Path, kind: str) -> None:
    first, second = photo(16, 24), photo(6, 8, seed=1)
    path = tmp_path / "phone.jpg"
    first.save(path, kind, save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert image.n_frames == 2, "such a file is what this is about"
    assert read_picture(path).shape == (3, 16, 24)


def test_an_icon_has_one_size(tmp_path: Path) -> None:
    photo(32, 32).save(tmp_path / "x.ico", sizes=[(16, 16), (32, 32)])
    assert read_picture(tmp_path / "x.ico").shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("0.png", False),
        ("a/b.c/0.png", False),
        ("../0.png", False),
        ("._0.png", True),
        (".x.png", True),
        ("a/._0.png", True),
        (".cache/0.png", True),
        ("__MACOSX/a/0.png", True),
        ("a/Thumbs.db", True),
    ],
)
def test_what_is_hidden(path: str, hidden: bool) -> None:
    assert is_hidden(Path(path)) == hidden


# -----------------------------------------------------------------------------------------------------------
# Limits and mistakes
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20000, 20000), (16385, 16384), (2**31 - 1, 1)])
@pytest.mark.parametrize("reader", READERS)
def test_too_many_pixels_are_one_sentence(tmp_path: Path, size: tuple[int, int], reader: str) -> None:
    (tmp_path / "huge.png").write_bytes(png_header(*size))
    said = rf"huge.png' has {size[0]}x{size[1]} px, .* 268,435,456 px .*: make it smaller$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=said):
            READERS[reader](tmp_path / "huge.png")


def test_the_largest_pictures_are_read_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png_header(16384, 16384))
    saved(np.zeros((9500, 9500), dtype=bool), tmp_path / "y.png")  # Pillow warns from 9459 x 9459 on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opened(tmp_path / "x.png", header_only=True) as image:
            assert image.size == (16384, 16384)
            assert image.width * image.height == MAX_PIXELS
        with opened(tmp_path / "y.png") as image:
            assert image.size == (9500, 9500)


def test_pillows_own_limit_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo().save(tmp_path / "x.png")
    (tmp_path / "no.png").write_bytes(b"no")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12)

    def read() -> None:
        for _ in range(50):
            read_picture(tmp_path / "x.png")
            with pytest.raises(UserError):
                read_picture(tmp_path / "no.png")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Image.MAX_IMAGE_PIXELS == 12


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a poem")
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "script.png").write_text(script)  # Pillow would start Ghostscript
    unknown = "cannot be read: it is in none of the formats PNG, .*; convert it, or take it away$"
    mistakes = {
        "none.png": r"^there is no file '.*none.png': check its name and its folder$",
        "folder.png": r"^'.*folder.png' is a folder: give a file in it$",
        "empty.png": rf"^'.*empty.png' {unknown}",
        "text.png": rf"^'.*text.png' {unknown}",
        "script.png": rf"^'.*script.png' {unknown}",
    }
    for name, message in mistakes.items():
        for read in READERS.values():
            with pytest.raises(UserError, match=message):
                read(tmp_path / name)


REPAIR = "repair it, or take it away"
LARGE = "an image in it is too large, allowed are 268,435,456 px; make it smaller"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(13, "Permission denied", "x.png"),
            "its permissions forbid it; change them, or give a copy",
        ),
        (OSError(5, "Input/output error"), f"Input/output error; {REPAIR}"),
        (OSError("image file is truncated\n(3 bytes)"), f"image file is truncated (3 bytes); {REPAIR}"),
        (SyntaxError("broken PNG file"), f"broken PNG file; {REPAIR}"),
        (EOFError(), f"EOFError; {REPAIR}"),
        (struct.error("unpack requires 4 bytes"), f"unpack requires 4 bytes; {REPAIR}"),
        (MemoryError(), "there is too little memory for it; make it smaller"),
        (Image.DecompressionBombError("DOS attack"), LARGE),
        (Image.DecompressionBombWarning("DOS attack"), LARGE),
    ],
)
def test_whatever_pillow_raises_is_one_sentence(error: Exception, said: str) -> None:
    with pytest.raises(UserError) as raised, naming(Path("x.png")):
        raise error
    assert str(raised.value) == f"'x.png' cannot be read: {said}"
    assert raised.value.__cause__ is error


def test_sentences_and_interruptions_pass() -> None:
    for error in (UserError("the mask has no white part"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, naming(Path("x.png")):
            raise error
        assert raised.value is error


def test_mistakes_of_those_who_read_are_not_blamed_on_the_file(tmp_path: Path) -> None:
    photo().save(tmp_path / "x.png")
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "x.png"):
        _ = 1 / 0


def test_pixels_are_decoded_before_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    path.write_bytes(encoded(photo(300, 300), "JPEG")[:-100])
    with pytest.raises(UserError, match=r"half.jpg' cannot be read: image file is truncated"), opened(path):
        pytest.fail("the block is not entered")


# of one tag: the orientation 6
EXIF = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, ORIENTATION, 3, 1, 6, 0)
WHOLE = {
    "png": encoded(photo(), "PNG"),
    "palette.png": encoded(photo().quantize(8), "PNG", transparency=3),
    "16bit.png": encoded(Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 257), "PNG"),
    "apng": encoded(photo(), "PNG", save_all=True, append_images=[photo(seed=1), photo(seed=2)], duration=40),
    "jpg": encoded(photo(), "JPEG"),
    "progressive.jpg": encoded(photo(), "JPEG", progressive=True, exif=EXIF),
    "mpo": encoded(photo(), "MPO", save_all=True, append_images=[photo(seed=1)]),
    "gif": encoded(photo(), "GIF", save_all=True, append_images=[photo(seed=1)], duration=40),
    "webp": encoded(photo(), "WEBP"),
    "lossless.webp": encoded(photo(), "WEBP", lossless=True, save_all=True, append_images=[photo(seed=1)]),
    "tif": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "bmp": encoded(photo(), "BMP"),
    "jp2": encoded(photo(), "JPEG2000"),
    "ico": encoded(photo(16, 16), "ICO", sizes=[(16, 16)]),
    **({"avif": encoded(photo(), "AVIF")} if features.check("avif") else {}),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.filterwarnings("ignore")  # Pillow's, of odd EXIF data and truncated tags
@pytest.mark.parametrize("kind", WHOLE)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_file_is_read_or_named(scratch: Path, kind: str, data: st.DataObject) -> None:
    damaged, path = bytearray(WHOLE[kind]), scratch / f"damaged.{kind}"
    for place in data.draw(st.lists(st.integers(0, len(damaged) * 8 - 1), max_size=3)):
        damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    reader = data.draw(st.sampled_from(sorted(READERS)))
    said = None
    try:
        READERS[reader](path)
    except UserError as error:
        said = str(error)
    assert said is None or (str(path) in said and "\n" not in said)


# -----------------------------------------------------------------------------------------------------------
# Masks
# -----------------------------------------------------------------------------------------------------------

HALF = np.array([[0, 0, 1, 1]] * 2, dtype=np.uint8)


def rgba(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.stack([colour, colour, colour, alpha], axis=-1)


MASKS = {
    "8 bits": HALF * 255,
    "1 bit": HALF.astype(bool),
    "16 bits": HALF.astype(np.uint16) * 65535,
    "RGB": np.stack([HALF * 255] * 3, axis=-1),
    "white on transparent": rgba(np.full_like(HALF, 255), HALF * 255),
    "white on opaque black": rgba(HALF * 255, np.full_like(HALF, 255)),
}
LABELS = {
    "8 bits": HALF,
    "16 bits": HALF.astype(np.uint16),
    "RGB": np.stack([HALF] * 3, axis=-1),
    "RGBA": rgba(HALF, np.full_like(HALF, 255)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_all_kinds(tmp_path: Path, kind: str) -> None:
    mask = read_mask(saved(MASKS[kind], tmp_path / "m.png"))
    assert mask.note is None
    assert mask.values.dtype == torch.float32
    assert mask.values.tolist() == [HALF.astype(float).tolist()]


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_0_and_1_are_black_and_white_which_is_said(tmp_path: Path, kind: str) -> None:
    mask = read_mask(saved(LABELS[kind], tmp_path / "m.png"))
    assert mask.values.tolist() == [HALF.astype(float).tolist()]
    name = str(tmp_path / "m.png")
    assert mask.note == f"the mask {name!r} has no other values than 0 and 1; 1 is taken for white"


@pytest.mark.parametrize(
    "values",
    [HALF.astype(">u2"), HALF.astype(np.int32), np.ones_like(HALF)],
    ids=["big-endian", "32 bits", "all"],
)
def test_labels_of_other_kinds(tmp_path: Path, values: np.ndarray) -> None:
    mask = read_mask(saved(values, tmp_path / "m.tif"))
    assert mask.values.tolist() == [values.astype(float).tolist()]
    assert mask.note is not None


def test_floats_from_0_to_1_are_no_labels(tmp_path: Path) -> None:
    mask = read_mask(saved(HALF.astype(np.float32) * 0.75, tmp_path / "m.tif"))
    assert mask.values.tolist() == [(HALF * 0.75).tolist()]
    assert mask.note is None


def test_a_palette_is_what_it_looks_like(tmp_path: Path) -> None:
    image = Image.fromarray(HALF).convert("P")
    image.putdata(HALF.flatten().tolist())
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").values.tolist() == [(1.0 - HALF).tolist()]
    image.save(tmp_path / "m.png", transparency=0)
    with pytest.raises(UserError, match=r"has no white part \(its values are 0 to 0\)"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_soft_masks_are_kept_and_white_is_more_than_half(tmp_path: Path, dtype: type, white: int) -> None:
    values = np.array([[0, white // 4, white // 2, white // 2 + 1]], dtype=dtype)
    mask = read_mask(saved(values, tmp_path / "m.png")).values
    assert torch.equal(mask[0], torch.from_numpy((values / white).astype(np.float32)))
    assert (mask > 0.5).tolist() == [[[False, False, False, True]]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            np.zeros((4, 4), np.uint8),
            r"\(its values are 0 to 0\): paint what is to be made anew white, .* half of 255$",
        ),
        (np.full((4, 4), 127, np.uint8), r"\(its values are 127 to 127\): .* half of 255$"),
        (np.array([[0, 2, 20]], np.uint8), r"\(its values are 0 to 20\): .* half of 255$"),
        (np.array([[0, 2, 20000]], np.uint16), r"\(its values are 0 to 20000\): .* half of 65535$"),
        (np.zeros((4, 4), bool), r"\(its values are 0 to 0\): .* half of 255$"),
        (rgba(HALF * 0, HALF * 255), r"\(its values are 0 to 0\): .* half of 255$"),
    ],
    ids=["black", "grey", "labels", "16 bits", "1 bit", "black on transparent"],
)
def test_a_mask_without_white_is_refused(tmp_path: Path, values: np.ndarray, said: str) -> None:
    with pytest.raises(UserError, match=r"^the mask '.*m.png' has no white part " + said):
        read_mask(saved(values, tmp_path / "m.png"))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_mask_is_turned_as_the_photograph_is(tmp_path: Path, kind: str) -> None:
    upright = np.zeros((96, 48), dtype=np.uint8)
    upright[:24] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(upright).rotate(90, expand=True).save(tmp_path / f"m.{kind}", exif=exif)
    with Image.open(tmp_path / f"m.{kind}") as image:
        assert image.size == (96, 48), "as the camera stores it"
    assert torch.equal(read_mask(tmp_path / f"m.{kind}").values[0] > 0.5, torch.from_numpy(upright > 127))


def test_of_an_animated_mask_the_first_frame_is_taken_which_is_said(tmp_path: Path) -> None:
    frames = [Image.fromarray(values * 255) for values in (HALF, 1 - HALF)]
    frames[0].save(tmp_path / "m.gif", save_all=True, append_images=frames[1:])
    mask = read_mask(tmp_path / "m.gif")
    assert mask.values.tolist() == [HALF.astype(float).tolist()]
    assert mask.note == f"the mask '{tmp_path / 'm.gif'}' has 2 frames, of which the first is taken"


def test_a_mask_in_memory_follows_the_same_rules() -> None:
    mask = decode.as_mask(Image.fromarray(HALF), "in memory")
    assert mask.values.tolist() == [HALF.astype(float).tolist()]
    assert mask.note == "the mask in memory has no other values than 0 and 1; 1 is taken for white"
    with pytest.raises(UserError, match=r"^the mask in memory has no white part \(its values are 0 to 0\)"):
        decode.as_mask(Image.fromarray(HALF * 0), "in memory")


def test_formats_without_their_plugin_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    decode._formats.cache_clear()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert "AVIF" not in decode._formats()
    decode._formats.cache_clear()
