"""`ldm train` against the hand-written commands of docs/training.md at equal time, on three sets of pictures: FD-mnv2 of 512 samples.

    python tools/compare_train.py --out runs/compare-train --hours 0.33 [--sets photos stamps icons] [--only hand auto]

photos: 270 crops of 9 photographs of scikit-image and scikit-learn, a sub-folder per photograph.  stamps, icons: the folders of Debian's
packages tuxpaint-stamps-default and oxygen-icon-theme (128x128), by path: --stamps FOLDER --icons FOLDER.
The hand-written commands have as many steps as fit into the time, in the proportion of their own configs (9 to 101 minutes), at a speed
measured before.
"""

import argparse
import csv
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHARE = 9 / 110  # of stage 1 in the hand-written commands' time
LDM = [sys.executable, "-m", "ldm"]
FIT = ["fit", "-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/folder.yaml"]
STAGES = {"autoencoder": "autoencoder/emoji.yaml", "diffusion": "diffusion/emoji.yaml"}
BATCHES = {"autoencoder": 8, "diffusion": 16}


def photos(folder: Path) -> Path:
    """270 crops of 96 px and more of nine photographs."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    names = ("astronaut", "brick", "chelsea", "coffee", "grass", "hubble_deep_field", "rocket")
    pictures = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in names}
    pictures |= {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    generator = np.random.default_rng(0)
    for name, picture in pictures.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(30):
            side = int(generator.integers(96, min(200, *picture.size)))
            left, top = (int(generator.integers(room - side + 1)) for room in picture.size)
            picture.crop((left, top, left + side, top + side)).save(folder / name / f"{i:02d}.jpg", quality=92)
    return folder


def run(arguments: list[str], log: Path) -> float:
    """Run a command of ldm; returns its seconds."""
    began = time.monotonic()
    with log.open("a") as file:
        file.write(f"$ ldm {' '.join(arguments)}\n")
        file.flush()
        subprocess.run([*LDM, *arguments], check=True, stdout=file, stderr=subprocess.STDOUT)
    return time.monotonic() - began


def speed(stage: str, data: list[str], out: Path) -> float:
    """Steps per second of a hand-written stage: the median of a minute's own figures, after which it is ended."""
    folder = out / "speed"
    limits = ["--trainer.max_time", "00:00:01:00", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=10", "--overwrite"]
    run([*FIT, "-c", STAGES[stage], *data, *limits, "--run", str(folder)], out / "speed.log")
    with (folder / stage / "logs" / "metrics.csv").open() as rows:
        rates = [float(row["time/images_per_second"]) for row in csv.DictReader(rows) if row["time/images_per_second"]]
    return statistics.median(rates[1:]) / BATCHES[stage]


def by_hand(data: list[str], hours: float, out: Path) -> dict[str, float]:
    """Both stages by the commands of docs/training.md in so many hours."""
    out.mkdir(parents=True, exist_ok=True)
    found, total = dict[str, float](), 0.0
    for stage, share in (("autoencoder", SHARE), ("diffusion", 1 - SHARE)):
        rate = speed(stage, data, out)
        steps = max(50, int(rate * share * hours * 3600))
        every = ["--trainer.val_check_interval", str(min(1000, steps))]
        total += run(
            [*FIT, "-c", STAGES[stage], *data, "--trainer.max_steps", str(steps), *every, "--run", str(out / "run")], out / "log.txt"
        )
        found[f"{stage} steps"] = steps
    return {**found, "minutes": total / 60}


def automatic(path: str, hours: float, out: Path) -> dict[str, float]:
    """The same by one command."""
    out.mkdir(parents=True, exist_ok=True)
    return {"minutes": run(["train", path, "--hours", str(hours), "--run", str(out / "run")], out / "log.txt") / 60}


def judge(run_folder: Path, path: str, out: Path) -> float:
    """FD-mnv2 of 512 samples of all classes, as the model samples by itself, to the folder's images."""
    samples = out / "samples"
    run(["sample", str(run_folder), "--n", "512", "--no-watermark", "--out", str(samples), "--overwrite"], out / "log.txt")
    done = subprocess.run(
        [*LDM, "evaluate", "--images", str(samples), "--reference", path, "--size", "64"], check=True, capture_output=True, text=True
    )
    found = re.search(r"FD-mnv2\D+([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=0.33)
    parser.add_argument("--sets", nargs="*", default=["photos", "stamps", "icons"])
    parser.add_argument("--only", nargs="*", default=["hand", "auto"])
    parser.add_argument("--stamps")
    parser.add_argument("--icons")
    chosen = parser.parse_args()
    results = json.loads((chosen.out / "results.json").read_text()) if (chosen.out / "results.json").is_file() else {}
    for name in chosen.sets:
        path = str(photos(chosen.out / "data")) if name == "photos" else getattr(chosen, name)
        for way in chosen.only:
            out = chosen.out / name / way
            data = ["--data.path", path, "--data.size", "64"]
            facts = by_hand(data, chosen.hours, out) if way == "hand" else automatic(path, chosen.hours, out)
            results[f"{name} {way}"] = {**facts, "FD-mnv2": judge(out / "run", path, out)}
            (chosen.out / "results.json").write_text(json.dumps(results, indent=1))
            print(name, way, results[f"{name} {way}"], flush=True)
