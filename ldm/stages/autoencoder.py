"""Stage 1: train the autoencoder."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.interfaces import Autoencoder, AutoencoderLoss, Batch
from ldm.stages import training
from ldm.stages.optim import AdamW


class AutoencoderStage(L.LightningModule):
    """Minimises reconstruction error per pixel + kl_weight * KL (nats) / pixels + any further losses.

    Both terms are per value of the image (3*H*W), so kl_weight means what LDM's 1e-6 on sums means.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        reconstruction: Literal["l1", "l2"] = "l1",
        kl_weight: float = 1e-6,
        losses: Sequence[AutoencoderLoss] = (),
        optimizer: AdamW = AdamW(),  # noqa: B008  frozen
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = autoencoder
        self.losses = torch.nn.ModuleList(losses)
        self.error = F.l1_loss if reconstruction == "l1" else F.mse_loss
        self.kl_weight, self.optimizer, self.seed = kl_weight, optimizer, seed
        self.psnr = PeakSignalNoiseRatio(data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
        self.ssim = StructuralSimilarityIndexMeasure(data_range=2.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        training.seed_step(self, self.seed, batch_idx)
        x = training.images_of(batch)
        posterior = self.model.encode(x)
        z = posterior.sample(torch.randn_like(posterior.mode()))
        reconstruction = self.model.decode(z)
        error, penalty = self.error(reconstruction, x), posterior.penalty().mean()
        loss = error + self.kl_weight * penalty / x[0].numel()
        for extra in self.losses:
            loss = loss + extra(x, reconstruction).mean()
        logs = {"train/loss": loss, "train/reconstruction": error, "train/kl_per_dim": penalty / z[0].numel()}
        self.log_dict(logs, prog_bar=True, batch_size=len(x))
        return training.require_finite(loss, self.global_step)

    def reconstruct(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) in [-1,1] -> what the decoder makes of the posterior's mode, clamped to [-1, 1]."""
        return self.model.decode(self.model.encode(x).mode()).clamp(-1, 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x = training.images_of(batch)
        reconstruction = self.reconstruct(x)
        self.psnr(reconstruction, x)
        self.ssim(reconstruction, x)
        self.log_dict({"val/psnr": self.psnr, "val/ssim": self.ssim}, prog_bar=True, on_epoch=True, batch_size=len(x))
        self.log("val/reconstruction", self.error(reconstruction, x), on_epoch=True, sync_dist=True, batch_size=len(x))

    test_step = validation_step

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Images above their reconstructions, each (2N,3,H,W) in [-1,1]."""
        x = training.images_of(batch)[:8]
        return {"reconstructions": torch.cat([x, self.reconstruct(x)])}

    def card(self) -> dict[str, Any]:
        return training.card(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training.add_to_checkpoint(self, checkpoint)

    def configure_optimizers(self) -> Any:
        return self.optimizer.configure(self.parameters(), self.trainer.max_steps)
