"""Faster steps after a slow start."""

import lightning as L


class Compile(L.Callback):
    """Compiles the model (torch.compile) before training; the weights' names stay as they are.

    mode: of torch.compile; "max-autotune-no-cudagraphs" searches longer for faster kernels.
    """

    def __init__(self, mode: str = "default") -> None:
        self.mode = mode

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.compile(mode=self.mode)  # type: ignore[operator,union-attr]
