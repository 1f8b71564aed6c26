"""The best checkpoint by the held-out loss, and a sentence where a model over-fits."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from ldm.callbacks.checkpoints import read_checkpoint
from ldm.errors import UserError

LOSSES = ("val/loss", "val/reconstruction")  # of stage 2 and of a classifier, of stage 1
DISTANCE = "val/fd"  # of the callback FrechetDistance, by which the best one is kept where it is there
SMALL = 1000  # training images
PATIENCE = 3  # validations without a least loss, after which it is said
CLEARLY = 1.01


class Best(L.Callback):
    """Keeps `best.ckpt` of the validation at which the held-out loss was least, or with FrechetDistance the distance, and says where
    it has risen since.

    dirpath: folder of the checkpoints.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = Path(dirpath) / "best.ckpt"
        self.least, self.step, self.latest, self.worse, self.told = math.inf, 0, math.inf, 0, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sets = getattr(getattr(trainer, "datamodule", None), "sets", None)
        if sets is not None and len(sets[0]) < SMALL and trainer.is_global_zero:
            print(
                f"{len(sets[0])} training images are few, so that a model learns them by heart: what helps are mirror images "
                "(data.mirror), --data.augment, fewer steps, and best.ckpt"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = next((trainer.callback_metrics[name] for name in (DISTANCE, *LOSSES) if name in trainer.callback_metrics), None)
        if found is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self.latest = float(found)
        if not self.latest < self.least:
            self.worse += math.isfinite(self.latest)
            if self.worse == PATIENCE:
                self._tell(trainer)
            return
        self.least, self.step, self.worse = self.latest, trainer.global_step, 0
        trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        if self.told or not self.latest > self.least + (CLEARLY - 1) * abs(self.least):
            return
        self.told = True
        if trainer.is_global_zero:
            figures = f"({self.least:.4g}; now {self.latest:.4g})"
            what = "distance val/fd" if DISTANCE in trainer.callback_metrics else "held-out loss"
            print(f"the {what} was least at step {self.step} {figures}: the model over-fits since; the one of then is {self.path}")

    def state_dict(self) -> dict[str, Any]:
        return {"least": self.least, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the best checkpoint, where it is there: the last one is written before the validation of its step."""
        if self.path.is_file():
            with suppress(UserError):  # a damaged one is replaced
                state_dict = read_checkpoint(self.path, "meta")["callbacks"].get(self.state_key, state_dict)
        self.least, self.step = float(state_dict["least"]), int(state_dict["step"])
