"""Files and pictures in and out, as uint8."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels


def as_rgb(image: Image.Image, background: str | None = "white", window: tuple[float, float] | None = None) -> Image.Image:
    """Upright by EXIF; alpha and palette transparency composited on the background (None: kept, RGBA); grey, CMYK, ... converted.

    Values beyond 8 bits are scaled from `window`; without one from 0..65535, floats from 0..1 (or as 16 bits where they exceed 255).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey arrives as I;16 or I
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are not finite numbers")
        small = image.mode != "I;16" and values.max() <= 255
        scale = 1 / 257 if not small else 255 if image.mode == "F" and values.max() <= 1 else 1
        scaled = values * scale if window is None else (values - window[0]) * (255 / (window[1] - window[0]))
        image = Image.fromarray(np.clip(np.round(scaled), 0, 255).astype(np.uint8))
    if background is None:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (Lanczos, antialiased), crop the centre."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def as_tensor(image: Image.Image) -> Tensor:
    """Grey, RGB or RGBA image -> uint8 (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()


def as_image(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) -> grey, RGB or RGBA image; of other numbers of channels the first three, or the first."""
    shown = pixels if len(pixels) in MODES else pixels[: 3 if len(pixels) > 4 else 1]
    return Image.fromarray(shown.permute(1, 2, 0).squeeze(2).cpu().numpy())


def read_image(path: Path, size: int, channels: int = 3, window: tuple[float, float] | None = None) -> Tensor:
    """One image file as uint8 (channels, size, size): 1 grey, 3 RGB on white, 4 RGBA; window: as as_rgb."""
    with Image.open(path) as image:
        return as_tensor(fit_square(converted(image, channels, window), size))


def converted(image: Image.Image, channels: int = 3, window: tuple[float, float] | None = None) -> Image.Image:
    """Upright, with so many channels of 8 bits."""
    return as_rgb(image, None if channels == 4 else "white", window).convert(MODES[channels])


def read_pixels(path: Path) -> Tensor:
    """A picture of ours as uint8 (3, H, W), as it is."""
    with Image.open(path) as image:
        return as_tensor(image.convert("RGB"))


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """uint8 (N,3,H,W) -> one uint8 (3, ., .) picture with `columns` per row on white."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])
    images = torch.nn.functional.pad(images, (0, gap, 0, gap), value=255)
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return torch.nn.functional.pad(rows, (gap, 0, gap, 0), value=255)
