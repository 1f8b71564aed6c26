"""Ways to outpaint, compared by eye and by their seams: tools/outpaint.png, a row each, and the step in brightness at the seam relative to
the steps 10 px around it (1: no seam).  Six emoji, 32 px on the left and on the right, no class; about 2 minutes on a core.

    python tools/compare_outpaint.py [--out tools/outpaint.png]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.images import EmojiImages
from ldm.data.transforms import as_image, grid
from ldm.diffusion.samplers import RePaint
from ldm.interfaces import Sampler
from ldm.ranges import to_float, to_uint8
from ldm.sampling.model import load
from ldm.sampling.pipeline import generate
from ldm.sampling.request import InputImage, SampleRequest, SamplingConfig, SeedNoise
from ldm.sampling.tasks import Outpaint

SHOWN, ADDED = (40, 300, 700, 900, 1100, 1500), 32  # emoji, px
# name -> strength, sampler (None: the model's), whether larger pictures are made of windows
WAYS: dict[str, tuple[float, Sampler | None, bool]] = {
    "windows": (1.0, None, True),
    "in one piece": (1.0, None, False),
    "windows, RePaint 5": (1.0, RePaint(times=5), True),
    "RePaint 5": (1.0, RePaint(times=5), False),
    "RePaint 10": (1.0, RePaint(times=10), False),
    "RePaint 5, strength 0.7": (0.7, RePaint(times=5), False),
    "RePaint 5, strength 0.5": (0.5, RePaint(times=5), False),
}


def seam(pictures: Tensor) -> float:
    """Mean step between columns at both seams of pictures (N,3,H,W), relative to the steps around them."""
    steps = pictures.diff(dim=3).abs().mean((0, 1, 2))
    places = (ADDED - 1, pictures.shape[3] - ADDED - 1)
    around = torch.cat([steps[place + offset] for place in places for offset in (torch.arange(-10, -2), torch.arange(3, 11))])
    return float(torch.stack([steps[place] for place in places]).mean() / around.mean())


def main(out: Path) -> None:
    model, images = load("emoji"), torch.stack([to_float(EmojiImages().pixels(i)) for i in SHOWN])
    own, rows = SamplingConfig.of(model.loaded.card), []
    for name, (strength, sampler, windows) in WAYS.items():
        task = Outpaint(strength, ADDED, ADDED)
        config = replace(own, task=task, sampler=sampler or own.sampler, windows=windows)
        if windows:  # Outpaint makes pictures of up to twice the training's size in one piece
            object.__setattr__(task, "whole", 1)
        requests = [SampleRequest(i, SeedNoise(0, i), image=InputImage(image)) for i, image in enumerate(images)]
        pictures = generate(model.network, requests, config, model.classes)
        rows.append(to_uint8(pictures))
        print(f"{name:<26} seam {seam(pictures):.2f}", flush=True)
    as_image(grid(torch.cat(rows), len(SHOWN))).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tools/outpaint.png"))
    main(parser.parse_args().out)
