"""Steps whose gradients are not finite."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from ldm.errors import UserError
from ldm.stages.training import logs_now


class SkipNonFinite(L.Callback):
    """Leaves out optimizer steps with a gradient that is not finite, counts them, and ends the run after `limit` in a row.  Logs the
    gradients' norm before clipping, of each group of parameters; W&B sends an alert when steps were skipped.

    Skipping happens inside the fused optimizer, as with torch.amp.GradScaler: nothing waits for the GPU.  The weights stay good, so
    the checkpoint that ends the run is, too.  At 16-mixed precision the scaler skips; its steps are counted as well.
    """

    def __init__(self, limit: int = 20) -> None:
        if limit < 1:
            raise UserError(f"SkipNonFinite's limit is {limit}; allowed is 1 or more")
        self.limit = limit
        self._counts: Tensor | None = None  # skipped in all, in a row up to now, most in a row
        self._told = 0  # skipped steps of which an alert was sent

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        norms = [torch.stack(torch._foreach_norm(group)) for group in gradients if group]
        bad = ~torch.cat(norms).sum().isfinite()
        if logs_now(trainer):
            scaler = getattr(trainer.precision_plugin, "scaler", None)  # whose factor is in the gradients
            factor = 1.0 if scaler is None else scaler.get_scale()
            named = {f"train/gradient_norm{f'_{i}' if i else ''}": norm.norm() / factor for i, norm in enumerate(norms)}
            pl_module.log_dict(named, batch_size=1)
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        total, row, most = torch.zeros(3, dtype=torch.int64, device=bad.device) if self._counts is None else self._counts.to(bad.device)
        row = (row + 1) * bad
        self._counts = torch.stack([total + bad, row, torch.maximum(row, most)])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = min(self.limit, trainer.log_every_n_steps or self.limit)  # type: ignore[attr-defined]
        if self._counts is None or trainer.global_step % every:
            return
        skipped, _, in_a_row = self._counts.tolist()
        pl_module.log("train/skipped_steps", float(skipped), batch_size=1)
        if skipped > self._told:
            self._told = skipped
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    text = f"{skipped} steps up to step {trainer.global_step} had gradients that are not finite"
                    logger.experiment.alert("steps were skipped", text, wait_duration=600)
        if in_a_row >= self.limit:
            raise UserError(
                f"{in_a_row} steps in a row up to step {trainer.global_step} had gradients that are not finite and were skipped: "
                "lower the learning rate, or use precision 32-true or bf16-mixed"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._counts is not None and self._counts[0]:
            print(f"{int(self._counts[0])} steps had gradients that are not finite and were skipped")

    def state_dict(self) -> dict[str, Any]:
        return {"counts": None if self._counts is None else self._counts.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = None if state_dict["counts"] is None else torch.tensor(state_dict["counts"])
