"""Small models with random weights whose layers all do something, and small sets of images."""

from types import SimpleNamespace
from typing import Any

import torch
from conftest import randomise
from torch import Tensor

from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.data.images import Images
from ldm.data.module import ImageData
from ldm.data.records import Record, Records
from ldm.diffusion.schedule import LDMSchedule
from ldm.interfaces import Batch
from ldm.latents.model import LatentDiffusion
from ldm.nn.unet import UNet

COUNT = 23  # images of Noise
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


class Noise(Images):
    """Every pixel and record differs, so that a mix-up shows."""

    def __init__(self, count: int = COUNT, size: int = 8) -> None:
        self.size = size
        self.data = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self.records = Records(Record(f"n{i}", "abc"[i % 3], f"number {i}") for i in range(count))

    def pixels(self, index: int, draw: int = 0) -> Tensor:
        return self.data[index]


class NoiseData(ImageData):
    """Noise as data."""

    def images(self) -> Images:
        return Noise(size=self.size)


def fake_trainer(world: int = 1, rank: int = 0, strategy: Any = None, batches_done: int = 0) -> Any:
    """What a data module asks of a trainer."""
    alone = SimpleNamespace(
        broadcast=lambda value: value,
        barrier=lambda name: None,
        is_global_zero=rank == 0,
        global_rank=rank,
        world_size=world,
        root_device=torch.device("cpu"),
    )
    current = SimpleNamespace(ready=batches_done)
    progress = SimpleNamespace(batch_progress=SimpleNamespace(current=current))
    fit_loop = SimpleNamespace(epoch_loop=progress)
    found = {"world_size": world, "num_devices": world, "global_rank": rank, "strategy": strategy or alone, "fit_loop": fit_loop}
    return SimpleNamespace(**found, accumulate_grad_batches=1)


def epoch_of(data: ImageData, epoch: int = 0) -> list[Batch]:
    """All training batches of an epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)
