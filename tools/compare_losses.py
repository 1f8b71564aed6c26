"""What the perceptual and the adversarial loss do for an autoencoder: three runs on emoji with the same number of steps.

python tools/compare_losses.py [--steps 1400] [--multipliers 1 2 4 4] [--out runs/compare-losses]

Writes table.md, table.json and reconstructions.png (held-out emoji; originals, then a row per run).  Lite0 is the network of the
perceptual loss; rFD and rKID are measured by another one, MobileNetV2.  The autoencoder shrinks by 8 (--multipliers 1 2 4: by 4, where
little is left for an adversarial loss to do) and has convolutions at every size.  The discriminator comes at half of the steps.  Each set
of options has its own folder in --out, where runs that are done are kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from ldm import model_folder
from ldm.data.module import Emoji
from ldm.data.transforms import as_image, grid
from ldm.ranges import to_float, to_uint8

AUTOENCODER = ["--model.autoencoder.patch=1", "--model.autoencoder.channels=24"]
HELD_OUT = 0.25  # enough images for a Fréchet distance to tell the runs apart
RUNS = {
    "L1 + KL": [],
    "+ perceptual": ["-c", "configs/losses/lite0.yaml", "--model.adversary=null"],
    "+ perceptual + GAN": ["-c", "configs/losses/lite0.yaml", "--model.adversary.start={start}"],
}
COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lite0": "Lite0 distance", "rFD-mnv2": "rFD-mnv2", "rKID-mnv2": "rKID-mnv2"}


def train(options: list[str], run: Path, steps: int, multipliers: list[int]) -> dict[str, float]:
    """Held-out figures of one run."""
    files = [f"configs/{name}.yaml" for name in ("trainer/cpu", "trainer/csv", "data/emoji", "autoencoder/emoji")]
    command = [sys.executable, "-m", "ldm", "fit", *(part for file in files for part in ("-c", file))]
    command += [option.format(start=steps // 2) for option in options]
    command += ["-c", "configs/evaluation/features.yaml", "--model.reconstruction=l1", *AUTOENCODER, f"--data.val_fraction={HELD_OUT}"]
    command += [f"--model.autoencoder.multipliers={multipliers}"]
    command += ["--run", str(run), f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    command += ["--trainer.enable_model_summary=false"]
    if not (run / "autoencoder" / "test.json").is_file():
        print("\n$ " + " ".join(command[2:]), flush=True)
        subprocess.run(command, check=True)
        command[3] = "test"
        subprocess.run([*command, "--ckpt_path", "last"], check=True)
    measured = json.loads((run / "autoencoder" / "test.json").read_text())
    return {name: measured[f"val/{name}"] for name in COLUMNS}


@torch.no_grad()
def picture(out: Path, columns: int = 16) -> None:
    held_out = Emoji(val_fraction=HELD_OUT).sets[1]
    x = to_float(torch.stack([held_out.read(i * len(held_out) // columns)[0] for i in range(columns)]))
    rows = [x]
    for number in range(len(RUNS)):
        model = model_folder.load(out / str(number) / "autoencoder" / "model").model
        rows.append(model.decode(model.encode(x).mode()).clamp(-1, 1))
    as_image(grid(to_uint8(torch.cat(rows)), columns)).save(out / "reconstructions.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/compare-losses"))
    args = parser.parse_args()
    out = args.out / f"{'-'.join(map(str, args.multipliers))}-steps-{args.steps}"
    results = {name: train(options, out / str(i), args.steps, args.multipliers) for i, (name, options) in enumerate(RUNS.items())}
    (out / "table.json").write_text(
        json.dumps({"steps": args.steps, "multipliers": args.multipliers, "held out": HELD_OUT, "results": results}, indent=1)
    )
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[key]:.4g}" for key in COLUMNS) + " |" for name, row in results.items()]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    picture(out)
    print("\n" + "\n".join(lines) + f"\n\nwritten to {out}: table.md, table.json, reconstructions.png")


if __name__ == "__main__":
    main()
