"""Faster steps after a slow start."""

from typing import Any

import lightning as L
import torch
from torch import nn


class Compile(L.Callback):
    """Compiles the model (torch.compile) before training; the weights' names stay as they are.  Validations run as they are written: their
    batches and pictures come in sizes of their own, each of which would be compiled while the other ranks wait.

    mode: of torch.compile; "max-autotune-no-cudagraphs" searches longer for faster kernels.
    """

    def __init__(self, mode: str = "default") -> None:
        self.mode = mode
        self.parts, self._calls = list[nn.Module](), list[Any]()  # what is compiled, and what a call of it does

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = pl_module.model
        self.parts = model.parts_to_compile()
        for part in self.parts:
            part.compile(mode=self.mode)
        self._calls = [part._compiled_call_impl for part in self.parts]
        if pl_module.device.type == "cuda":  # convolutions are faster so there; without the compiler, group norms would undo it
            for weight in model.parameters():
                if weight.requires_grad and weight.ndim == 4:
                    weight.data = weight.data.to(memory_format=torch.channels_last)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for part in self.parts:
            part._compiled_call_impl = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for part, call in zip(self.parts, self._calls, strict=True):
            part._compiled_call_impl = call
