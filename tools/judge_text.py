"""Do pictures of the text-to-image model show what the words say?  python tools/judge_text.py MODEL [--num 288] [--out runs/judge-text]

Asks for emoji by name, evenly chosen of those that the model was trained on and all of those that it was not, and reads each picture by the
five nearest real emoji in MobileNetV2's features.  Chance: the same pictures with the prompts shuffled.  Colours are read as the hue of
what is not grey.  Writes pictures.png (a row per prompt of ROWS) and results.json.
"""

import argparse
import colorsys
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import model_folder
from ldm.data.images import EmojiImages
from ldm.data.module import Emoji
from ldm.data.transforms import as_image, grid
from ldm.metrics.features import MobileNetV2, measured
from ldm.ranges import to_uint8
from ldm.sampling.pipeline import CHUNK_SIZE, generate
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise

ROWS = {"red heart": ["heart"], "dog face": ["animal-mammal"], "flag": ["flag", "country-flag"], "clock": ["time"]}
HUES = {"red": 0, "orange": 28, "yellow": 48, "green": 110, "blue": 210, "purple": 280}  # degrees
THINGS = ("heart", "book", "circle", "square", "flower", "apple")
COLUMNS, NEIGHBOURS = 10, 5


class Reader:
    """The sub-category of a picture: the most frequent one of the nearest real emoji."""

    def __init__(self) -> None:
        self.network, self.images = MobileNetV2(), EmojiImages()
        self.features = F.normalize(measured(self.network, self.images, 64, torch.device("cpu"))[0].float(), dim=1)
        self.labels = [str(record.label) for record in self.images.records]

    def __call__(self, pictures: Tensor, without: Sequence[int] = ()) -> list[str]:
        """pictures uint8 (N,3,H,W); without: for each, an emoji that does not count."""
        features = torch.cat([self.network(part) for part in pictures.split(64)]).float()
        near = F.normalize(features, dim=1) @ self.features.T
        for row, index in enumerate(without):
            near[row, index] = -1
        return [Counter(self.labels[i] for i in row).most_common(1)[0][0] for row in near.topk(NEIGHBOURS).indices.tolist()]


def hue(picture: Tensor) -> str:
    """The colour name nearest to the mean of what is coloured in a picture uint8 (3,H,W)."""
    pixels = picture.flatten(1).T.float() / 255
    coloured = pixels[(pixels.amax(1) - pixels.amin(1)) > 0.3]
    if not len(coloured):
        return "none"
    h, _, _ = colorsys.rgb_to_hsv(*coloured.mean(0).tolist())
    return min(HUES, key=lambda name: min(abs(360 * h - HUES[name]), 360 - abs(360 * h - HUES[name])))


def made(loaded: model_folder.Loaded, prompts: Sequence[str]) -> Tensor:
    requests = [SampleRequest(i, SeedNoise(0, i), {"text": prompt}) for i, prompt in enumerate(prompts)]
    return to_uint8(generate(loaded.model, requests, SamplingConfig.of(loaded.card), (), 4 * CHUNK_SIZE))


def against_chance(read: Sequence[str], asked: Sequence[str]) -> dict[str, float]:
    """Share of right readings, and its mean over 200 shuffled orders of what was asked."""
    right = sum(a == b for a, b in zip(read, asked, strict=True)) / len(read)
    shuffler, order, total = random.Random(0), list(asked), 0
    for _ in range(200):
        shuffler.shuffle(order)
        total += sum(a == b for a, b in zip(read, order, strict=True))
    return {"right": right, "chance": total / 200 / len(read)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num", type=int, default=192, help="names of the training; there are 96 others")
    parser.add_argument("--out", type=Path, default=Path("runs/judge-text"))
    args = parser.parse_args()
    loaded, reader, results = model_folder.load(args.model), Reader(), {}
    sets = dict(zip(("trained names", "new names"), Emoji(val_fraction=0.05).sets, strict=True))
    count = len(sets["trained names"])
    chosen = {name: part.indices for name, part in sets.items()}
    chosen["trained names"] = [chosen["trained names"][i * count // args.num] for i in range(args.num)]
    for name, indices in chosen.items():
        records = [reader.images.records[i] for i in indices]
        asked = [str(record.label) for record in records]
        own = reader(torch.stack([reader.images.pixels(i) for i in indices]), indices)
        read = reader(made(loaded, [record.text for record in records]))
        results[f"{name}, sub-category"] = {**against_chance(read, asked), "real emoji": against_chance(own, asked)["right"]}
        short = [[label.split("/")[0] for label in labels] for labels in (read, asked, own)]
        results[f"{name}, category"] = {**against_chance(*short[:2]), "real emoji": against_chance(short[2], short[1])["right"]}
    coloured = [(colour, thing) for thing in THINGS for colour in HUES]
    read = [hue(picture) for picture in made(loaded, [f"{colour} {thing}" for colour, thing in coloured])]
    results["colour"] = against_chance(read, [colour for colour, _ in coloured])
    pictures = made(loaded, [prompt for prompt in ROWS for _ in range(COLUMNS)])
    read = [label.split("/")[1] for label in reader(pictures)]
    asked = [prompt for prompt in ROWS for _ in range(COLUMNS)]
    named = [next((prompt for prompt, labels in ROWS.items() if label in labels), "other") for label in read]
    results[", ".join(ROWS)] = against_chance(named, asked)
    args.out.mkdir(parents=True, exist_ok=True)
    as_image(grid(pictures, COLUMNS)).save(args.out / "pictures.png")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print("| | right | chance | real emoji |\n|---|---|---|---|")
    for name, row in results.items():
        print(
            f"| {name} | " + " | ".join(f"{100 * row[key]:.0f} %" if key in row else "" for key in ("right", "chance", "real emoji")) + " |"
        )


if __name__ == "__main__":
    main()
