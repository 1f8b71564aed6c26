"""What both training stages share: they are siblings, and each calls these."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm import model_folder
from ldm.interfaces import Batch, TrainingData


def seed_step(module: L.LightningModule, seed: int, batch_idx: int) -> None:
    """Noise, timesteps and dropout depend on (seed, rank, epoch, batch) alone, so a resumed run repeats none and skips none."""
    torch.manual_seed(hash((seed, module.global_rank, module.current_epoch, batch_idx)) % 2**32)


def training_data(module: L.LightningModule) -> TrainingData:
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, TrainingData):
        raise ValueError("training needs a data module of ldm.data: pass one with --data or -c configs/data/...")
    return data


def images_of(batch: Batch) -> Tensor:
    """uint8 (B,3,H,W) -> [-1, 1]."""
    return batch["image"].float() / 127.5 - 1


def card(module: L.LightningModule) -> dict[str, Any]:
    """Facts that a model folder keeps beside the weights."""
    data = training_data(module)
    return {"stage": type(module).__name__, "classes": list(data.classes), "size": int(data.size), "steps": int(module.trainer.global_step)}


def add_to_checkpoint(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """The model's description goes into the checkpoint, so that it can be rebuilt from it alone."""
    entry = checkpoint.setdefault(model_folder.CHECKPOINT_KEY, {})
    entry |= {"model": model_folder.describe(module.model), "card": module.card()}  # type: ignore[operator]


def require_finite(loss: Tensor, step: int) -> Tensor:
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()} at step {step}: lower the learning rate, or clip with trainer.gradient_clip_val=1")
    return loss
