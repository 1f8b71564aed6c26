"""Writes what `predict` makes: one PNG per picture, with its settings inside."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.data.films import write_film
from ldm.data.transforms import as_image, grid, read_pixels
from ldm.data.watermark import mark
from ldm.frames import strip
from ldm.model_folder import write_atomically
from ldm.ranges import to_uint8
from ldm.stages.generation import Request
from ldm.stages.model import LatentDiffusion

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


def frames_in(path: Path, frames: int) -> list[Image.Image]:
    """The frames of a picture of ours, which are side by side in it."""
    return [as_image(frame) for frame in read_pixels(path).chunk(frames, dim=-1)]


class PictureWriter(L.Callback):
    """`<index>.png` in `folder` as soon as it is made, on every rank, with a watermark if wanted; beside it how it came about, where
    Generation tells.  A clip's frames are side by side in it, and one after the other in `<index>.webp`."""

    def __init__(self, folder: Path, settings: Callable[[Request], dict[str, Any]], watermark: bool = False) -> None:
        self.folder, self.settings, self.watermark = folder, settings, watermark

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        (requests, pictures, steps), model = outputs, pl_module.model
        assert isinstance(model, LatentDiffusion)
        frames = model.denoiser.network.frames
        for request, pixels, shown in zip(requests, pictures, [None] * len(requests) if steps is None else steps, strict=True):
            path, info, data = path_of(self.folder, request.index), PngInfo(), io.BytesIO()
            if shown is not None:
                self._write_trajectory(path, to_uint8(strip(shown, frames)))
            made = list(to_uint8(pixels).cpu().unflatten(0, (frames, -1)))
            made = [mark(frame) for frame in made] if self.watermark else made
            if frames > 1:
                write_film([as_image(frame) for frame in made], path.with_suffix(".webp"))
            info.add_text(TEXT_KEY, json.dumps(self.settings(request), ensure_ascii=True))
            as_image(torch.cat(made, dim=-1)).save(data, format="PNG", pnginfo=info)
            write_atomically(path, data.getvalue())

    @staticmethod
    def _write_trajectory(path: Path, steps: Tensor) -> None:
        """<index>-steps.png, the steps (K,3,H,W) side by side, and <index>.gif."""
        as_image(grid(steps, len(steps))).save(path.with_name(f"{path.stem}-steps.png"))
        images = [as_image(step) for step in steps]
        write_film([*images, *images[-1:] * 5], path.with_suffix(".gif"), 150)
