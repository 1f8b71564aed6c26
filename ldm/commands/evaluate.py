"""evaluate: distances between two sets of images."""

import json
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

import ldm.metrics.features  # makes short class names known
from ldm.commands.configs import PARSER, plain_errors
from ldm.data.datasets import DigitImages, EmojiImages, FolderImages, Images
from ldm.interfaces import Features
from ldm.metrics.distances import Statistics, frechet_distance, kernel_distance
from ldm.model_folder import write_atomically

CARRIED = {"emoji": EmojiImages, "digits": DigitImages}


def evaluate(
    images: str,
    reference: str,
    size: int,
    features: Features | None = None,
    batch_size: int = 64,
    save: str | None = None,
    out: str | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> int:
    """Fréchet and kernel distance (FD, KID) between the features of two sets of images; both go through the same resize and crop.

    Args:
        images: folder of images; of a folder that `ldm predict` wrote, the pictures in its manifest
        reference: folder of images, `emoji`, `digits` (what the package carries), or a file that --save wrote
        size: px to which images are resized and cropped, that of the model's training
        features: MobileNetV2, Lite0Features or Inception; default: MobileNetV2.  The results are named after it
        batch_size: images per network call
        save: file (.safetensors) for the reference's statistics, to be used again
        out: file (.json) for the results
        device: of the network
    """
    network = (features or ldm.metrics.features.MobileNetV2()).to(device)
    made: dict[str, str | int] = {"features": network.name, "resize": network.resize, "size": size, "rounding": "uint8", "crop": "centre"}
    ours = measure(network, open_images(images, size), batch_size, device)
    a = Statistics.of(ours, made)
    if reference.endswith(".safetensors"):
        theirs, b = None, Statistics.load(reference)
    else:
        theirs = measure(network, open_images(reference, size), batch_size, device)
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


def measure(network: Features, images: Images, batch_size: int, device: str) -> Tensor:
    """Features (N,D) of all images."""
    count = len(images.files) if isinstance(images, FolderImages) else len(images)
    found = []
    with tqdm(total=count, desc="Measuring", unit="img") as bar:
        for start in range(0, count, batch_size):
            batch = torch.stack([images.pixels(i) for i in range(start, min(start + batch_size, count))])
            found.append(network(batch.to(device)).cpu())
            bar.update(len(batch))
    return torch.cat(found)


def main(command: str, arguments: list[str]) -> int:
    parser = ArgumentParser(prog=f"ldm {command}", description="Distances between two sets of images.", **PARSER)
    parser.add_function_arguments(evaluate)
    with plain_errors():
        return evaluate(**vars(parser.instantiate_classes(parser.parse_args(arguments))))
