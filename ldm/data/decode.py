"""Pictures from files, as uint8: the one reader of what users give; it names the file that it cannot read."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ldm.data.modes import Window, as_rgb, as_tensor, converted, is_deep, orientation, own_values, upright
from ldm.errors import UserError, extra

# 16384 x 16384 px: more than the 200 million of the largest phone cameras, and than any WebP.  Pillow takes
# 4 bytes a pixel, 1 GiB for such a picture, and conversions need several of them at once.
MAX_PIXELS = 2**28
# The formats that are read: those that Pillow decodes by itself (an EPS, whatever its name, would start
# Ghostscript).  Images in one JPEG (MPO, of phones), TIFF or ICO do not follow in time.  TGA, which has no
# signature, is the last.
ANIMATIONS = ["PNG", "GIF", "WEBP", "AVIF"]
PHOTOGRAPHS = ["JPEG", "TIFF", "BMP", "DIB", "PPM", "JPEG2000"]
FORMATS = [*ANIMATIONS, *PHOTOGRAPHS, "PSD", "ICO", "ICNS", "DDS", "QOI", "SGI", "PCX", "TGA", "HEIF"]
# Names under which pictures are looked for; what is in them is found out from the content.
SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".avif", ".psd", ".qoi", ".tga", ".sgi", ".pcx"),
}
HEIF = {".heic", ".heif", ".hif"}  # which need the package pillow-heif
# of macOS, Synology, Windows and Linux
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
TEXT_LIMIT = 2**28  # bytes of text in a PNG: ComfyUI and others keep whole workflows there
_OPENING = threading.Lock()


class Mask(NamedTuple):
    """A mask in full size: values float (1, H, W) in [0, 1], white above 0.5; note: what was assumed."""

    values: Tensor
    note: str | None


def is_hidden(path: Path) -> bool:
    """Whether a file is the system's, not the user's: `._0.png`, `.x.png`, `Thumbs.db`, all in `__MACOSX`, `@eaDir`.

    path: relative to the folder that the user gave, which may itself be in a hidden one.
    """
    return any((part[0] == "." and part != "..") or part in SYSTEM for part in path.parts)


def unreadable(path: Path, error: Exception) -> UserError:
    """One sentence that names the file, of what was raised when it was read."""
    name, reason = repr(str(path)), getattr(error, "strerror", None) or str(error) or type(error).__name__
    advice = "repair it, or take it away"
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no file {name}: check its name and its folder")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{name} is a folder: give a file in it")
    if isinstance(error, PermissionError):
        reason, advice = "its permissions forbid it", "change them, or give a copy"
    elif isinstance(error, UnidentifiedImageError):
        known = ", ".join(_formats())
        reason, advice = f"it is in none of the formats {known}", "convert it, or take it away"
    elif isinstance(error, MemoryError):
        reason, advice = "there is too little memory for it", "make it smaller"
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        reason, advice = f"an image in it is too large, allowed are {MAX_PIXELS:,} px", "make it smaller"
    return UserError(f"{name} cannot be read: {' '.join(reason.split())}; {advice}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what Pillow raises inside into a UserError that names the file.

    For calls of Pillow and of the system only: of damaged files Pillow raises nearly everything (SyntaxError,
    KeyError, zlib.error, struct.error, DecompressionBombError: an Exception), so all is taken for damage.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error


@contextmanager
def opened(
    picture: Path | bytes, header_only: bool = False, name: Path | None = None, at_least: tuple[int, int] | None = None
) -> Iterator[Image.Image]:
    """A picture, its first image decoded (but with header_only).

    name: of one that is given as its bytes.  at_least: height and width in px to which it will be shrunk; a JPEG is then
    decoded at 1/2, 1/4 or 1/8 of its size, which is the mean over so many pixels.
    UserError where it cannot be read.  Calls inside that decode more, such as `seek`, need `naming`.
    """
    path = picture if isinstance(picture, Path) else name or Path("picture")
    with naming(path):
        image = _open(picture, path)
    with image:
        if not header_only:
            with naming(path):
                if at_least is not None and image.format == "JPEG":
                    _draft(image, at_least)
                image.load()
        yield image


def _draft(image: Image.Image, at_least: tuple[int, int]) -> None:
    height, width = at_least if orientation(image) < 5 else at_least[::-1]
    scale = max(height / image.height, width / image.width)
    if scale <= 0.5:
        image.draft(None, (round(image.width * scale), round(image.height * scale)))


def suffixes() -> set[str]:
    """Names of picture files that can be read here."""
    return SUFFIXES | HEIF if find_spec("pillow_heif") else SUFFIXES


def _open(picture: Path | bytes, path: Path) -> Image.Image:
    # Pillow's own limits are globals; that of pixels warns from 89 million on and raises from 179 million on.
    # It is put off while the header is read, and back before pixels are, since plugins ask it for inner images.
    with _OPENING:
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = TEXT_LIMIT
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture), formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UserError(
            f"{str(path)!r} has {width}x{height} px, which is more than the {MAX_PIXELS:,} px "
            "that are allowed (16384x16384): make it smaller"
        )
    return image


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    if find_spec("pillow_heif"):
        extra("pillow_heif", "heif", "HEIC").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow 11.0 has no AVIF


def image_numbers(image: Image.Image) -> range:
    """Numbers for `seek` of the frames of an animation; of any other picture, that of its first image."""
    count = getattr(image, "n_frames", 1) if image.format in ANIMATIONS else 1
    # what an APNG shows where it is not understood is no frame of it
    return range(int(count > 1 and getattr(image, "default_image", False)), count)


def read_picture(path: Path, channels: int = 3, window: Window | None = None) -> Tensor:
    """A picture, upright and in full size, as uint8 (channels, H, W): 1 grey, 3 RGB on white, 4 RGBA.

    window: see as_rgb.  UserError where it cannot be read.
    """
    with opened(path) as image, naming(path):
        return as_tensor(converted(image, channels, window))


def read_pixels(path: Path) -> Tensor:
    """A picture of ours as uint8 (3, H, W), as it is.  UserError where it cannot be read."""
    with opened(path) as image, naming(path):
        return as_tensor(image.convert("RGB"))


def read_mask(path: Path) -> Mask:
    """A mask, see as_mask.  UserError where it cannot be read, and where nothing in it is white."""
    with opened(path) as image, naming(path):
        return as_mask(image, repr(str(path)))


def as_mask(image: Image.Image, name: str) -> Mask:
    """A mask, upright and in full size; transparent is black, the labels 0 and 1 are black and white.

    name: as sentences show it.  UserError where nothing in it is white.
    """
    values, white = _grey(upright(image))
    low, high, count = float(values.min()), float(values.max()), len(image_numbers(image))
    notes = [] if count == 1 else [f"the mask {name} has {count} frames, of which the first is taken"]
    if high == 1 < white and np.isin(values, (0, 1)).all():
        white = 1
        notes.append(f"the mask {name} has no other values than 0 and 1; 1 is taken for white")
    shares = torch.from_numpy(np.clip(values / white, 0, 1).astype(np.float32))
    if not (shares > 0.5).any():
        raise UserError(
            f"the mask {name} has no white part (its values are {low:g} to {high:g}): paint what is to be "
            f"made anew white, which is more than half of {white}"
        )
    return Mask(shares[None], "; ".join(notes) or None)


def _grey(image: Image.Image) -> tuple[NDArray[np.float64], int]:
    """Brightness of a mask (H, W), on black, and what of it is white."""
    if is_deep(image):
        return own_values(image)
    return np.asarray(as_rgb(image, "black").convert("L"), dtype=np.float64), 255
