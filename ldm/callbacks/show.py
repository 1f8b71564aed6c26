"""What a run shows: progress and pictures."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from ldm.callbacks.loggers import wandb_may_fail
from ldm.data.transforms import as_image, grid
from ldm.ranges import to_uint8
from ldm.signals import Interrupted, breakable


class Progress(TQDMProgressBar):
    """Lightning's bar with losses and images per second."""

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._images, self._since = 0, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch["id"]) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        now = time.monotonic()
        if self._images and now > self._since:
            metrics["img/s"] = round(self._images / (now - self._since), 1)
        if now - self._since > 10:
            self._images, self._since = 0, now
        return metrics


class Pictures(L.Callback):
    """After each validation: the stage's pictures as PNG in `folder` and in W&B, so many square ones in a row, fewer wide ones."""

    def __init__(self, folder: str, columns: int = 8) -> None:
        self.folder, self.columns = folder, columns
        self._batch: Any = None

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._batch = batch

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or self._batch is None:
            return
        alone = trainer.world_size == 1  # several ranks make them together: none may leave
        try:
            with breakable() if alone else nullcontext(), trainer.precision_plugin.forward_context():
                pictures: dict[str, Tensor] = module.pictures(self._batch)  # type: ignore[operator]
        except Interrupted:  # the training stops at its next batch
            return
        if trainer.is_global_zero:
            self._show(trainer, module, pictures)

    def _show(self, trainer: L.Trainer, module: L.LightningModule, pictures: dict[str, Tensor]) -> None:
        for name, images in pictures.items():
            height, width = images.shape[2:]
            picture = as_image(grid(to_uint8(images), max(1, self.columns * height // width)))
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            picture.save(Path(self.folder) / f"{name}_{trainer.global_step:07d}.png")
            captions = getattr(module, "captions", {}).get(name)
            shown = [picture] if captions is None else [as_image(one) for one in to_uint8(images)]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    # Lightning's count, which it gives the numbers of this validation, too: W&B drops what comes with an earlier step
                    step = trainer.fit_loop.epoch_loop._batches_that_stepped
                    with wandb_may_fail("take the pictures of this validation"):
                        logger.log_image(f"val/{name}", shown, step=step, caption=captions or [""])
