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
        self._array: np.memmap | None = None

    @property
    def complete(self) -> bool:
        card = self.folder / "latents.json"
        return card.is_file() and json.loads(card.read_text())["key"] == self.key

    def create(self, shape: tuple[int, ...]) -> None:
        """Make room for (2, N, M, h, w)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self.folder / "moments.npy", mode="w+", dtype=np.float16, shape=shape).flush()

    def write(self, indices: Sequence[int], moments: Tensor) -> None:
        """moments (2, len(indices), M, h, w); several processes write disjoint parts of one file."""
        array = np.load(self.folder / "moments.npy", mmap_mode="r+")
        array[:, list(indices)] = moments.float().cpu().numpy()
        array.flush()

    def finish(self) -> None:
        temporary = self.folder / ".latents.json"
        temporary.write_text(json.dumps({"key": self.key}))
        os.replace(temporary, self.folder / "latents.json")

    def __getitem__(self, keys: tuple[list[int], list[int]]) -> Tensor:
        """(mirrored, indices) -> float32 (B, M, h, w)."""
        if self._array is None:
            self._array = np.load(self.folder / "moments.npy", mmap_mode="r")
        return torch.from_numpy(self._array[keys].astype(np.float32))
