"""Averages of any length, chosen after training (section 3, arXiv:2312.02696)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ldm.callbacks.ema import EMA
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.model_folder import CHECKPOINT_KEY


def gamma_of(std: float) -> float:
    """The exponent of the profile t^gamma whose relative standard deviation is std (Eq. 125): (gamma+1)/((gamma+2)^2 (gamma+3)) = std^2."""
    if not 0 < std < 12**-0.5:
        raise UserError(f"an average's relative length is {std}; allowed is more than 0 and less than {12**-0.5:.3f}")
    a = std**-2
    return float(np.roots([1, 7, 16 - a, 12 - a]).real.max())


def inner(t: np.ndarray, gamma: np.ndarray, other_t: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """(N,M) integrals of the product of the profiles (gamma+1) tau^gamma / t^(gamma+1), 0 < tau < t, of N and of M averages."""
    t, gamma = t[:, None], gamma[:, None]
    shorter = np.minimum(t, other_t)
    scale = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return scale * (shorter / t) ** gamma / t * (shorter / other_t) ** other_gamma / other_t * shorter


def combination(steps: Sequence[int], stds: Sequence[float], step: int, std: float) -> np.ndarray:
    """Weights (N,) of stored averages whose sum comes nearest to the average of length `std` at `step` (Eq. 129)."""
    t, gamma = np.array(steps, dtype=np.float64), np.array([gamma_of(s) for s in stds])
    wanted = np.array([float(step)]), np.array([gamma_of(std)])
    return np.linalg.lstsq(inner(t, gamma, t, gamma), inner(t, gamma, *wanted)[:, 0], rcond=1e-12)[0]


class PowerEMA(L.Callback):
    """Keeps averages of relative lengths `stds` of module.model's trained weights and writes them to `folder` now and then, in 16 bits.

    `ldm ema` makes an average of any other length of them.
    """

    def __init__(self, folder: str, stds: Sequence[float] = (0.05, 0.1), every_n_steps: int = 1000) -> None:
        self.folder, self.stds, self.every = Path(folder), tuple(stds), every_n_steps
        self.gammas = [gamma_of(std) for std in stds]
        self.tracks: list[dict[str, Tensor]] = []
        self.step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = EMA.trained(pl_module)
        sources = self.tracks or [weights for _ in self.stds]
        self.tracks = [{name: source[name].detach().clone().to(weights[name]) for name in weights} for source in sources]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        weights = EMA.trained(pl_module)
        for track, gamma in zip(self.tracks, self.gammas, strict=True):
            beta = (1 - 1 / self.step) ** (gamma + 1)
            torch._foreach_lerp_(list(track.values()), [weights[name] for name in track], 1 - beta)
        if trainer.is_global_zero and self.step % self.every == 0:
            self._store()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.step % self.every:
            self._store()

    def _store(self) -> None:
        for std, track in zip(self.stds, self.tracks, strict=True):
            data = safetensors.torch.save({name: t.half().cpu() for name, t in track.items()})
            write_atomically(self.folder / f"{std}-{self.step:08d}.safetensors", data)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault(CHECKPOINT_KEY, {})["tracks"] = [dict(track) for track in self.tracks]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.tracks = list(checkpoint.get(CHECKPOINT_KEY, {}).get("tracks", []))
        self.step = int(checkpoint["global_step"])


def stored(folder: Path) -> list[tuple[float, int, Path]]:
    """(std, step, file) of what PowerEMA wrote."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        std, _, step = path.stem.rpartition("-")
        found.append((float(std), int(step), path))
    if not found:
        raise UserError(f"there are no stored averages in {str(folder)!r}: train with -c trainer/power-ema.yaml")
    return found


def reconstruct(folder: Path, stds: Sequence[float], step: int) -> list[dict[str, Tensor]]:
    """The averages of these lengths at a step, of those stored until then, in fp32; each file is read once."""
    files = [entry for entry in stored(folder) if entry[1] <= step]
    steps, lengths = [number for _, number, _ in files], [length for length, _, _ in files]
    weights = np.stack([combination(steps, lengths, step, std) for std in stds])
    totals: list[dict[str, Tensor]] = [{} for _ in stds]
    for (_, _, path), shares in zip(files, weights.T, strict=True):
        for name, tensor in safetensors.torch.load_file(path).items():
            for total, share in zip(totals, shares, strict=True):
                total[name] = total.get(name, torch.zeros(())) + float(share) * tensor.float()
    return totals
