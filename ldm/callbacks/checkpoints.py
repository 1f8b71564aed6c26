"""Checkpoints that survive crashes and signals, and the model folder at the end."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ldm import model_folder
from ldm.callbacks.ema import EMA


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a crash never destroys the previous checkpoint; loads without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class Checkpoints(ModelCheckpoint):
    """Lightning's, but last.ckpt is the last step also of a run that ends between two checkpoints, and going on from there is exact."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:  # at the end of training Lightning has begun the next epoch
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.max_steps < 0:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.save_last and self.dirpath is not None:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")


class Stopped(SystemExit):
    """A signal asked the run to stop; the exit status is 128 + its number."""


class GracefulStop(L.Callback):
    """Ctrl-C and SIGTERM end the run after an optimizer step with a checkpoint; a second Ctrl-C ends it at once.

    List it after EMA, so that the average has seen the step.
    """

    def __init__(self) -> None:
        self._received, self._previous = 0, dict[int, Any]()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        number = self._received
        if trainer.world_size > 1:  # all ranks stop at the same step
            number = int(trainer.strategy.reduce(torch.tensor(number, device=pl_module.device), reduce_op="max"))
        if number:
            self._restore()
            raise Stopped(128 + number)  # ModelCheckpoint(save_on_exception=True) saves

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class ModelFolder(L.Callback):
    """Writes the model folder (averaged weights) when training has come to its end."""

    def __init__(self, path: str, half: bool = False) -> None:
        self.path, self.half, self.written = path, half, False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.written = True
        if trainer.is_global_zero:
            averaged = next((c.averaged for c in trainer.callbacks if isinstance(c, EMA)), {})  # type: ignore[attr-defined]
            stage: Any = pl_module
            model_folder.save(stage.model, self.path, stage.card(), averaged, self.half)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on from its last step trains nothing, and Lightning then leaves `on_train_end` out."""
        if not self.written and 0 < trainer.max_steps <= trainer.global_step:
            if trainer.is_global_zero:
                print(f"step {trainer.global_step} was the last one already: nothing was left to train")
            self.on_train_end(trainer, pl_module)
