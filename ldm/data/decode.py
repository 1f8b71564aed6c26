"""Pictures from files, as uint8: the one reader of what users give; it names the file that it cannot read."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.errors import UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
# 16384 x 16384 px: more than the 200 million of the largest phone cameras, and than any WebP.  Pillow takes
# 4 bytes a pixel, 1 GiB for such a picture, and conversions need several of them at once.
MAX_PIXELS = 2**28
# The formats that are read: those that Pillow decodes by itself (an EPS, whatever its name, would start
# Ghostscript).  Images in one JPEG (MPO, of phones), TIFF or ICO do not follow in time.  TGA, which has no
# signature, is the last.
ANIMATIONS = ["PNG", "GIF", "WEBP", "AVIF"]
PHOTOGRAPHS = ["JPEG", "TIFF", "BMP", "DIB", "PPM", "JPEG2000"]
FORMATS = [*ANIMATIONS, *PHOTOGRAPHS, "PSD", "ICO", "ICNS", "DDS", "QOI", "SGI", "PCX", "TGA"]
_OPENING = threading.Lock()


class Mask(NamedTuple):
    """A mask in full size: values float (1, H, W) in [0, 1], white above 0.5; note: what was assumed."""

    values: Tensor
    note: str | None


def is_hidden(path: Path) -> bool:
    """Whether a file is the system's, not the user's: `._0.png`, `.x.png`, `Thumbs.db`, all in `__MACOSX`.

    path: relative to the folder that the user gave, which may itself be in a hidden one.
    """
    return any((part[0] == "." and part != "..") or part in {"__MACOSX", "Thumbs.db"} for part in path.parts)


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
def opened(path: Path, header_only: bool = False) -> Iterator[Image.Image]:
    """A picture file, its first image decoded (but with header_only).

    UserError where it cannot be read.  Calls inside that decode more, such as `seek`, need `naming`.
    """
    with naming(path):
        image = _open(path)
    with image:
        if not header_only:
            with naming(path):
                image.load()
        yield image


def _open(path: Path) -> Image.Image:
    # Pillow's own limit is a global; it warns from 89 million px on and raises from 179 million on.  It is
    # put off while the header is read, and back before pixels are, since plugins ask it for inner images.
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path, formats=_formats())
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
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow 11.0 has no AVIF


def image_numbers(image: Image.Image) -> range:
    """Numbers for `seek` of the frames of an animation; of any other picture, that of its first image."""
    count = getattr(image, "n_frames", 1) if image.format in ANIMATIONS else 1
    # what an APNG shows where it is not understood is no frame of it
    return range(int(count > 1 and getattr(image, "default_image", False)), count)


def read_picture(path: Path, channels: int = 3, window: tuple[float, float] | None = None) -> Tensor:
    """A picture, upright and in full size, as uint8 (channels, H, W): 1 grey, 3 RGB on white, 4 RGBA.

    window: see as_rgb.  UserError where it cannot be read.
    """
    with opened(path) as image, naming(path):
        return as_tensor(converted(image, channels, window))


def read_image(path: Path, size: int, channels: int = 3, window: tuple[float, float] | None = None) -> Tensor:
    """A picture as uint8 (channels, size, size), its centre; else as read_picture."""
    with opened(path) as image, naming(path):
        return as_tensor(fit_square(converted(image, channels, window), size))


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
    values, white = _grey(ImageOps.exif_transpose(image))
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
    if _is_deep(image):
        return _deep_values(image)
    return np.asarray(as_rgb(image, "black").convert("L"), dtype=np.float64), 255


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"  # 16-bit grey arrives as I;16 or I


def _deep_values(image: Image.Image) -> tuple[NDArray[np.float64], int]:
    """Values (H, W) of an image of more than 8 bits, and which is white: 65535; if all are small 255 or 1."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    if image.mode.startswith("I;16") or values.max() > 255:
        return values, 65535
    return values, 1 if image.mode == "F" and values.max() <= 1 else 255


def as_rgb(
    image: Image.Image,
    background: str | None = "white",
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """Upright by EXIF, RGB, transparency on the background (None: kept, RGBA); grey, CMYK, ... converted.

    Values beyond 8 bits are scaled from `window`; without one from 0..65535, floats from 0..1 (or as 16 bits
    where they exceed 255).  ValueError where they are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if _is_deep(image):
        values, white = _deep_values(image)
        low, high = window or (0, white)
        scaled = (values - low) * (255 / (high - low))
        image = Image.fromarray(np.clip(np.round(scaled), 0, 255).astype(np.uint8))
    if background is None:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def converted(
    image: Image.Image,
    channels: int = 3,
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """Upright, with so many channels of 8 bits: 1 grey, 3 RGB on white, 4 RGBA; window: see as_rgb."""
    return as_rgb(image, None if channels == 4 else "white", window).convert(MODES[channels])


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """The centre of an image whose short side was resized to `size` px (Lanczos, antialiased)."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def as_tensor(image: Image.Image) -> Tensor:
    """Grey, RGB or RGBA image -> uint8 (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()
