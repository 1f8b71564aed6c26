"""Fine-tuning of a small part of a diffusion model."""

from collections.abc import Sequence

import lightning as L
from torch import nn

from ldm.errors import UserError
from ldm.nn.lora import adapt
from ldm.stages.diffusion import DiffusionStage
from ldm.stages.training import parameters_of


class LoRA(L.Callback):
    """Trains low-rank additions to the network's linear and convolutional layers and nothing else (arXiv:2106.09685); for --model.init.

    rank, alpha: the addition is alpha / rank * up @ down.  layers: parts of the names of the layers that get one, e.g. [attention];
    none: all.  whole: beginnings of the names of the model's parameters that are trained as they are, e.g. [conditioner].  Model folders
    have the sum in place of the parts, as has what is loaded of checkpoints.
    """

    def __init__(self, rank: int = 8, alpha: float = 8.0, layers: Sequence[str] = (), whole: Sequence[str] = ()) -> None:
        self.rank, self.alpha, self.layers, self.whole = rank, alpha, layers, whole

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, DiffusionStage):
            raise UserError("LoRA is for stage 2 (DiffusionStage)")
        model: nn.Module = pl_module.model
        model.requires_grad_(False)
        adapt(pl_module.model.denoiser.network, self.rank, self.alpha, self.layers)
        for parameter in parameters_of(model, self.whole, "LoRA's whole"):
            parameter.requires_grad_(True)
