"""evaluate: distances between two sets of images."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ldm.console.options import DEVICE, Option, parse, path, square, warn, whole
from ldm.console.shorten import IMAGES, limit
from ldm.data.images import Images, open_images
from ldm.data.report import told
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.interfaces import Features
from ldm.metrics.distances import Statistics, frechet_distance, kernel_distance
from ldm.metrics.features import MobileNetV2, measured
from ldm.sampling.model import device_of

OPTIONS = [
    Option("--images", "folder of images, or one that `ldm sample` wrote", path, None, "FOLDER", required=True),
    Option("--reference", "folder of images, `emoji`, `digits`, or a file that --save wrote", path, None, "SET", required=True),
    Option("--size", "px to which images are resized and cropped, that of the model's training", square, None, "PX", required=True),
    Option("--features", "MobileNetV2 (default), Lite0Features, Inception; names the results", base=Features, rooms=("metrics",)),
    Option("--batch-size", "images per network call; default: 64", whole(1), 64, "N"),
    Option("--save", "file (.safetensors) for the reference's statistics, to be used again", path, None, "FILE"),
    Option("--out", "file (.json) for the results", path, None, "FILE"),
    DEVICE,
]  # fmt: skip


def evaluate(
    images: str, reference: str, size: int, features: Features | None = None, batch_size: int = 64, save: str | None = None,
    out: str | None = None, device: str = "auto",
) -> int:  # fmt: skip
    """Fréchet and kernel distance (FD, KID) between the features of two sets of images; both go through the same resize and crop."""
    if save is not None and not save.endswith(".safetensors"):
        raise UserError(f"--save is {save!r}; its name must end with .safetensors")
    for target in (save, out):
        Path(target or ".").parent.mkdir(parents=True, exist_ok=True)
    place = device_of(device)
    network = (features or MobileNetV2()).to(place)
    made: dict[str, str | int] = {"features": network.name, "resize": network.resize, "size": size, "rounding": "uint8", "crop": "centre"}
    stored = Statistics.load(reference) if Path(reference).is_file() else None
    ours = features_of(network, open_images(images, size), batch_size, place)
    a = Statistics.of(ours, made)
    theirs = None if stored is not None else features_of(network, open_images(reference, size), batch_size, place)
    b = stored or Statistics.of(theirs, made)  # type: ignore[arg-type]
    results = {f"FD-{network.name}": float(frechet_distance(a, b))}
    if theirs is not None:
        results[f"KID-{network.name}"] = float(kernel_distance(ours, theirs))
        if shared := len({row.tobytes() for row in ours.numpy()} & {row.tobytes() for row in theirs.numpy()}):
            warn(f"both sets have {shared} images in common, which lowers their distance")
    if save:
        b.save(save)
    facts = {**results, "n": a.n, "n_reference": b.n, **made}
    if out:
        write_atomically(Path(out), (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())
    print("\n".join(f"{name:<12} {value:.6g}" for name, value in results.items()))
    print(f"{a.n} images of {images} against {b.n} of {reference}, {size} px")
    return 0


def features_of(network: Features, images: Images, batch_size: int, device: torch.device) -> Tensor:
    """Features (N,D) of the images that can be read; says which were left out."""
    for sentence in told(images):
        warn(sentence)
    features, damaged = measured(network, images, batch_size, device, IMAGES if limit() is not None else None)
    for name in damaged[:10]:
        warn(f"left out an image that cannot be read: {name}")
    if len(damaged) > 10:
        warn(f"{len(damaged)} images were left out")
    return features


def main(command: str, arguments: list[str]) -> int:
    return evaluate(**parse(command, "Distances (FD, KID) between two sets of images.", OPTIONS, arguments))
