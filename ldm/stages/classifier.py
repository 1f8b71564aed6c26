"""Beside stage 2: train a classifier of noisy latents, for classifier guidance."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ldm import model_folder
from ldm.devices import factor, send
from ldm.diffusion.objective import Uniform
from ldm.draws import Draws
from ldm.errors import UserError
from ldm.interfaces import Batch, Classifier, Factory, TimeSampler, TrainingData, built
from ldm.latents.model import LatentDiffusion, NoisyClassifier
from ldm.stages.derive import facts
from ldm.stages.optim import AdamW, Part, configure
from ldm.stages.training import TrainingStage, posterior_of, require_channels, require_classes


class ClassifierStage(TrainingStage):
    """Minimises the cross-entropy of the class of z0 + sigma * noise (section 4, arXiv:2105.05233); images without a class are left out.

    diffusion: model folder or checkpoint of the stage 2 to be guided, whose latents and schedule the classifier takes over.
    data: what the number of classes is derived from.
    """

    def __init__(
        self,
        diffusion: str,
        network: Factory[Classifier] | Classifier,
        times: TimeSampler = Uniform(),  # noqa: B008  frozen
        optimizer: AdamW = AdamW(weight_decay=0.05),  # noqa: B008  frozen
        seed: int = 0,
        data: TrainingData | None = None,
    ) -> None:
        super().__init__()
        found, self.made_from = model_folder.load(diffusion).model, [diffusion]
        if not isinstance(found, LatentDiffusion):
            raise UserError(f"diffusion is {diffusion!r}, which holds a {type(found).__name__}: give a model of stage 2 (DiffusionStage)")
        autoencoder, num_classes = found.latents.autoencoder, facts(data).get("num_classes")
        made = built(network, in_channels=autoencoder.channels, num_classes=num_classes)
        self.model = NoisyClassifier(autoencoder, made, found.denoiser.schedule)
        self.model.latents.load_state_dict(found.latents.state_dict())
        self.times, self.optimizer, self.seed = times, optimizer, seed
        self.held_out_loss, self.held_out_accuracy = self.mean(), self.mean()

    def check(self, data: TrainingData) -> None:
        super().check(data)
        require_classes(data, "network", self.model.network.num_classes)
        require_channels(data, self.model.latents.autoencoder, "give the images that the model of --model.diffusion was trained on")

    def on_fit_start(self) -> None:
        self.cache_latents(self.model.latents)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, accuracy and whether the image has a class, (B,) each."""
        latents, schedule, label = self.model.latents, self.model.schedule, batch["label"]
        posterior = posterior_of(latents, batch)
        draws: Draws = batch["draws"]
        z0 = latents.to_latents(posterior, draws.normal(posterior.mode()))
        sigma = schedule.sigma(self.times.sample(send(draws.uniform(), z0.device), schedule))
        logits = self.model.logits(z0 + factor(sigma, z0) * draws.normal(z0), sigma)
        known = label >= 0
        return F.cross_entropy(logits, label.where(known, 0), reduction="none"), (logits.argmax(1) == label).float(), known

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seed_step(batch_idx)
        *figures, known = self._loss(self.with_draws(batch, batch_idx))
        loss, accuracy = ((figure * known).sum() / known.sum().clamp(min=1) for figure in figures)
        self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, prog_bar=True, batch_size=len(batch["id"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """On held-out images, always with the same noise and steps."""
        if not batch["id"]:
            return
        loss, accuracy, known = self._loss(self.with_draws(batch, batch_idx))
        self.held_out_loss(loss[known])
        self.held_out_accuracy(accuracy[known])
        found = {"val/loss": self.held_out_loss, "val/accuracy": self.held_out_accuracy}
        self.log_dict(found, prog_bar=True, on_epoch=True, batch_size=len(batch["id"]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return configure([Part([p for p in self.parameters() if p.requires_grad], self.optimizer)], self.trainer.max_steps)
