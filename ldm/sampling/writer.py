"""Pictures into files: one PNG per picture with its settings inside, films of clips and of how a picture came about."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.data.decode import opened, read_pixels
from ldm.data.film_writer import write_film
from ldm.data.transforms import as_image, grid
from ldm.files import write_atomically
from ldm.frames import side_by_side
from ldm.ranges import ValueRange
from ldm.sampling.settings import TEXT_KEY, settings_in, to_json


def picture_path(folder: Path, index: int) -> Path:
    """Where picture `index` is."""
    return folder / f"{index}.png"


def png(pixels: Tensor, settings: Mapping[str, Any] | None = None) -> bytes:
    """A PNG file of pixels uint8 (C,H,W), with settings as a text chunk before the pixels."""
    info, data = PngInfo(), io.BytesIO()
    if settings is not None:
        info.add_text(TEXT_KEY, to_json(settings))
    as_image(pixels).save(data, format="PNG", pnginfo=info)
    return data.getvalue()


def write_picture(path: Path, frames: list[Tensor], settings: Mapping[str, Any]) -> None:
    """The picture of frames uint8 (C,H,W), side by side; those of a clip also one after the other in `<index>.webp`."""
    if len(frames) > 1:
        write_film([as_image(frame) for frame in frames], path.with_suffix(".webp"))
    write_atomically(path, png(torch.cat(frames, dim=-1), settings))


def write_values(path: Path, values: np.ndarray) -> None:
    """The values of a picture of arrays, in the units of the data, beside it: `<index>.npy`."""
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    write_atomically(path.with_suffix(".npy"), data.getvalue())


def read_shown(path: Path) -> Tensor:
    """A picture of ours as uint8 (3,H,W); one of 16 bits from its black to its white."""
    with opened(path) as image:
        if not image.mode.startswith("I"):
            return read_pixels(path)
        pixels = torch.from_numpy(np.array(image, np.uint16))[None]
    return ValueRange.of(settings_in(path) or {}).to_shown(pixels).expand(3, -1, -1)


def write_trajectory(path: Path, steps: Tensor, frames: int) -> None:
    """How a picture came about, beside it: `<index>-steps.png`, steps uint8 (K,C,H,W) side by side, and `<index>.gif`."""
    shown = side_by_side(steps, frames)
    write_atomically(path.with_name(f"{path.stem}-steps.png"), png(grid(shown, len(shown)), {"steps": len(shown)}))
    images = [as_image(step) for step in shown]
    write_film([*images, *images[-1:] * 5], path.with_suffix(".gif"), 150)


def frames_in(path: Path, frames: int) -> list[Image.Image]:
    """The frames of a picture of ours, which are side by side in it."""
    return [as_image(frame) for frame in read_shown(path).chunk(frames, dim=-1)]
