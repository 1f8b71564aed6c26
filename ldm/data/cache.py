"""The latent cache: what the frozen encoder makes of every image and of its mirror image, memory-mapped."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class LatentCache:
    """moments[mirrored][i] (M, h, w) as float16, in the folder <root>/<key>; `latents.json` marks it complete."""

    def __init__(self, root: str | Path, key: str) -> None:
        self.folder = Path(root) / key[:16]
        self.key = key
        self._opened: tuple[np.ndarray, list[int]] | None = None

    @property
    def complete(self) -> bool:
        card = self.folder / "latents.json"
        return card.is_file() and json.loads(card.read_text())["key"] == self.key

    def create(self, shape: tuple[int, ...]) -> None:
        """Make room for (2, N, M, h, w)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self.folder / "moments.npy", mode="w+", dtype=np.float16, shape=shape).flush()

    def write(self, indices: Sequence[int], read: Sequence[int], moments: Tensor) -> None:
        """moments (2, len(indices), M, h, w) of the images `read`; a damaged image (index != read) is marked as not a number.

        Several processes write disjoint parts of one file.
        """
        array = np.load(self.folder / "moments.npy", mmap_mode="r+")
        replaced = torch.tensor([index != other for index, other in zip(indices, read, strict=True)], device=moments.device)
        array[:, list(indices)] = moments.float().masked_fill(replaced[None, :, None, None, None], torch.nan).cpu().numpy()
        array.flush()

    def finish(self) -> None:
        temporary = self.folder / ".latents.json"
        temporary.write_text(json.dumps({"key": self.key}))
        os.replace(temporary, self.folder / "latents.json")

    def _open(self) -> tuple[np.ndarray, list[int]]:
        array = np.load(self.folder / "moments.npy", mmap_mode="r")
        readable = ~np.isnan(array[0, :, 0, 0, 0])
        positions = list(range(len(readable)))
        for index in reversed(range(2 * len(positions))):  # twice: the last ones' successors are the first
            if not readable[index % len(positions)]:
                positions[index % len(positions)] = positions[(index + 1) % len(positions)]
        return array, positions

    def __getitem__(self, keys: tuple[list[int], list[int]]) -> tuple[Tensor, list[int]]:
        """(mirrored, indices) -> moments float32 (B, M, h, w) and the images they are of (a damaged one's successor)."""
        if self._opened is None:
            self._opened = self._open()
        array, positions = self._opened
        used = [positions[index] for index in keys[1]]
        return torch.from_numpy(array[keys[0], used].astype(np.float32)), used
