"""What the layers that mix frames learn: emoji that turn, by a model of clips that starts from the carried model of images.

python tools/compare_clips.py [--steps 2000] [--num 32] [--out runs/compare-clips]

Writes a film of each emoji (animated WebP, 8 frames, 5 degrees each), trains configs/finetune/video.yaml on them with the emoji's classes,
and samples clips.  Neighbouring frames are compared inside the circle that stays in the picture, once as they are, once with the second
turned back.  Rivals: the films, what the first stage makes of them, the model before its training (its attention sees all
frames), and frames of the carried model, each with its own noise or all with one.  Writes table.md, table.json, clips.png (a clip per row)
and clips.webp.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import model_folder
from ldm.data.clips import ClipImages
from ldm.data.film_writer import write_film
from ldm.data.images import EmojiImages
from ldm.data.transforms import as_image, grid
from ldm.frames import side_by_side, split_frames
from ldm.ranges import to_float, to_uint8
from ldm.sampling.pipeline import generate
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise
from ldm.stages.inherit import start_from

FRAMES, DEGREES = 8, 5.0


def films(folder: Path) -> Path:
    """Of every emoji: it turns to the right, from 17.5 degrees on the left."""
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source, lines = EmojiImages(), []
        for index, record in enumerate(source.records):
            image = as_image(source.pixels(index))
            angles = [DEGREES * ((FRAMES - 1) / 2 - number) for number in range(FRAMES)]
            turned = [image.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white") for angle in angles]
            write_film(turned, folder / f"{index}.webp")
            lines.append(json.dumps({"file_name": f"{index}.webp", "label": record.label, "text": record.text}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def train(out: Path, steps: int) -> Path:
    if not (out / "video" / "model").is_dir():
        command = [sys.executable, "-m", "ldm", "fit"]
        for name in ("trainer/cpu", "trainer/csv", "data/clips", "diffusion/emoji", "finetune/video"):
            command += ["-c", f"configs/{name}.yaml"]
        command += [f"--data.path={films(out / 'films')}", f"--data.frames={FRAMES}", f"--model.network.frames={FRAMES}", "--run", str(out)]
        command += ["--data.mirror=false"]  # mirrored films turn the other way
        command += ["--model.first_stage=emoji", "--model.init=emoji", "--model.conditioner=ClassLabel", "--model.conditioner.dim=64"]
        command += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        print("\n$ " + " ".join(command[2:]), flush=True)
        subprocess.run(command, check=True)
    return out / "video" / "model"


def turned(images: Tensor, degrees: float) -> Tensor:
    """(N,3,H,W), to the left."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    places = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, mode="bicubic", padding_mode="border", align_corners=False)


def agreement(clips: Tensor) -> dict[str, float]:
    """Mean PSNR in dB between neighbouring frames of clips (N,T*3,H,W) in [-1,1], within a circle."""
    height, width = clips.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    circle = ((rows.square() + columns.square()).sqrt() < 0.45 * min(height, width)).float()
    frames = clips.unflatten(1, (FRAMES, 3))
    first, second = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)

    def psnr(other: Tensor) -> float:
        error = ((first - other).square() * circle).mean(1).sum((1, 2)) / circle.sum()
        return float((10 * torch.log10(4 / error.clamp(min=4e-6))).mean())

    return {"as they are": psnr(second), "turned back": psnr(turned(second, DEGREES))}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/compare-clips"))
    args = parser.parse_args()
    loaded, images = model_folder.load(train(args.out, args.steps)), model_folder.load("emoji")
    source = ClipImages(str(films(args.out / "films")), 64, FRAMES)
    chosen = torch.linspace(0, len(source) - 1, args.num).round().long().tolist()
    real, classes = to_float(torch.stack([source.pixels(i) for i in chosen])), [source.records[i].label for i in chosen]
    config, latents = SamplingConfig.of(loaded.card), loaded.model.latents
    made = {"films": real, "films through the first stage": latents.to_images(latents.to_latents(real)).clamp(-1, 1)}
    requests = [SampleRequest(i, SeedNoise(0, i), {"class": name}) for i, name in enumerate(classes)]
    made["clips of the model"] = generate(loaded.model, requests, config, loaded.card["classes"], chunk_size=4)
    untrained = model_folder.build(model_folder.describe(loaded.model))
    start_from(untrained, "emoji")
    made["the same before the training"] = generate(untrained.eval(), requests, config, loaded.card["classes"], chunk_size=4)
    one = generate(images.model, requests, SamplingConfig.of(images.card), images.card["classes"])
    made["frames of the model of images, one noise"] = one.repeat(1, FRAMES, 1, 1)
    numbered = list(enumerate(name for name in classes for _ in range(FRAMES)))
    several = [SampleRequest(i, SeedNoise(0, i), {"class": name}) for i, name in numbered]
    frames = generate(images.model, several, SamplingConfig.of(images.card), images.card["classes"])
    made["frames of the model of images, each its noise"] = frames.unflatten(0, (-1, FRAMES)).flatten(1, 2)
    results = {name: agreement(clips) for name, clips in made.items()}
    lines = ["| neighbouring frames, PSNR in dB | as they are | second turned back |", "|---|---|---|"]
    lines += [f"| {name} | {row['as they are']:.1f} | {row['turned back']:.1f} |" for name, row in results.items()]
    (args.out / "table.json").write_text(json.dumps({"steps": args.steps, "clips": args.num, "results": results}, indent=1))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    shown = to_uint8(made["clips of the model"][torch.linspace(0, args.num - 1, 12).round().long()])
    as_image(grid(side_by_side(shown, FRAMES), 2, gap=6)).save(args.out / "clips.png")
    by_frame = split_frames(shown, FRAMES).unflatten(0, (-1, FRAMES)).transpose(0, 1)
    write_film([as_image(grid(frame, 6)) for frame in by_frame], args.out / "clips.webp", 120)
    print("\n" + "\n".join(lines) + f"\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
