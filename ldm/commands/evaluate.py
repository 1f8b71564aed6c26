"""evaluate: distances between two sets of images."""

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.commands.options import DEVICE, Option, parse, path, whole
from ldm.commands.shorten import IMAGES, limit
from ldm.data.datasets import DigitImages, EmojiImages, FolderImages, Images
from ldm.errors import UserError
from ldm.interfaces import Features
from ldm.metrics.distances import Statistics, frechet_distance, kernel_distance
from ldm.metrics.features import MobileNetV2
from ldm.model_folder import write_atomically
from ldm.sampling.model import device_of

CARRIED = {"emoji": EmojiImages, "digits": DigitImages}


OPTIONS = [
    Option("--images", "folder of images; of a folder that `ldm sample` wrote, the pictures in its manifest", path, metavar="FOLDER"),
    Option(
        "--reference", "folder of images, `emoji`, `digits` (what the package carries), or a file that --save wrote", path, metavar="SET"
    ),
    Option("--size", "px to which images are resized and cropped, that of the model's training", whole(1), metavar="PX"),
    Option(
        "--features",
        "MobileNetV2 (the default), Lite0Features or Inception; the results are named after it",
        base=Features,
        rooms=("metrics",),
    ),
    Option("--batch-size", "images per network call; default: 64", whole(1), 64, "N"),
    Option("--save", "file (.safetensors) for the reference's statistics, to be used again", path, None, "FILE"),
    Option("--out", "file (.json) for the results", path, None, "FILE"),
    DEVICE,
]


def evaluate(
    images: str, reference: str, size: int, features: Features | None = None, batch_size: int = 64, save: str | None = None,
    out: str | None = None, device: str = "auto",
) -> int:  # fmt: skip
    """Fréchet and kernel distance (FD, KID) between the features of two sets of images; both go through the same resize and crop."""
    if save is not None and not save.endswith(".safetensors"):
        raise UserError(f"--save is {save!r}; its name must end with .safetensors")
    if save is not None:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
    place = device_of(device)
    network = (features or MobileNetV2()).to(place)
    made: dict[str, str | int] = {"features": network.name, "resize": network.resize, "size": size, "rounding": "uint8", "crop": "centre"}
    ours = measure(network, open_images(images, size), batch_size, place)
    a = Statistics.of(ours, made)
    if reference.endswith(".safetensors"):
        theirs, b = None, Statistics.load(reference)
    else:
        theirs = measure(network, open_images(reference, size), batch_size, place)
        b = Statistics.of(theirs, made)
    results = {f"FD-{network.name}": float(frechet_distance(a, b))}
    if theirs is not None:
        results[f"KID-{network.name}"] = float(kernel_distance(ours, theirs))
    if save:
        b.save(save)
    facts = {**results, "n": a.n, "n_reference": b.n, **made}
    if out:
        write_atomically(Path(out), (json.dumps(facts, indent=1) + "\n").encode())
    print("\n".join(f"{name:<12} {value:.6g}" for name, value in results.items()))
    print(f"{a.n} images of {images} against {b.n} of {reference}, {size} px")
    return 0


def open_images(source: str, size: int) -> Images:
    if source in CARRIED:
        return CARRIED[source](size)
    images = FolderImages(source, size)
    manifest = Path(source) / "manifest.jsonl"
    if manifest.is_file():  # leaves the grid out
        names = {json.loads(line)["file"] for line in manifest.read_text().splitlines()}
        images.files = [file for file in images.files if file.name in names]
    return images


def measure(network: Features, images: Images, batch_size: int, device: torch.device) -> Tensor:
    """Features (N,D) of all images."""
    count = len(images.files) if isinstance(images, FolderImages) else len(images)
    count = min(count, IMAGES) if limit() is not None else count
    found = []
    with tqdm(total=count, desc="Measuring", unit="img") as bar:
        for start in range(0, count, batch_size):
            batch = torch.stack([images.pixels(i) for i in range(start, min(start + batch_size, count))])
            found.append(network(batch.to(device)).cpu())
            bar.update(len(batch))
    return torch.cat(found)


def main(command: str, arguments: list[str]) -> int:
    values = parse(command, "Distances (FD, KID) between two sets of images.", OPTIONS, arguments)
    for name in ("images", "reference", "size"):
        if values[name] is None:
            raise UserError(f"--{name} is missing (ldm {command} --help)")
    return evaluate(**values)
