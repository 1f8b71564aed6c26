"""Writes what `predict` makes: one PNG per picture, with its settings inside."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.data.transforms import as_image, grid, read_pixels
from ldm.data.watermark import mark
from ldm.model_folder import write_atomically
from ldm.ranges import to_uint8
from ldm.stages.generation import Request

TEXT_KEY = "ldm"


def path_of(folder: Path, index: int) -> Path:
    return folder / f"{index}.png"


def settings_in(path: Path) -> dict[str, Any] | None:
    """What a picture says of how it was made; None for a missing file or somebody else's."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(TEXT_KEY)
    except (OSError, SyntaxError):
        return None
    return json.loads(text) if text else None


def animate(paths: Sequence[Path], target: Path, milliseconds: int = 100) -> None:
    """Pictures one after the other, lossless."""
    first, *others = [as_image(read_pixels(path)) for path in paths]
    first.save(target, save_all=True, append_images=others, duration=milliseconds, loop=0, lossless=True)


class PictureWriter(L.Callback):
    """`<index>.png` in `folder` as soon as it is made, on every rank, with a watermark if wanted; beside it how it came about, where
    Generation tells."""

    def __init__(self, folder: Path, settings: Callable[[Request], dict[str, Any]], watermark: bool = False) -> None:
        self.folder, self.settings, self.watermark = folder, settings, watermark

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        requests, pictures, frames = outputs
        for request, pixels, shown in zip(requests, pictures, [None] * len(requests) if frames is None else frames, strict=True):
            if shown is not None:
                self._write_trajectory(path_of(self.folder, request.index), to_uint8(shown))
            info, data = PngInfo(), io.BytesIO()
            info.add_text(TEXT_KEY, json.dumps(self.settings(request), ensure_ascii=True))
            made = to_uint8(pixels).cpu()
            as_image(mark(made) if self.watermark else made).save(data, format="PNG", pnginfo=info)
            write_atomically(path_of(self.folder, request.index), data.getvalue())

    @staticmethod
    def _write_trajectory(path: Path, frames: Tensor) -> None:
        """<index>-steps.png, the frames (K,3,H,W) side by side, and <index>.gif."""
        as_image(grid(frames, len(frames))).save(path.with_name(f"{path.stem}-steps.png"))
        first, *others = [as_image(frame) for frame in frames]
        first.save(path.with_suffix(".gif"), save_all=True, append_images=[*others, *others[-1:] * 5], duration=150, loop=0)
