"""Do sampled digits show the classes asked for?  python tools/judge_digits.py FOLDER  (written by `ldm sample`)

Fits a small classifier (scikit-learn's SVM on pixels) on the real digits of the training split, prints its accuracy on the
held-out split, then reads every picture of the folder's manifest.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from ldm.data.decode import read_pixels
from ldm.data.module import Digits


def scan(pixels: np.ndarray) -> np.ndarray:
    """uint8 (3, 32, 32) -> the 8 x 8 grey values, as the original scans."""
    return np.asarray(Image.fromarray(pixels.mean(0).astype(np.uint8)).resize((8, 8), Image.Resampling.BOX), dtype=np.float32).ravel() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    splits = []
    for split in Digits().sets:
        batch = split.__getitems__(range(len(split)))
        splits.append((np.stack([scan(x.numpy()) for x in batch["image"]]), batch["label"].numpy()))
    (images, labels), (held_out_images, held_out_labels) = splits
    classifier = SVC(C=10, gamma="scale").fit(images, labels)
    accuracy = classifier.score(held_out_images, held_out_labels)
    print(f"classifier: {accuracy:.1%} of {len(held_out_labels)} held-out real digits are read right")
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    read = classifier.predict(np.stack([scan(read_pixels(folder / entry["file"]).numpy()) for entry in entries]))
    right = np.mean([str(digit) == entry["condition"]["class"] for digit, entry in zip(read, entries, strict=True)])
    print(f"samples: {right:.1%} of {len(entries)} pictures are read as the class asked for")


if __name__ == "__main__":
    main()
