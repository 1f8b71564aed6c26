"""From any mode of a picture to 8 bits: orientation, colours, transparency, depth."""

import io
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
SRGB = ImageCms.createProfile("sRGB")
Window = tuple[float, float]  # values that become black and white
Ranges = Mapping[str, Window]  # of a set of pictures, by the kind of their values: see kind_of


def kind_of(image: Image.Image) -> str:
    """What the values of a picture are: "8", "16" or "32" bits, "F" for floats."""
    if image.mode.startswith("I;16"):
        return "16"
    if image.mode == "I":  # 16 bits of PNG, PNM and JPEG 2000 arrive so, and 32 of TIFF
        return "32" if image.format == "TIFF" else "16"
    return "F" if image.mode == "F" else "8"


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits."""
    return kind_of(image) != "8"


def deep_values(image: Image.Image) -> NDArray[np.float64]:
    """Values (H,W) of an image of more than 8 bits.  ValueError where they are not finite."""
    values = np.asarray(image, dtype=np.float64)
    if image.format == "TIFF" and kind_of(image) == "32" and image.getbands() == ("I",) and _is_unsigned(image):
        values = np.where(values < 0, values + 2.0**32, values)  # Pillow reads them as signed
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    return values


def _is_unsigned(image: Image.Image) -> bool:
    return getattr(image, "tag_v2", {}).get(339, (1,))[0] == 1  # SampleFormat


def own_values(image: Image.Image) -> tuple[NDArray[np.float64], int]:
    """Values (H,W) of an image of more than 8 bits that is by itself, and which is white: 65535; if all are small 255 or 1."""
    values = deep_values(image)
    if kind_of(image) == "16" or values.max() > 255:
        return values, 65535
    return values, 1 if image.mode == "F" and values.max() <= 1 else 255


def shares(image: Image.Image, window: Window | Ranges | None = None) -> NDArray[np.float64]:
    """Values (H,W) of an image of more than 8 bits as shares, from 0 (black) to 1 (white); those beyond are cut off."""
    values, white = own_values(image)
    if isinstance(window, Mapping):
        if kind_of(image) not in window:
            raise ValueError(f"its values have {kind_of(image)} bits, those of the set have not: give --data.window")
        low, high = window[kind_of(image)]
    else:
        low, high = window or (0, white)
    return np.clip((values - low) / (high - low), 0, 1)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 where there is none or where the EXIF is damaged."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises nearly everything of damaged EXIF, without which a picture is as good
        return 1


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says."""
    return ImageOps.exif_transpose(image) if orientation(image) in range(2, 9) else image


def in_srgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits with its colours converted from its ICC profile to sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or is_deep(image):
        return image
    if image.mode in ("P", "PA", "LA", "La", "RGBa", "1"):
        kept = image.info
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.info = {key: value for key, value in kept.items() if key != "transparency"}
    transform = _to_srgb(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where nothing is to do: colours are sRGB already, or the profile is none for such an image."""
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(found).lower():
            return None
        return ImageCms.buildTransform(found, SRGB, mode, "RGBA" if mode == "RGBA" else "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # viewers show such pictures as sRGB, too
        return None


def as_rgb(
    image: Image.Image,
    background: str | None = "white",
    window: Window | Ranges | None = None,
) -> Image.Image:
    """Upright by EXIF, sRGB, transparency on the background (None: kept, RGBA); grey, CMYK, ... converted.

    Values beyond 8 bits are scaled from `window`, or that of their kind; without one from 0..65535, floats from 0..1 (or
    as 16 bits where they exceed 255).  ValueError where they are not finite.
    """
    image = in_srgb(upright(image))
    if is_deep(image):
        image = Image.fromarray(np.round(shares(image, window) * 255).astype(np.uint8))
    if background is None:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def converted(
    image: Image.Image,
    channels: int = 3,
    window: Window | Ranges | None = None,
    deep: bool = False,
) -> Image.Image:
    """Upright, with so many channels of 8 bits: 1 grey, 3 RGB on white, 4 RGBA; window: see as_rgb.

    deep: a grey one of more bits as floats from 0 (black) to 255 (white).
    """
    if deep and channels == 1 and is_deep(image):
        return Image.fromarray((shares(upright(image), window) * 255).astype(np.float32))
    return as_rgb(image, None if channels == 4 else "white", window).convert(MODES[channels])


def as_tensor(image: Image.Image) -> Tensor:
    """Grey, RGB or RGBA image -> uint8 (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()
