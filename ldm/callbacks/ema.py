"""Exponential moving average of the weights."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.model_folder import CHECKPOINT_KEY


class EMA(L.Callback):
    """Averages module.model's trainable weights after every optimizer step; validation, prediction and the model folder use them.

    decay is warmed up as min(decay, (1 + step) / (10 + step)).  The checkpoint's state_dict keeps the raw weights.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"the EMA's decay is {decay}; allowed is 0 to less than 1")
        self.decay = decay
        self.averaged: dict[str, Tensor] = {}
        self.step, self.swapped = 0, False

    @staticmethod
    def trained(pl_module: L.LightningModule) -> dict[str, Tensor]:
        model = pl_module.model
        assert isinstance(model, nn.Module)
        return {name: p.data for name, p in model.named_parameters() if p.requires_grad}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = self.trained(pl_module)
        source = self.averaged or weights
        self.averaged = {name: source[name].detach().clone().to(weights[name]) for name in weights}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        decay = self.decay_at(self.step)
        weights = self.trained(pl_module)
        torch._foreach_lerp_(list(self.averaged.values()), [weights[name] for name in self.averaged], 1 - decay)

    def decay_at(self, step: int) -> float:
        """Of the average, which is warmed up."""
        return min(self.decay, (1 + step) / (10 + step))

    def _swap(self, pl_module: L.LightningModule) -> None:
        weights = self.trained(pl_module)
        for name, averaged in self.averaged.items():
            held = averaged.clone()
            averaged.copy_(weights[name])
            weights[name].copy_(held)
        self.swapped = not self.swapped

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.averaged:
            self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.swapped:
            self._swap(pl_module)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert not self.swapped, "the checkpoint would hold averaged weights as raw ones"
        checkpoint.setdefault(CHECKPOINT_KEY, {})["averaged"] = dict(self.averaged)  # no copies: it is written at once

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.averaged = dict(checkpoint.get(CHECKPOINT_KEY, {}).get("averaged", {}))
        self.step = int(checkpoint["global_step"])
