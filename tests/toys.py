"""Small models with random weights whose layers all do something."""

from typing import Any

import torch
from conftest import randomise

from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.diffusion.schedule import LDMSchedule
from ldm.latents.model import LatentDiffusion
from ldm.nn.unet import UNet

CLASSES = ["animal/cat", "animal/dog", "food/hot dog"]


def autoencoder(seed: int = 0, **options: Any) -> ConvAutoencoder:
    torch.manual_seed(seed)
    return ConvAutoencoder(**{"bottleneck": KL(2), "channels": 8, "multipliers": (1, 2), "num_blocks": 1, **options})


def latent_diffusion(seed: int = 0, conditional: bool = True) -> LatentDiffusion:
    """A measured model whose layers all do something."""
    torch.manual_seed(seed)
    network = UNet(2, 16, (1, 2), 1, (1,), head_channels=8, vector_dim=6 if conditional else 0)
    conditioner = ClassLabel(3, 6) if conditional else Unconditional()
    model = LatentDiffusion(autoencoder(seed), network, conditioner, LDMSchedule(50), "v")
    randomise(model, seed, 0.05)
    model.latents.measure(torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0]), 7, (8, 8))
    return model.eval()
