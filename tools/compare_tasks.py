"""What trained tasks give against what needs no training: super-resolution, inpainting and denoising of held-out emoji.

python tools/compare_tasks.py [--steps 2500] [--out runs/compare-tasks] [--only denoising]

Trains each of configs/task/ named below from the carried emoji model, then restores the emoji that neither has seen.  A rival that has
a setting has the one that is best for it on these very images; "no training" is what the carried model itself makes of them.  Writes
table.md, table.json, and pictures.jpg: for each task what the model was shown, the best rival, ours, the original.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ldm import model_folder
from ldm.autoencoder.perceptual import Lite0
from ldm.data.modes import as_tensor
from ldm.data.module import Emoji
from ldm.data.transforms import as_image, grid
from ldm.degradations import Downscale
from ldm.diffusion.guidance import CFG
from ldm.interfaces import ConditioningImage, Task
from ldm.ranges import to_float, to_uint8
from ldm.sampling.pipeline import generate
from ldm.sampling.request import InputImage, SampleRequest, SamplingConfig, SeedNoise
from ldm.sampling.tasks import Inpaint, Restore

Rival = Callable[[ConditioningImage], Tensor]


def filtered(make: Callable[[float], ImageFilter.Filter], setting: float) -> Rival:
    def rival(seen: ConditioningImage) -> Tensor:
        return to_float(torch.stack([as_tensor(as_image(image).filter(make(setting))) for image in to_uint8(seen.x)]))

    return rival


def resized(method: Image.Resampling) -> Rival:
    def rival(seen: ConditioningImage) -> Tensor:
        images = [as_image(image) for image in to_uint8(seen.x)]
        return to_float(torch.stack([as_tensor(image.resize((4 * image.width, 4 * image.height), method)) for image in images]))

    return rival


def mean_fill(seen: ConditioningImage) -> Tensor:
    assert seen.mask is not None
    known = 1 - seen.mask
    mean = (seen.x * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return torch.lerp(seen.x, mean.expand_as(seen.x), seen.mask)


RIVALS: dict[str, dict[str, list[Rival]]] = {
    "super-resolution": {"bicubic": [resized(Image.Resampling.BICUBIC)], "Lanczos": [resized(Image.Resampling.LANCZOS)]},
    "inpainting": {"mean of the rest": [mean_fill]},
    "denoising": {
        "as given": [lambda seen: seen.x],
        "Gaussian filter": [filtered(ImageFilter.GaussianBlur, radius) for radius in (0.4, 0.6, 0.8, 1.0, 1.3)],
        "median filter": [filtered(lambda size: ImageFilter.MedianFilter(int(size)), size) for size in (3, 5, 7)],
    },
}


UNTRAINED: dict[str, Task] = {"super-resolution": Restore(Downscale(4)), "inpainting": Inpaint()}


def train(task: str, out: Path, steps: int) -> Path:
    folder = out / task / "model"
    if not folder.is_dir():
        command = [sys.executable, "-m", "ldm", "fit"]
        for name in ("trainer/cpu", "trainer/csv", "data/emoji", "diffusion/emoji", f"task/{task}"):
            command += ["-c", f"configs/{name}.yaml"]
        command += [
            "--model.first_stage=emoji",
            "--model.init=emoji",
            "--run",
            str(out),
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={steps}",
        ]
        print("\n$ " + " ".join(command[2:]), flush=True)
        subprocess.run(command, check=True)
    return folder


def measure(images: Tensor, x: Tensor, perceptual: Lite0) -> dict[str, float]:
    """Mean PSNR in dB and mean distance over images (N,3,H,W) in [-1,1], rounded to 8 bits."""
    rounded = to_float(to_uint8(images))
    psnr = 10 * torch.log10(4 / (rounded - x).square().mean((1, 2, 3)).clamp(min=1e-10))
    return {"PSNR": float(psnr.mean()), "Lite0": float(perceptual(x, rounded).mean())}


@torch.no_grad()
def compare(task: str, out: Path, steps: int, num: int) -> tuple[dict[str, dict[str, float]], Tensor]:
    """Figures by rival, and the picture (3,.,.)."""
    loaded = model_folder.load(train(task, out, steps))
    held_out, perceptual = Emoji(val_fraction=0.05).sets[1], Lite0()
    images = torch.stack([held_out.read(i)[0] for i in range(min(num, len(held_out)))])
    torch.manual_seed(0)
    seen, x = loaded.model.conditioner.degrade({"image": images}), to_float(images)
    masks = [None] * len(x) if seen.mask is None else list(seen.mask)
    shown = [InputImage(*pair) for pair in zip(seen.x, masks, strict=True)]
    requests = [SampleRequest(i, SeedNoise(0, i), image=image) for i, image in enumerate(shown)]
    config = replace(SamplingConfig.of(loaded.card), task=None if seen.mask is None else Inpaint())
    results, made = {}, {}
    for name, settings in RIVALS[task].items():
        found = [(measure(rival(seen), x, perceptual), rival(seen)) for rival in settings]
        results[name], made[name] = max(found, key=lambda pair: pair[0]["PSNR"])
    made["ours"] = generate(loaded.model, requests, config, loaded.card["classes"])
    if task in UNTRAINED:
        carried = model_folder.load("emoji")
        plain = replace(SamplingConfig.of(carried.card), task=UNTRAINED[task], guidance=CFG(1.0))
        made["ours, no training"] = generate(carried.model, requests, plain, carried.card["classes"])
    results |= {name: measure(made[name], x, perceptual) for name in made if name not in results}
    hidden = seen.x if seen.mask is None else seen.x * (1 - seen.mask)
    best = max(RIVALS[task], key=lambda name: results[name]["PSNR"])
    rows = [F.interpolate(hidden, size=x.shape[2:]), made[best], made["ours"], x]
    chosen = torch.linspace(0, len(x) - 1, 16).round().long()
    return results, grid(to_uint8(torch.cat([row[chosen] for row in rows])), 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--num", type=int, default=96, help="held-out emoji")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-tasks"))
    parser.add_argument("--only", choices=list(RIVALS))
    args = parser.parse_args()
    found = {task: compare(task, args.out, args.steps, args.num) for task in ([args.only] if args.only else RIVALS)}
    results = {task: figures for task, (figures, _) in found.items()}
    as_image(torch.cat([F.pad(picture, (0, 0, 0, 8), value=255) for _, picture in found.values()], dim=1)).save(
        args.out / "pictures.jpg", quality=88
    )
    (args.out / "table.json").write_text(json.dumps({"steps": args.steps, "images": args.num, "results": results}, indent=1))
    lines = ["| | | PSNR, dB | Lite0 distance |", "|---|---|---|---|"]
    for task, figures in results.items():
        lines += [f"| {task} | {name} | {row['PSNR']:.1f} | {row['Lite0']:.3f} |" for name, row in figures.items()]
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + f"\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
