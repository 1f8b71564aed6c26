"""How close reconstructions come to their images, over all ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.interfaces import AutoencoderLoss, Features, ReconstructionMetric
from ldm.metrics.distances import Statistics, frechet_distance, kernel_distance
from ldm.ranges import to_uint8


class FeatureDistance(Metric, ReconstructionMetric):
    """rFD and rKID of the reconstructions' features against the images' own; use another network than the loss does."""

    images: list[Tensor]
    reconstructions: list[Tensor]

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.add_state("images", [], dist_reduce_fx="cat")
        self.add_state("reconstructions", [], dist_reduce_fx="cat")

    @property
    def made(self) -> dict[str, str | int]:
        return {"features": self.features.name, "resize": self.features.resize, "rounding": "uint8"}

    def update(self, reconstruction: Tensor, x: Tensor) -> None:
        for held, pixels in ((self.images, x), (self.reconstructions, reconstruction)):
            held.append(self.features(to_uint8(pixels)))

    def compute(self) -> dict[str, Tensor]:
        a, b = dim_zero_cat(self.images), dim_zero_cat(self.reconstructions)
        distance = frechet_distance(Statistics.of(a), Statistics.of(b))
        return {f"rFD-{self.features.name}": distance.float(), f"rKID-{self.features.name}": kernel_distance(a, b).float()}


class Perceptual(Metric, ReconstructionMetric):
    """The mean of a perceptual distance, such as LPIPS."""

    total: Tensor
    count: Tensor

    def __init__(self, distance: AutoencoderLoss) -> None:
        super().__init__()
        self.distance = distance
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            self.total += self.distance(x, reconstruction).sum()
        self.count += len(x)

    def compute(self) -> dict[str, Tensor]:
        return {self.distance.name: (self.total / self.count).float()}
