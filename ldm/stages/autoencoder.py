"""Stage 1: train the autoencoder."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm import model_folder
from ldm.errors import UserError
from ldm.interfaces import Adversary, Autoencoder, AutoencoderLoss, Batch, Factory, ReconstructionMetric, TrainingData, built
from ldm.ranges import to_float
from ldm.stages.health import CodeUsage, LatentMoments, LatentSpectrum
from ldm.stages.optim import AdamW, Part, configure
from ldm.stages.training import TrainingStage, first_stage_of, parameters_of, require_channels, require_multiple

Logs = dict[str, Tensor]
SMALLEST = 6  # px on a side: half of SSIM's window, by which images are padded


class AutoencoderStage(TrainingStage):
    """Minimises reconstruction error per pixel value + losses + the bottleneck's penalty + the adversary's.

    losses: further terms of the reconstruction error.  learn_variance: the error becomes error / exp(s) + s, s learned (LDM's logvar).
    metrics: measured on held-out images besides PSNR and SSIM.  init: model folder or checkpoint to start from.
    freeze: beginnings of parameter names that stay as they are; [encoder, quant_conv] trains the decoder alone.
    data: what the images' channels are derived from.
    The discriminator and the generator step together, on one batch: global_step counts both as one.
    """

    place = "model.autoencoder"

    def __init__(
        self,
        autoencoder: Factory[Autoencoder] | Autoencoder,
        reconstruction: Literal["l1", "l2"] = "l1",
        losses: Sequence[AutoencoderLoss] = (),
        adversary: Factory[Adversary] | Adversary | None = None,
        learn_variance: bool = False,
        metrics: Sequence[ReconstructionMetric] = (),
        init: str | None = None,
        freeze: Sequence[str] = (),
        optimizer: AdamW = AdamW(),  # noqa: B008  frozen
        discriminator_optimizer: AdamW | None = None,
        seed: int = 0,
        data: TrainingData | None = None,
    ) -> None:
        super().__init__()
        image_channels = None if data is None else data.channels
        autoencoder = built(autoencoder, image_channels=image_channels)
        adversary = None if adversary is None else built(adversary, image_channels=image_channels)
        self.model = autoencoder
        own = {loss.name for loss in losses if isinstance(loss, AutoencoderLoss)}
        if flattered := sorted(own & {metric.made.get("features") for metric in metrics if isinstance(metric, ReconstructionMetric)}):
            raise UserError(f"the network {flattered[0]} is in a loss and in a distance of metrics, which it would flatter: choose another")
        if init is not None:
            model_folder.load_weights(autoencoder, first_stage_of(init).state_dict(), init)
            self.made_from = [init]
        for parameter in parameters_of(autoencoder, freeze, "freeze"):
            parameter.requires_grad_(False)
        if adversary is not None and not autoencoder.last_layer.requires_grad:
            raise UserError(
                f"freeze is {list(freeze)}, which leaves the adversary nothing to train: leave the decoder out, or set adversary to null"
            )
        self.losses, self.adversary = nn.ModuleList(losses), adversary
        self.error = F.l1_loss if reconstruction == "l1" else F.mse_loss
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=learn_variance)
        self.optimizer, self.discriminator_optimizer, self.seed = optimizer, discriminator_optimizer or optimizer, seed
        self.psnr = PeakSignalNoiseRatio(data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
        self.ssim, self.held_out_error = StructuralSimilarityIndexMeasure(data_range=2.0), self.mean()
        self.metrics = nn.ModuleList(metrics)
        self.latents, self.spectrum = LatentMoments(autoencoder.channels), LatentSpectrum()
        self.usage = CodeUsage(autoencoder.num_codes) if autoencoder.num_codes else None

    def check(self, data: TrainingData) -> None:
        super().check(data)
        if data.frames > 1:
            raise UserError(f"stage 1 learns from single frames, the data are clips of {data.frames}: add --data.frames 1")
        if data.size < SMALLEST:
            raise UserError(f"data.size is {data.size}; stage 1 measures structural similarity, for which it is at least {SMALLEST}")
        data.use_buckets(self.model.factor)
        require_multiple(data, self.model.factor, f"the autoencoder, whose factor is {self.model.factor},")
        require_channels(data, self.model, "leave model.autoencoder.image_channels out, which follows from the data")
        if self.adversary is not None:
            device = next(self.adversary.parameters()).device  # not self.device, which is the GPU's before anything is there
            self.adversary.check(torch.zeros(1, data.channels, data.size, data.size, device=device))

    def on_fit_start(self) -> None:
        unsynced = any(type(module) is nn.BatchNorm2d for module in self.modules())
        if self.trainer.world_size > 1 and unsynced:
            raise UserError("the discriminator's batch norm needs --trainer.sync_batchnorm true on several devices, or norm: group")

    @property
    def adversarial(self) -> bool:
        return self.adversary is not None and self.global_step >= self.adversary.start

    def reconstruction_loss(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, Logs]:
        """() error per value of the image with all further terms."""
        logs: Logs = {"reconstruction": self.error(reconstruction, x)}
        total = logs["reconstruction"]
        extra: Any
        for extra in self.losses:
            logs[extra.name] = extra(x, reconstruction).mean()
            total = total + extra.weight * logs[extra.name]
        return total / self.log_variance.exp() + self.log_variance, logs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seed_step(batch_idx)
        x = to_float(batch["image"])
        reconstruction, latent = self.model(x, self.draws(batch, batch_idx).normal)
        with torch.autocast(x.device.type, enabled=False):
            reconstruction = reconstruction.float()
            loss, logs = self.reconstruction_loss(x, reconstruction)
            if self.adversarial:
                loss = self._with_adversary(x, reconstruction, loss, logs)
            elif self.adversary is not None and self.trainer.world_size > 1:  # DDP wants every parameter in the graph
                loss = loss + 0 * sum(p.sum() for p in self.adversary.parameters())
        loss = loss + latent.penalty.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        self.log_dict({f"train/{name}": value.detach() for name, value in {**logs, **latent.logs}.items()}, batch_size=len(x))
        return loss

    def _with_adversary(self, x: Tensor, reconstruction: Tensor, loss: Tensor, logs: Logs) -> Tensor:
        """loss + the discriminator's and the generator's.  The adaptive weight takes both losses' gradients by the reconstruction, which
        the returned loss then carries on: one pass back through the losses' networks and one through the discriminator."""
        assert self.adversary is not None
        told_apart, health = self.adversary.discriminator_loss(x, reconstruction)
        logs |= health
        if self.global_step < self.adversary.start + self.adversary.alone:
            return loss + told_apart
        fooled = self.adversary.generator_loss(reconstruction)
        learned = [self.log_variance] if self.log_variance.requires_grad else []
        own, *rest = torch.autograd.grad(loss, [reconstruction, *learned])
        (other,) = torch.autograd.grad(fooled, reconstruction)
        weight = self.adversary.weight * self.adversary.scale(reconstruction, (own, other), self.model.last_layer)
        logs |= {"g_loss": fooled, "d_weight": weight}
        carried = [_carry(value, pull) for value, pull in zip([reconstruction, *learned], [own + weight * other, *rest], strict=True)]
        return loss.detach() + weight * fooled.detach() + told_apart + sum(carried)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.adversary is not None and not self.adversarial:
            self.adversary.zero_grad(set_to_none=True)  # without gradients the optimizer leaves them alone

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.model.after_step()

    def reconstruct(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) in [-1,1] -> what the decoder makes of the posterior's mode, clamped to [-1, 1]."""
        return self.model.decode(self.model.encode(x).mode()).clamp(-1, 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not batch["id"]:
            return
        x = to_float(batch["image"])
        z = self.model.encode(x).mode()
        reconstruction = self.model.decode(z).float().clamp(-1, 1)
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse for the filters of SSIM
            self._measure(x, z.float(), reconstruction)

    def _measure(self, x: Tensor, z: Tensor, reconstruction: Tensor) -> None:
        self.psnr(reconstruction, x)
        self.ssim(reconstruction, x)
        for metric in self.metrics:
            metric.update(reconstruction, x)  # type: ignore[operator]
        self.latents.update(z)
        self.spectrum.update(z)
        if self.usage is not None:
            self.usage.update(self.model.codes(z))
        self.log_dict({"val/psnr": self.psnr, "val/ssim": self.ssim}, prog_bar=True, on_epoch=True, batch_size=len(x))
        self.held_out_error(self.error(reconstruction, x, reduction="none").flatten(1).mean(1))
        self.log("val/reconstruction", self.held_out_error, on_epoch=True, batch_size=len(x))

    def on_validation_epoch_end(self) -> None:
        metrics: list[Any] = [*self.metrics, self.latents, self.spectrum, *([self.usage] if self.usage else [])]
        for metric in metrics:
            self.log_dict({f"val/{name}": value for name, value in metric.compute().items()})
            metric.reset()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Images above their reconstructions, each (2N,3,H,W) in [-1,1]."""
        if not batch["id"]:
            return {}
        x = to_float(batch["image"])[:8]
        return {"reconstructions": torch.cat([x, self.reconstruct(x)])}

    def configure_optimizers(self) -> Any:
        generator = [p for p in (*self.model.parameters(), self.log_variance) if p.requires_grad]
        parts = [Part(generator, self.optimizer)]
        if self.adversary is not None:
            parts.append(Part(list(self.adversary.parameters()), self.discriminator_optimizer, self.adversary.start))
        return configure(parts, self.trainer.max_steps)


def _carry(value: Tensor, gradient: Tensor) -> Tensor:
    """(), 0, whose gradient by a value is the given one."""
    return ((value - value.detach()) * gradient).sum()
