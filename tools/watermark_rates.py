"""How often the watermark is found where it is, and where it is not; how much it changes.

python tools/watermark_rates.py [--marked 200] [--unmarked 1000]

Marked: emoji of 64 px as they are and enlarged to 256 px (Lanczos), patches of 64 and 256 px of photographs.
Each is looked at as made, after JPEG of quality 80, cropped to nine tenths of each side, cropped and then
compressed, and after ten edits.  In an edit, a rectangle of a quarter to a half of the picture is filled with
part of another picture and marked, as `ldm sample --mask` does; pixels outside it may not change.  A second
table says how often a single edit, a square in the middle, marks a picture that had no mark.
Unmarked: patches of photographs of 48 to 400 px, emoji, both also after JPEG of qualities 40 to 95, and drawn
pictures of what could be taken for the mark.  The photographs are those that scikit-learn carries (2) and, if
it is installed, scikit-image (15 more).
"""

import argparse
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

from ldm.data.images import EmojiImages
from ldm.data.modes import as_rgb, as_tensor
from ldm.data.transforms import as_image
from ldm.sampling.watermark import BITS, MIN_RIGHT, PERIOD, Found, check, mark

PHOTOGRAPHS = (
    "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
)
EDITS = 10
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of a picture that is made anew
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "0123456789"]


def photographs() -> list[Tensor]:
    """Photographs, uint8 (3,H,W), of the packages that are installed."""
    photos = [as_tensor(Image.fromarray(pixels)) for pixels in load_sample_images().images]
    spec = find_spec("skimage")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for name in PHOTOGRAPHS.split():
            with Image.open(Path(place) / "data" / name) as image:
                photos.append(as_tensor(as_rgb(image)))
    return photos


def patches(photos: list[Tensor], sizes: tuple[int, int], count: int, seed: int) -> Iterator[Tensor]:
    """Squares of random sides and places, of one photograph after the other."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        photo = photos[number % len(photos)]
        size = min(int(generator.integers(sizes[0], sizes[1] + 1)), *photo.shape[1:])
        row, column = (int(generator.integers(side - size + 1)) for side in photo.shape[1:])
        yield photo[:, row : row + size, column : column + size]


def jpeg(pixels: Tensor, quality: int = 80) -> Tensor:
    """The picture after JPEG."""
    data = io.BytesIO()
    as_image(pixels).save(data, "JPEG", quality=quality)
    return as_tensor(Image.open(data))


def cropped(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Nine tenths of each side, anywhere."""
    height, width = (round(0.9 * side) for side in pixels.shape[1:])
    row, column = (int(generator.integers(full - part + 1)) for full, part in zip(pixels.shape[1:], (height, width), strict=True))
    return pixels[:, row : row + height, column : column + width]


def edited(pixels: Tensor, others: list[Tensor], generator: np.random.Generator) -> Tensor:
    """A marked picture after ten edits, each of which is marked; stops if a pixel that was kept changed."""
    for _ in range(EDITS):
        height, width = pixels.shape[1:]
        area = generator.uniform(0.25, 0.5)
        ratio = generator.uniform(area, 1)
        rows, columns = round(ratio * height), round(area / ratio * width)
        row, column = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
        where = torch.zeros(height, width, dtype=torch.bool)
        where[row : row + rows, column : column + columns] = True
        new = others[int(generator.integers(len(others)))].roll((row, column), (1, 2))
        result = mark(torch.where(where, new, pixels), where)
        assert torch.equal(result[:, ~where], pixels[:, ~where]), "kept pixels changed"
        pixels = result
    return pixels


def flat_white(pixels: Tensor) -> Tensor:
    """Where (H,W) the 7x7 px around a pixel are pure white."""
    dark = (pixels.amin(0, keepdim=True) < 255).float()
    return torch.nn.functional.max_pool2d(dark, 7, 1, 3)[0] == 0


def marked_rates(name: str, pictures: list[Tensor]) -> None:
    """Print a row of the table of pictures that are marked."""
    generator = np.random.default_rng(0)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        jpeg,
        lambda x: cropped(x, generator),
        lambda x: jpeg(cropped(x, generator)),
        lambda x: edited(x, pictures, generator),
    ]
    marked = [mark(picture) for picture in tqdm(pictures, desc=name, leave=False)]
    differences = [(after.int() - before.int()).abs() for before, after in zip(pictures, marked, strict=True)]
    errors = torch.stack([difference.float().square().mean() for difference in differences if difference.any()])
    psnr = 10 * torch.log10(255**2 / errors)
    whites = [difference[:, flat_white(picture)] for picture, difference in zip(pictures, differences, strict=True)]
    white = [int(values.max()) for values in whites if values.numel()]
    cells = [f"{psnr.mean():.1f} (least {psnr.min():.1f})", str(max(white)) if white else "none there"]
    for change in changes:
        results = [check(change(picture)) for picture in marked]
        right = sum(result.right for result in results) / len(results) / len(BITS)
        share = sum(result.marked for result in results) / len(results)
        cells.append(f"{100 * share:.1f} / {100 * right:.1f}")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def edit_rates(name: str, pictures: list[Tensor]) -> None:
    """Print a row of the table of unmarked pictures of which the middle alone is marked."""
    cells = []
    for share in SHARES:
        marked = 0
        for pixels in pictures:
            side = pixels.shape[1]
            part = round(side * math.sqrt(share))
            first, where = (side - part) // 2, torch.zeros(side, side, dtype=torch.bool)
            where[first : first + part, first : first + part] = True
            marked += check(mark(pixels, where)).marked
        cells.append(f"{100 * marked / len(pictures):.1f}")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def grey(values: NDArray[np.floating[Any]]) -> Tensor:
    """uint8 (3,H,W) of levels (H,W)."""
    return torch.from_numpy(np.clip(np.round(values), 0, 255).astype(np.uint8)).expand(3, -1, -1).contiguous()


def periodic(random: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
    """Drawn pictures (kind, uint8 (3,H,W)) that are flat or repeat themselves."""
    y, x = np.mgrid[:128, :128].astype(float)
    for level in range(0, 256, 15):
        yield "flat", grey(np.full((64 + level % 97, 64 + level % 57), float(level)))
        colour = torch.from_numpy(random.integers(0, 256, 3).astype(np.uint8))
        yield "flat", colour[:, None, None].expand(3, 96, 128).contiguous()
    for period in (32, 16, 32 / 3, 8, 32 / 5, 32 / 6, 4, 5, 7, 9, 10, 12):
        for angle in np.pi / 12 * np.arange(12):
            phase = 2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 6)
            yield "grating", grey(128 + 2 * np.cos(phase))
            yield "grating", grey(128 + 60 * np.cos(phase))
            yield "stripes", grey(128 + 60 * np.sign(np.cos(phase)))
    for period in (4, 6, 8, 10, 12, 16):
        for angle in np.deg2rad((0, 15, 45, 75)):
            along = np.cos(2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)))
            across = np.cos(2 * np.pi / period * (y * np.cos(angle) - x * np.sin(angle)))
            for tone in (x * 2, np.full_like(x, 90), 128 + 60 * np.sin(x / 20) * np.cos(y / 17)):
                yield "halftone", grey(255.0 * ((along + across) / 4 + 0.5 > tone / 255))
    for side in range(3, 33):
        yield "checkers", grey(100 + 100 * ((x // side + y // side) % 2))
        yield "squared paper", grey(255.0 - 200 * ((x % side == 0) | (y % side == 0)))
    for _ in range(200):
        tile = random.normal(0, random.choice([1, 5, 20]), (PERIOD, PERIOD))
        yield "tiles of 32 px", grey(128 + np.tile(tile, (4, 4)))
        yield "tiles of two levels", grey(255.0 - np.tile(tile > 0, (4, 4)))


def irregular(random: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
    """Drawn pictures (kind, uint8 (3,H,W)): noise, gradients, text, and cosines in blocks as the mark has."""
    y, x = np.mgrid[:128, :128].astype(float)
    for _ in range(100):
        noise = random.normal(0, random.choice([0.4, 3, 40]), random.integers(8, 129, 2))
        yield "noise", grey(random.choice([0, 128, 255]) + noise)
        slope, turn = random.uniform(0.05, 1.5), random.uniform(0, 2 * np.pi)
        yield "gradient", grey(128 + slope * ((x - 64) * np.cos(turn) + (y - 64) * np.sin(turn)))
        page = Image.new("RGB", (int(random.integers(64, 300)), int(random.integers(64, 300))), "white")
        for line in range(2, page.height, int(random.integers(9, 17))):
            ImageDraw.Draw(page).text((2, line), " ".join(random.choice(WORDS, 12)), fill="black")
        yield "text", as_tensor(page)
    for number in range(600):
        blocks = np.zeros((4, 8, 4, 8))
        chosen = list(np.ndindex(4, 4)) if number % 2 else random.integers(0, 4, (1 + number % 8, 2))
        for row, column in chosen:
            v, u = (np.cos(np.pi / 8 * index * (np.arange(8) + 0.5)) for index in random.integers(0, 4, 2))
            blocks[row, :, column] = random.choice([-1, 1]) * v[:, None] * u
        cell = blocks.reshape(PERIOD, PERIOD)
        if number % 2:
            yield "a cosine in each block", grey(255.0 - np.tile(cell < 0, (4, 4)))
        else:
            yield "cosines in few blocks", grey(np.pad(200 + 3 * cell, 32, constant_values=200))


def unmarked(photos: list[Tensor], emoji: list[Tensor], count: int) -> Iterator[tuple[str, Tensor]]:
    """All unmarked pictures, each also after JPEG."""
    random = np.random.default_rng(0)
    natural = (("photographs", patch) for patch in patches(photos, (48, 400), count, 1))
    for kind, pixels in (
        *natural,
        *(("emoji", pixels) for pixels in emoji),
        *periodic(random),
        *irregular(random),
    ):
        yield kind, pixels
        yield f"{kind}, JPEG", jpeg(pixels, int(random.integers(40, 96)))


def unmarked_rates(pictures: Iterator[tuple[str, Tensor]]) -> None:
    """Print how many unmarked pictures are taken for marked, and each kind's highest score."""
    kinds: dict[str, list[Found]] = {}
    for kind, pixels in tqdm(pictures, desc="unmarked", leave=False):
        kinds.setdefault(kind, []).append(check(pixels))
    results = [result for some in kinds.values() for result in some]
    wrong = sum(result.marked for result in results)
    bits = max(result.score for result in results if result.right >= MIN_RIGHT)
    print(f"\nunmarked: {wrong} of {len(results)} taken for marked; highest score", end=" ")
    print(f"{max(results).score:.3f}, of those with {MIN_RIGHT} bits right {bits:.3f}")
    print("; ".join(f"{kind} ({len(some)}) {max(some).score:.2f}" for kind, some in kinds.items()))


def times(photo: Tensor) -> None:
    """Print how long it takes, the median of ten runs."""
    for side in (64, 256, 512):
        pixels = as_tensor(as_image(photo).resize((side, side)))
        for name, function in (("check", check), ("mark", mark)):
            seconds = []
            for _ in range(10):
                start = time.perf_counter()
                function(pixels)
                seconds.append(time.perf_counter() - start)
            print(f"{name}, {side} px: {1e3 * float(np.median(seconds)):.1f} ms")


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marked", type=int, default=200)
    parser.add_argument("--unmarked", type=int, default=1000, help="patches of photographs, and emoji")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    photos, emoji, large = photographs(), EmojiImages(), EmojiImages(256)
    chosen = [math.floor(i * len(emoji) / args.marked) for i in range(args.marked)]
    print(f"{args.marked} pictures a row, {len(photos)} photographs; found / bits right, %")
    print("| | PSNR, dB | flat white | as made | JPEG q80 | 10 % cropped | crop + JPEG | ten edits |")
    print("|---|---|---|---|---|---|---|---|")
    sets = {
        "emoji, 64 px": [emoji.pixels(index) for index in chosen],
        "photographs, 64 px": list(patches(photos, (64, 64), args.marked, 64)),
        "emoji, 256 px": [large.pixels(index) for index in chosen],
        "photographs, 256 px": list(patches(photos, (256, 256), args.marked, 256)),
    }
    for name, pictures in sets.items():
        marked_rates(name, pictures)
    print("\n| found, % | " + " | ".join(f"{share:.1%} anew" for share in SHARES) + " |")
    print("|---" * (1 + len(SHARES)) + "|")
    for name, pictures in sets.items():
        edit_rates(name, pictures)
    others = np.random.default_rng(2).permutation(len(emoji))[: args.unmarked]
    unmarked_rates(unmarked(photos, [emoji.pixels(int(index)) for index in others], args.unmarked))
    times(photos[0])


if __name__ == "__main__":
    main()
