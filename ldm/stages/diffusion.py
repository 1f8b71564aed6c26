"""Stage 2: train the noise predictor in the frozen first stage's latents."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm import model_folder
from ldm.diffusion.denoiser import Prediction
from ldm.interfaces import Autoencoder, Batch, Cond, Conditioner, Guidance, Network, NoiseSchedule, Objective, Sampler
from ldm.stages import training
from ldm.stages.generation import Recipe, Request, generate
from ldm.stages.model import LatentDiffusion
from ldm.stages.optim import AdamW, Part, configure


class DiffusionStage(L.LightningModule):
    """Minimises the objective over uniform steps t; `drop` of the samples lose their condition (arXiv:2207.12598).

    first_stage: model folder or checkpoint of stage 1, or an autoencoder that has nothing to learn (Pixels).
    sampler, guidance, sampling_steps: for the validation pictures.
    """

    def __init__(
        self,
        first_stage: str | Autoencoder,
        network: Network,
        conditioner: Conditioner,
        schedule: NoiseSchedule,
        objective: Objective,
        sampler: Sampler,
        guidance: Guidance,
        prediction: Prediction = "eps",
        sampling_steps: int = 25,
        drop: float = 0.1,
        optimizer: AdamW = AdamW(),  # noqa: B008  frozen
        seed: int = 0,
    ) -> None:
        super().__init__()
        autoencoder = first_stage if isinstance(first_stage, Autoencoder) else model_folder.load(first_stage).model
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(f"first_stage is {first_stage!r}, which holds a {type(autoencoder).__name__}: give an autoencoder (stage 1)")
        self.model = LatentDiffusion(autoencoder, network, conditioner, schedule, prediction)
        self.objective, self.drop, self.optimizer, self.seed = objective, drop, optimizer, seed
        self.recipe = Recipe(sampler, guidance, sampling_steps)

    def on_fit_start(self) -> None:
        """Cache the latents, if the data module has a cache; measure them, unless a checkpoint brought the statistics."""
        data, latents = training.training_data(self), self.model.latents
        classes = self.model.conditioner.num_classes
        if classes and classes != len(data.classes):
            raise ValueError(
                f"the conditioner has {classes} classes, the data {len(data.classes)} ({', '.join(data.classes[:12])}): "
                f"set model.conditioner.num_classes to {len(data.classes)}, or use the conditioner Unconditional"
            )
        data.cache_latents(latents.moments, model_folder.fingerprint(latents.autoencoder), self.device)
        if not latents.measured:
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        """Mean and standard deviation per channel of latents sampled once for every training image, over all ranks."""
        latents, total, size = self.model.latents, 0, (0, 0)
        sums = torch.zeros(3, latents.autoencoder.channels, dtype=torch.float64, device=self.device)
        generator = torch.Generator().manual_seed(self.seed + self.global_rank)
        for batch in training.training_data(self).share():
            posterior = self._posterior(self._to_device(batch))
            mode = posterior.mode()
            z = posterior.sample(torch.randn(mode.shape, generator=generator).to(mode)).double()
            sums += torch.stack([z.sum((0, 2, 3)), z.square().sum((0, 2, 3)), torch.full_like(sums[0], z[:, 0].numel())])
            total, size = total + len(z), (z.shape[2], z.shape[3])
        first, second, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        images = self.trainer.strategy.reduce(torch.tensor(total, device=self.device), reduce_op="sum")
        mean = first / count
        latents.measure(mean.float(), (second / count - mean**2).sqrt().float(), int(images), size)

    def _to_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _posterior(self, batch: Batch) -> Any:
        autoencoder = self.model.latents.autoencoder
        if "moments" in batch:
            return autoencoder.posterior(batch["moments"])
        with torch.no_grad():
            return autoencoder.encode(training.images_of(batch))

    def _loss(self, batch: Batch, drop: float) -> Tensor:
        """(B,) with fresh posterior samples, noise, steps and dropped conditions."""
        posterior, model = self._posterior(batch), self.model
        mode = posterior.mode()
        z0 = model.latents.to_latents(posterior, torch.randn_like(mode))
        noise, t = self.objective.draw(z0, model.denoiser.schedule)
        cond: Cond = model.conditioner.encode(batch, model.latents.to_latents)
        if drop:
            keep = torch.rand(len(z0), device=z0.device) >= drop
            cond = cond.where(keep, model.conditioner.null(batch))
        return self.objective.loss(model.denoiser, z0, noise, t, cond)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        training.seed_step(self, self.seed, batch_idx)
        loss = self._loss(batch, self.drop).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["id"]))
        return loss

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        training.clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The objective on held-out images, always with the same noise and steps."""
        if not batch["id"]:
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            self.log("val/loss", self._loss(batch, 0.0).mean(), prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(batch["id"]))

    test_step = validation_step

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Sixteen samples (N,3,H,W) in [-1,1], classes spread evenly."""
        classes = training.training_data(self).classes if self.model.conditioner.num_classes else []
        wanted = [classes[i * len(classes) // 16] if classes else None for i in range(16)]
        requests = [Request(index, 0, condition) for index, condition in enumerate(wanted)]
        return {"samples": generate(self.model, requests, self.recipe, classes)}

    def card(self) -> dict[str, Any]:
        """The recipe that the validation pictures used is what `predict` uses unless told otherwise."""
        return {**training.card(self), "recipe": model_folder.describe(vars(self.recipe))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training.add_to_checkpoint(self, checkpoint)

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return configure([Part(trainable, self.optimizer)], self.trainer.max_steps)
