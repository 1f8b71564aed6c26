"""What the latent cache costs and saves: opening and batches at 10^4, 10^6, 10^7 images; an epoch from it against encoding anew; the
rate of encoding against the encoder's own.  Ratios; run it alone.

    python tools/benchmark_cache.py --out FOLDER [--images 48]
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from ldm import model_folder
from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.cli import main
from ldm.data.cache import CARD, LatentCache, folder_of
from ldm.stages.diffusion import DiffusionStage

SIZES = (10**4, 10**6, 10**7)
SHAPE = (8, 4, 4)
BATCH, SIDE = 32, 256
FIT = ["-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/folder.yaml", "-c", "diffusion/unet-f8.yaml"]
QUIET = ["--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"]


def seconds(work: Callable[[], object], times: int) -> float:
    """The median of some runs."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found)


def synthetic(root: Path, rows: int) -> str:
    """A cache of zeros, sparse on the disk; returns its key."""
    key = f"{rows:064d}"[::-1]
    folder = folder_of(root, key)
    folder.mkdir(parents=True)
    shape = (rows, 2, *SHAPE)
    with (folder / "moments.npy").open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.float16)) | {"shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)) * 2)
    (folder / CARD).write_text(json.dumps({"key": key, "rows": rows, "arrays": {"moments": list(shape)}, "damaged": [1, 5], "digest": ""}))
    return key


def access(root: Path) -> None:
    generator = np.random.default_rng(0)
    for rows in SIZES:
        key = synthetic(root, rows)
        opening = seconds(lambda key=key: LatentCache(root, key).open(), 20)
        cache = LatentCache(root, key)
        cache.open()
        batch = seconds(lambda cache=cache, rows=rows: cache[[0] * BATCH, generator.integers(rows, size=BATCH).tolist()], 200)
        print(f"{rows:>10,} images: opening {opening * 1e3:.2f} ms, a batch of {BATCH} {batch * 1e6:.0f} us", flush=True)
    shutil.rmtree(root)


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE + 64, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=92)
    return folder


def fit(command: str, run: Path, *options: str) -> float:
    began = time.perf_counter()
    if main([command, *FIT, *QUIET, "--model.network.channels=32", "--data.batch_size=4", "--run", str(run), *options]):
        raise SystemExit("the command failed")
    return time.perf_counter() - began


def training(out: Path, images: int) -> None:
    """LDM's f = 8 autoencoder with random weights, of 64 channels instead of 128, at 256 px."""
    autoencoder = ConvAutoencoder(KL(4, 1e-6), 64, (1, 2, 4, 4), 2).eval()
    run = out / "run"
    model_folder.save(autoencoder, run / "autoencoder" / "model", {"classes": [], "size": SIDE})
    data = ["--data.path", str(pictures(out / "pictures", images)), f"--data.size={SIDE}", "--data.num_workers=1"]
    x = torch.randn(4, 3, SIDE, SIDE)
    with torch.no_grad():
        own = 4 / (seconds(lambda: autoencoder.moments(x), 3) + seconds(lambda: autoencoder.moments(x.flip(-1)), 3))
    began = time.perf_counter()
    fit("encode", run, *data)
    first = time.perf_counter() - began
    again = fit("encode", run, *data)  # finds all there: what starting costs
    rate = (images - max(1, images // 10)) / (first - again)
    print(f"encoding: {rate:.2f} img/s, the encoder alone {own:.2f}: {rate / own:.2f}", flush=True)
    epochs, ends = {}, list[float]()
    DiffusionStage.on_train_batch_end = lambda self, *_: ends.append(time.perf_counter())  # type: ignore[method-assign]
    for name, options in {"cached": [], "anew": ["--data.cache=null"]}.items():
        ends.clear()
        fit("fit", run, *data, *options, "--trainer.max_steps=8", "--trainer.val_check_interval=8")
        epochs[name] = median(after - before for before, after in pairwise(ends))
    print(f"a step from the cache {epochs['cached']:.2f} s, with encoding {epochs['anew']:.2f} s: {epochs['anew'] / epochs['cached']:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=48)
    chosen = parser.parse_args()
    shutil.rmtree(chosen.out, ignore_errors=True)
    access(chosen.out / "synthetic")
    training(chosen.out, chosen.images)
