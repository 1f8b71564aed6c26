"""Augmentations of training images: any transforms of torchvision.transforms.v2, which the network may be told of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.interfaces.conditioning import AUGMENTED

if TYPE_CHECKING:
    from torchvision.transforms import v2


class Augment:
    """Transforms applied one after the other, each to a `share` of the images; maps follow their image.

    told: what was done to an image, 1 or 0 for each transform, by names that begin with AUGMENTED: a network that is told
    does not make augmented pictures (Karras et al. 2022, arXiv:2206.00364, appendix F.2).
    """

    def __init__(self, transforms: "Sequence[v2.Transform]", share: float = 1.0) -> None:
        self.transforms, self.share = list(transforms), share
        self.names = [f"{AUGMENTED}{type(transform).__name__}" for transform in self.transforms]

    def __call__(self, image: Tensor, map_: Tensor | None, draw: int) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """image (C,H,W), map uint8 (3,H,W); draw: of this image in this epoch, on which alone the result depends."""
        from torchvision import tv_tensors  # which takes a second to import

        told = dict.fromkeys(self.names, 0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw)
            for name, transform in zip(self.names, self.transforms, strict=True):
                if torch.rand(()) >= self.share:
                    continue
                before = image
                if map_ is None:
                    image = transform(tv_tensors.Image(image)).as_subclass(Tensor)
                else:
                    both = transform(tv_tensors.Image(image), tv_tensors.Mask(map_))
                    image, map_ = (each.as_subclass(Tensor) for each in both)
                told[name] = float(image.shape != before.shape or not torch.equal(image, before))
        return image, map_, told
