"""How often the watermark is found where it is, and where it is not.

python tools/watermark_rates.py [--marked 200] [--natural 1000]

Marked: patches of 64 and 256 px of photographs, and emoji of 64 px.  Natural: unmarked patches of 64 to 400 px.  The photographs are those
that scikit-learn carries (2) and, if it is installed, scikit-image (15 more).
"""

import argparse
import io
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

from ldm.data.datasets import EmojiImages
from ldm.data.transforms import as_image, as_rgb, as_tensor
from ldm.data.watermark import BITS, THRESHOLD, check, mark

PHOTOGRAPHS = (
    "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png "
    "moon.png motorcycle_left.png retina.jpg rocket.jpg"
)


def photographs() -> list[Tensor]:
    found = [as_tensor(Image.fromarray(pixels)) for pixels in load_sample_images().images]
    spec = find_spec("skimage")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for name in PHOTOGRAPHS.split():
            with Image.open(Path(place) / "data" / name) as image:
                found.append(as_tensor(as_rgb(image)))
    return found


def patches(photos: list[Tensor], sizes: tuple[int, int], count: int, seed: int) -> Iterator[Tensor]:
    generator = np.random.default_rng(seed)
    for number in range(count):
        photo = photos[number % len(photos)]
        size = min(int(generator.integers(sizes[0], sizes[1] + 1)), *photo.shape[1:])
        row, column = (int(generator.integers(side - size + 1)) for side in photo.shape[1:])
        yield photo[:, row : row + size, column : column + size]


def jpeg(pixels: Tensor) -> Tensor:
    data = io.BytesIO()
    as_image(pixels).save(data, "JPEG", quality=80)
    return as_tensor(Image.open(data))


def cropped(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Nine tenths of each side, anywhere."""
    height, width = (round(0.9 * side) for side in pixels.shape[1:])
    row, column = int(generator.integers(pixels.shape[1] - height + 1)), int(generator.integers(pixels.shape[2] - width + 1))
    return pixels[:, row : row + height, column : column + width]


def marked_rates(name: str, pictures: list[Tensor]) -> None:
    generator = np.random.default_rng(0)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "as made": lambda x: x,
        "JPEG q80": jpeg,
        "10 % crop": lambda x: cropped(x, generator),
        "crop + JPEG": lambda x: jpeg(cropped(x, generator)),
    }
    marked = [mark(picture) for picture in tqdm(pictures, desc=name, leave=False)]
    errors = torch.stack([(a.float() - b.float()).square().mean() for a, b in zip(pictures, marked, strict=True)])
    print(f"{name}: {len(pictures)} marked, PSNR {(10 * torch.log10(255**2 / errors)).mean():.1f} dB")
    for what, change in changes.items():
        found = [check(change(picture)) for picture in marked]
        bits, seen = sum(f.right for f in found) / len(found) / len(BITS), sum(f.marked for f in found) / len(found)
        print(f"  {what:<12} found {100 * seen:5.1f} %   bits right {100 * bits:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marked", type=int, default=200)
    parser.add_argument("--natural", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    photos, emoji = photographs(), EmojiImages()
    marked_rates("emoji of 64 px", [emoji.pixels(i * len(emoji) // args.marked) for i in range(args.marked)])
    for size in (64, 256):
        marked_rates(f"photographs, {size} px", list(patches(photos, (size, size), args.marked, size)))
    scores = [check(p).score for p in tqdm(patches(photos, (64, 400), args.natural, 1), total=args.natural, desc="natural", leave=False)]
    wrong = sum(score >= THRESHOLD for score in scores)
    print(f"natural: {wrong} of {args.natural} patches of {len(photos)} photographs taken for marked; highest score {max(scores):.2f}")


if __name__ == "__main__":
    main()
