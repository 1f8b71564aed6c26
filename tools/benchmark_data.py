"""What reading data costs: JPEGs per core, opening a large set, a batch of a large set.

    python tools/benchmark_data.py [--records 1000000] [--out data.json]

CPU time of one thread, several rounds of pairs in one run; ratios are medians over the rounds.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from ldm.data.batches import Keyed
from ldm.data.images import EmojiImages, Images
from ldm.data.open import open_source
from ldm.data.order import Key, Order
from ldm.data.pixels import PixelRule
from ldm.data.records import Record, Records
from ldm.data.transforms import as_image

ROUNDS = 5


def cpu(work: Callable[[], object]) -> float:
    """Seconds of CPU that a piece of work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def photographs() -> list[bytes]:
    """JPEGs of 512 x 512 px: scikit-image's photographs, and emoji where it is not installed."""
    try:
        from skimage import data

        images = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "coffee", "chelsea", "rocket")]
    except ImportError:
        images = [as_image(EmojiImages().pixels(i)) for i in range(40, 44)]
    found = []
    for image in images:
        side = min(image.size)
        for quality in (80, 95):
            data_ = io.BytesIO()
            image.crop((0, 0, side, side)).resize((512, 512), Image.Resampling.LANCZOS).save(data_, "JPEG", quality=quality)
            found.append(data_.getvalue())
    return found


def plain(content: bytes, resize: Image.Resampling) -> np.ndarray:
    """What Pillow's plain pipeline makes of a JPEG."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((256, 256), resize))


def decoding() -> dict[str, float]:
    """512 -> 256 px: how many times as fast as Pillow's plain pipeline, and how much the pixels differ, of 255."""
    jpegs, rule = photographs(), PixelRule()
    ratios = dict[str, list[float]]()
    for _ in range(ROUNDS):
        ours = cpu(lambda: [rule.pixels(content, "x.jpg", (256, 256)) for content in jpegs for _ in range(5)])
        for name, resize in (("bicubic", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS), ("box", Image.Resampling.BOX)):
            theirs = cpu(lambda resize=resize: [plain(content, resize) for content in jpegs for _ in range(5)])  # type: ignore[misc]
            ratios.setdefault(name, []).append(theirs / ours)
    made = [rule.pixels(content, "x.jpg", (256, 256)).permute(1, 2, 0).numpy().astype(float) for content in jpegs]
    differences = {
        f"mean difference from {name}": float(np.mean([np.abs(x - plain(j, resize)).mean() for x, j in zip(made, jpegs, strict=True)]))
        for name, resize in (("box", Image.Resampling.BOX), ("bicubic", Image.Resampling.BICUBIC))
    }
    results = {f"times as fast as {name}": round(median(values), 2) for name, values in ratios.items()}
    return {**results, **{name: round(value, 2) for name, value in differences.items()}}


class Noise(Images):
    """Images of 8 x 8 px that cost nothing."""

    def __init__(self, count: int) -> None:
        self.size = 8
        self.records = Records(
            Record(f"class{i % 1000:04d}/picture-{i:08d}.jpg", f"class{i % 1000:04d}", f"picture {i}") for i in range(count)
        )
        self.image = torch.zeros(3, 8, 8, dtype=torch.uint8)

    def pixels(self, index: int, draw: int = 0) -> torch.Tensor:
        return self.image


def opening(count: int) -> dict[str, float]:
    """A list of so many files in 1,000 classes with captions, as a Parquet table would have them: seconds, and bytes each."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    images = Noise(count)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    train, _ = images.split(0.01, 0)
    split = time.perf_counter() - start
    start = time.perf_counter()
    next(iter(Order(len(train), 1, 0, 64, True, 0, lambda: 0)))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {
        "records": count, "seconds": round(seconds, 2), "seconds of the split": round(split, 2),
        "seconds of an epoch's order": round(time.perf_counter() - start, 2),
        "bytes each": round(images.records.nbytes / count, 1), "peak bytes each": round(grown / count, 1),
    }  # fmt: skip


def parquet(count: int) -> dict[str, float]:
    """A Parquet file of so many rows whose pictures are a few bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        path, part = Path(folder) / "x.parquet", 100_000
        schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64(), "text": pa.string()})
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(0, count, part):
                numbers = range(first, min(first + part, count))
                rows = {
                    "image": [{"bytes": b"x", "path": ""} for _ in numbers],
                    "label": [i % 1000 for i in numbers],
                    "text": [f"picture {i}" for i in numbers],
                }
                writer.write_table(pa.table(rows, schema=schema))
        start = time.perf_counter()
        records = open_source(str(path)).records
        return {"rows": len(records), "seconds": round(time.perf_counter() - start, 2), "bytes each": round(records.nbytes / count, 1)}


def batches(counts: tuple[int, int], size: int = 64) -> dict[str, float]:
    """CPU of a batch of images that cost nothing, of a small and of a large set; the ratio is the median of pairs."""
    sets = [Keyed(Noise(count), np.arange(count)) for count in counts]
    keys = [list(_keys(count, size)) for count in counts]
    times: list[list[float]] = [[], []]
    for _ in range(2 * ROUNDS + 1):
        for number, (images, wanted) in enumerate(zip(sets, keys, strict=True)):
            times[number].append(cpu(lambda images=images, wanted=wanted: [images.__getitems__(some) for some in wanted]) / len(wanted))  # type: ignore[misc]
    ratio = median(large / small for small, large in zip(*times, strict=True))
    return {**{f"ms at {count:,}": round(1000 * median(t), 3) for count, t in zip(counts, times, strict=True)}, "ratio": round(ratio, 2)}


def _keys(count: int, size: int) -> Iterator[list[Key]]:
    generator = np.random.default_rng(0)
    for _ in range(50):
        yield [Key(int(i)) for i in generator.integers(0, count, size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {"decoding": decoding(), "batches of 64": batches((10_000, arguments.records))}
    results |= {"opening": opening(arguments.records), "parquet": parquet(arguments.records)}
    print(json.dumps(results, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
