"""What both training stages share: they are siblings, and each calls these."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ldm import model_folder
from ldm.interfaces import Autoencoder, Batch, TrainingData


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


def clip_gradients(module: L.LightningModule, optimizer: torch.optim.Optimizer, value: float | None, algorithm: str | None) -> None:
    """Each parameter group by itself: a large gradient of the discriminator must not shrink the generator's."""
    if not value:
        return
    if (scaler := getattr(module.trainer.precision_plugin, "scaler", None)) is not None:
        scaler.unscale_(optimizer)  # Lightning leaves this to the fused optimizer, which is too late
    clip = nn.utils.clip_grad_value_ if algorithm == "value" else nn.utils.clip_grad_norm_
    for group in optimizer.param_groups:
        clip(group["params"], value)


def start_from(autoencoder: Autoencoder, path: str | None) -> Autoencoder:
    """The same module, with the weights of a model folder or checkpoint (of stage 1, or of a stage 2 that holds such a first stage)."""
    if path is not None:
        found = model_folder.load(path).model
        latents = getattr(found, "latents", None)
        model_folder.load_weights(autoencoder, (found if latents is None else latents.autoencoder).state_dict(), path)
    return autoencoder


def freeze(module: nn.Module, beginnings: Sequence[str]) -> None:
    for beginning in beginnings:
        chosen = [parameter for name, parameter in module.named_parameters() if name.startswith(beginning)]
        if not chosen:
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in module.named_parameters()))
            raise ValueError(f"freeze has {beginning!r}, with which no parameter's name begins; they begin with {parts}")
        for parameter in chosen:
            parameter.requires_grad_(False)
