"""Images of users, from files and from memory, as what tasks and models of images take."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.decode import as_mask, read_mask
from ldm.data.films import frames_of
from ldm.data.modes import as_tensor, converted
from ldm.data.pixels import fitted
from ldm.errors import UserError
from ldm.interfaces import Condition
from ldm.ranges import to_float
from ldm.sampling.request import InputImage

# A file, or pixels: PIL; numpy (H,W), (H,W,C) or torch (C,H,W), uint8 in 0..255, uint16 in 0..65535 or floats in 0..1
ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor


class ImageFormat(NamedTuple):
    """What a model's images are: frames that belong together (1: no clips), channels of each, values that are black and white."""

    frames: int = 1
    channels: int = 3
    window: tuple[float, float] | None = None
    is_deep: bool = False  # more than 8 bits


class Shown(NamedTuple):
    """One image as it was given, with what a picture's settings say of it."""

    image: Image.Image
    facts: dict[str, Any]


def read_images(
    image: ImageLike, kind: ImageFormat, mask: ImageLike | None = None, second: ImageLike | None = None, shows: Condition | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[list[InputImage], list[str]]:  # fmt: skip
    """An image, or each frame (of a model of clips: each clip) of a film, and sentences on what was done to them.

    mask: white where the picture is to be made anew; second: to which the pictures go; size: height and width in px to which all are
    resized and cropped, None: they stay as they are.
    """
    images, notes = list[InputImage](), list[str]()
    other, more = None, None
    if second is not None:
        clips = _clips(second, kind)
        other, more = next(clips), next(clips, None)
    if more is not None:
        notes.append(f"{second} is a film: its beginning is taken")
    for clip in _clips(image, kind):
        facts, shape = _facts(clip), size or (clip[0].image.height, clip[0].image.width)
        notes += _cut(facts["image"], clip[0].image, shape)
        known_mask, known_second = None, None
        if mask is not None:
            known_mask, said = _mask(mask, clip[0].image, shape)
            facts["mask_sha256"], notes = _digest_of(mask), [*notes, *said]
        if other is not None:
            facts |= {f"to_{name}": value for name, value in _facts(other).items() if name != "frame"}
            notes += _cut(facts["to_image"], other[0].image, shape)
            known_second = _fitted(other, shape)
        images.append(InputImage(_fitted(clip, shape), known_mask, facts, shows or {}, known_second))
    return images, list(dict.fromkeys(notes))


def to_pil(image: ImageLike) -> Image.Image:
    """An image in memory as PIL has it; a UserError where its range or its layout is not clear."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        if pixels.ndim == 4 and len(pixels) == 1:
            pixels = pixels[0]
        if pixels.ndim == 3 and pixels.shape[0] not in (1, 3, 4) and pixels.shape[2] in (1, 3, 4):
            raise UserError(f"a tensor of shape {list(image.shape)} looks like (H,W,C); tensors are (C,H,W): give image.permute(2, 0, 1)")
        array = pixels.permute(1, 2, 0).numpy() if pixels.ndim == 3 else pixels.numpy()
    elif isinstance(image, np.ndarray):
        array = image
        if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
            raise UserError(f"an array of shape {list(array.shape)} looks like (C,H,W); arrays are (H,W,C): give image.transpose(1, 2, 0)")
    else:
        raise UserError(f"an image is a file's path, a PIL image, an array or a tensor; {type(image).__name__} was given")
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        array = array[:, :, 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        raise UserError(f"an image of shape {list(array.shape)} was given; allowed are (H,W) and 1, 3 or 4 channels")
    return Image.fromarray(_as_uint8(array))


def _as_uint8(array: np.ndarray) -> np.ndarray:
    """Values of an image in memory as 0..255."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.round(array / 257).astype(np.uint8)
    if array.dtype.kind != "f":
        raise UserError(f"an image of {array.dtype} values was given; allowed are uint8 in 0..255, uint16, bool, and floats in 0..1")
    low, high = float(np.min(array, initial=0.0)), float(np.max(array, initial=0.0))
    if not (low >= 0 and high <= 1):
        hint = "divide them by 255" if low >= 0 and high <= 255 else "give (x + 1) / 2" if low >= -1 and high <= 1 else "scale them"
        raise UserError(f"an image has float values from {low:g} to {high:g}; floats are in 0..1: {hint}")
    return np.round(array.astype(np.float64) * 255).astype(np.uint8)


def _shown(image: ImageLike, kind: ImageFormat) -> Iterator[Shown]:
    """Every frame of a film; an image in memory, and a file with one image, is one of a single frame."""
    if isinstance(image, (str, Path)):
        if not str(image):
            raise UserError("the name of an image is empty: was a shell variable not set?")
        digest = cache(_digest)
        for frame in frames_of(Path(image), kind.channels, kind.window, kind.is_deep):
            facts = {"image": frame.file.name, "image_sha256": digest(frame.file), **({"frame": frame.number} if frame.number else {})}
            yield Shown(frame.image, facts)
    else:
        picture = converted(to_pil(image), kind.channels, kind.window, kind.is_deep)
        yield Shown(picture, {"image": "in memory", "image_sha256": hashlib.sha256(picture.tobytes()).hexdigest()})


def _clips(image: ImageLike, kind: ImageFormat) -> Iterator[list[Shown]]:
    """As many frames at a time as belong together."""
    shown = _shown(image, kind)
    while clip := list(islice(shown, kind.frames)):
        if len(clip) < kind.frames:
            raise UserError(
                f"the model makes clips of {kind.frames} frames, {str(image)!r} ends with {len(clip)}: "
                f"give a multiple of {kind.frames} frames"
            )
        yield clip


def _facts(clip: Sequence[Shown]) -> dict[str, Any]:
    """What a picture's settings say of an image, or of the frames of a clip."""
    digests = list(dict.fromkeys(shown.facts["image_sha256"] for shown in clip))
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return {**clip[0].facts, "image_sha256": whole}


def _fitted(clip: Sequence[Shown], shape: tuple[int, int]) -> Tensor:
    """(C * frames,H,W) in [-1,1], resized and cropped to shape (height, width) where it has another one."""
    pixels = torch.cat([as_tensor(fitted(shown.image, shape)) for shown in clip])
    return to_float(pixels / 127.5 - 1 if pixels.is_floating_point() else pixels).clamp(-1, 1)


def _cut(name: str, image: Image.Image, shape: tuple[int, int]) -> list[str]:
    """A sentence where resizing to shape (height, width) cuts something away."""
    scale = max(shape[0] / image.height, shape[1] / image.width)
    left = [round(side - wanted / scale) for side, wanted in ((image.width, shape[1]), (image.height, shape[0]))]
    if max(left) < 1:
        return []
    what = " and ".join(f"{px} px of its {side}" for px, side in zip(left, ("width", "height"), strict=True) if px)
    return [f"{name} has {image.width}x{image.height} px: {what} are cut off for the shape {shape[1]}x{shape[0]}"]


def _mask(mask: ImageLike, image: Image.Image, shape: tuple[int, int]) -> tuple[Tensor, list[str]]:
    """(1,H,W), 1 where it is white, at shape (height, width); shrinking keeps thin strokes."""
    name = str(mask) if isinstance(mask, (str, Path)) else "in memory"
    values, note = read_mask(Path(mask)) if isinstance(mask, (str, Path)) else as_mask(to_pil(mask), name)
    white = (values > 0.5).float()
    height, width = white.shape[1:]
    if abs(width * image.height - height * image.width) > 0.01 * width * image.height:
        raise UserError(f"the mask {name!r} has {width}x{height} px, the image {image.width}x{image.height}: make them alike")
    scale = max(shape[0] / height, shape[1] / width)
    whole = (max(shape[0], round(height * scale)), max(shape[1], round(width * scale)))
    resized = F.adaptive_max_pool2d(white, whole) if scale < 1 else F.interpolate(white[None], whole, mode="nearest")[0]
    top, left = (whole[0] - shape[0]) // 2, (whole[1] - shape[1]) // 2
    cut = resized[:, top : top + shape[0], left : left + shape[1]]
    if not cut.any():
        raise UserError(f"the mask {name!r} has no white part within the image: paint white what is to be made anew")
    return cut, [] if note is None else [note]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest_of(image: ImageLike) -> str:
    return _digest(Path(image)) if isinstance(image, (str, Path)) else hashlib.sha256(to_pil(image).tobytes()).hexdigest()
