"""The images that users give to a task or to a model of images."""

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.datasets import SUFFIXES
from ldm.data.transforms import as_rgb, as_tensor
from ldm.model_folder import Loaded
from ldm.ranges import to_float
from ldm.stages.generation import Recipe, Source


def frames_of(path: str) -> list[tuple[str, int]]:
    """The images of a folder in the order of their names, or the frames of an animated file: files and frame numbers."""
    if Path(path).is_dir():
        found = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"no images in {path!r}: allowed are {' '.join(sorted(SUFFIXES))}")
        return [(file, 0) for file in found]
    with Image.open(path) as opened:
        return [(path, number) for number in range(getattr(opened, "n_frames", 1))]


def read_source(
    loaded: Loaded, recipe: Recipe, image: str, mask: str | None, shows: str | int | None, towards: str | None = None, frame: int = 0
) -> Source:
    """An image (of an animated file that frame), its mask and a second image at the size at which the task wants them: cropped to the
    shape of the picture."""
    takes = loaded.model.conditioner.shrinks
    if recipe.task is None and not takes:
        raise ValueError(
            "an image was given, but no task: give --task, one of "
            "ImageToImage, Inpaint, Outpaint, RemoveNoise, Edit, Between, Style, Restore"
        )
    if recipe.task is not None and takes > 1:
        raise ValueError(
            f"this model makes its pictures from images {takes} times smaller and does nothing else: leave {type(recipe.task).__name__} out"
        )
    height, width = recipe.size or (loaded.card["size"], loaded.card["size"])
    factor = takes if recipe.task is None else recipe.task.shrinks
    facts: dict[str, Any] = {"image": Path(image).name, "image_sha256": hashlib.sha256(Path(image).read_bytes()).hexdigest()}
    if frame:
        facts["frame"] = frame
    x = _fitted(image, (width // factor, height // factor), frame)
    other = None if towards is None else _fitted(towards, (width, height))
    if towards is not None:
        facts |= {"towards": Path(towards).name, "towards_sha256": hashlib.sha256(Path(towards).read_bytes()).hexdigest()}
    if mask is None:
        return Source(x, None, facts, shows, other)
    with Image.open(mask) as opened, Image.open(image) as original:
        if opened.size != original.size:
            sizes = [f"{wide}x{high}" for wide, high in (opened.size, original.size)]
            raise ValueError(f"the mask {mask!r} has {sizes[0]} px, the image {sizes[1]}: make them alike")
        found = as_tensor(ImageOps.fit(opened.convert("L"), (width, height), Image.Resampling.BOX))
    facts["mask_sha256"] = hashlib.sha256(Path(mask).read_bytes()).hexdigest()
    return Source(x, (found > 127).float(), facts, shows, other)


def _fitted(path: str, size: tuple[int, int], frame: int = 0) -> Tensor:
    """(3,H,W) in [-1,1], cropped to the shape of size (width, height)."""
    with Image.open(path) as opened:
        opened.seek(frame)
        return to_float(as_tensor(ImageOps.fit(as_rgb(opened), size, Image.Resampling.LANCZOS)))
