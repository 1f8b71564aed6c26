"""The images that users give to a task or to a model of images."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.films import Frame, frames_of
from ldm.data.transforms import as_rgb, as_tensor
from ldm.model_folder import Loaded
from ldm.ranges import to_float
from ldm.stages.generation import Recipe, Source


def read_sources(
    loaded: Loaded, recipe: Recipe, image: str, mask: str | None, shows: str | int | None, towards: str | None = None
) -> Iterator[Source]:
    """An image, or every frame of a film (of a model of clips, every clip), its mask and a second image at the size at which the task
    wants them: cropped to the shape of the picture."""
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
    factor, frames = takes if recipe.task is None else recipe.task.shrinks, loaded.model.denoiser.network.frames
    digest, other, told = cache(_digest), None, dict[str, Any]()
    kind = (loaded.model.latents.autoencoder.image_channels // frames, loaded.card.get("window"))
    if towards is not None:
        other = _fitted(next(_clips(towards, frames, *kind)), (width, height))
        told |= {"towards": Path(towards).name, "towards_sha256": digest(Path(towards))}
    if mask is not None:
        told["mask_sha256"] = digest(Path(mask))
    for clip in _clips(image, frames, *kind):
        file, number, first = clip[0]
        digests = [digest(file) for file in dict.fromkeys(frame.file for frame in clip)]
        whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        facts = {"image": file.name, "image_sha256": whole, **({"frame": number} if number else {}), **told}
        x = _fitted(clip, (width // factor, height // factor))
        yield Source(x, None if mask is None else _mask(mask, first, (width, height)), facts, shows, other)


def _clips(path: str, frames: int, channels: int, window: tuple[float, float] | None) -> Iterator[Sequence[Frame]]:
    """The frames of a film, so many at a time."""
    shown = frames_of(Path(path), channels, window)
    while clip := _next(shown, frames, path):
        if len(clip) < frames:
            raise ValueError(
                f"the model makes clips of {frames} frames, {path!r} ends with {len(clip)}: give a multiple of {frames} frames"
            )
        yield clip


def _next(shown: Iterator[Frame], frames: int, path: str) -> list[Frame]:
    try:
        return list(islice(shown, frames))
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path!r} cannot be read: {error}") from error


def _fitted(clip: Sequence[Frame], size: tuple[int, int]) -> Tensor:
    """(C * frames,H,W) in [-1,1], cropped to the shape of size (width, height)."""
    return to_float(torch.cat([as_tensor(ImageOps.fit(frame.image, size, Image.Resampling.LANCZOS)) for frame in clip]))


def _mask(path: str, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1,H,W), 1 where it is white; transparent is black."""
    with Image.open(path) as opened:
        if opened.size != image.size:
            sizes = [f"{wide}x{high}" for wide, high in (opened.size, image.size)]
            raise ValueError(f"the mask {path!r} has {sizes[0]} px, the image {sizes[1]}: make them alike")
        return (as_tensor(ImageOps.fit(as_rgb(opened, "black").convert("L"), size, Image.Resampling.BOX)) > 127).float()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
