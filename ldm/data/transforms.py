"""Pictures out, from pixels."""

import torch
from PIL import Image
from torch import Tensor

from ldm.data.modes import MODES


def as_image(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) -> grey, RGB or RGBA image; of another number of channels the first three, or one."""
    shown = pixels if len(pixels) in MODES else pixels[: 3 if len(pixels) > 4 else 1]
    return Image.fromarray(shown.permute(1, 2, 0).squeeze(2).cpu().numpy())


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """uint8 (N,3,H,W) -> one uint8 (3, ., .) picture with `columns` per row on white."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])
    images = torch.nn.functional.pad(images, (0, gap, 0, gap), value=255)
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return torch.nn.functional.pad(rows, (gap, 0, gap, 0), value=255)
