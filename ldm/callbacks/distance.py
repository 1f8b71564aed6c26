"""How like the training images the samples of a training are."""

import math
from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from ldm import model_folder
from ldm.data.images import Subset
from ldm.data.split import evenly, spread
from ldm.errors import UserError
from ldm.interfaces import Features
from ldm.metrics.features import Reference, measured
from ldm.sampling.like import samples_like
from ldm.sampling.model import Model
from ldm.signals import Interrupted, breakable
from ldm.stages.diffusion import DiffusionStage


class FrechetDistance(L.Callback):
    """After each validation of stage 2: `val/fd`, the Fréchet distance (arXiv:1706.08500) of `count` samples to `references` training
    images, evenly chosen, in features.  Best then keeps the checkpoint of the least one.

    steps: of these samples; all else is as `ldm sample` samples.  Distances depend on both numbers: compare none of different ones.
    """

    def __init__(self, features: Features, count: int = 256, steps: int = 12, references: int = 1024) -> None:
        if min(count, references) < 2 or steps < 1:
            asked = f"count {count}, references {references} and steps {steps}"
            raise UserError(f"FrechetDistance has {asked}; allowed are 2 or more samples and references and 1 step or more")
        self.features, self.count, self.steps, self.references = features, count, steps, references
        self._reference: Reference | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not isinstance(pl_module, DiffusionStage):
            return
        found = math.nan
        if trainer.is_global_zero:
            try:
                with breakable():
                    found = self._measured(pl_module)
            except Interrupted:  # the training stops at its next batch
                pass
        found = trainer.strategy.broadcast(found)
        if not math.isnan(found):
            pl_module.log("val/fd", found, prog_bar=True, batch_size=1)

    @torch.no_grad()
    def _measured(self, stage: DiffusionStage) -> float:
        device, train = stage.device, stage.trainer.datamodule.sets[0]  # type: ignore[attr-defined]
        indices = [int(train.indices[i]) for i in evenly(len(train.indices), self.references)]
        if self._reference is None:
            network = self.features.to(device)
            self._reference = Reference(network, measured(network, Subset(train.images, indices), 64, device)[0], device)
        model = Model(model_folder.Loaded(stage.model, stage.card(), ""), str(device))
        config = replace(stage.sampling, steps=self.steps)
        return self._reference.distance(samples_like(model, train.images, spread(indices, self.count), config))
