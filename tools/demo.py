"""The main job in a few minutes: train both stages on the carried digits, sample them, sample the carried emoji model.

python tools/demo.py [--out runs/demo]
  --emoji         instead train an emoji model from scratch in 20 minutes
  --emoji full    as long as the model was that the package carries
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

EMOJI_ROWS = "Smileys & Emotion,People & Body,Animals & Nature,Food & Drink,Travel & Places,Activities,Objects,Symbols,Flags"
TRAINER = ["-c", "configs/trainer/cpu.yaml", "-c", "configs/trainer/csv.yaml", "--trainer.enable_model_summary=false"]
SHORT = {"autoencoder": ["--trainer.max_steps=1500"], "diffusion": ["--trainer.max_steps=3800"]}


def run(*command: str) -> None:
    """Show a command as the user would type it, then run it."""
    print("\n$ " + " ".join(f"'{part}'" if " " in part else part for part in command), flush=True)
    start = time.monotonic()
    program = [sys.executable, "-m", "ldm"] if command[0] == "ldm" else [sys.executable]
    if subprocess.run([*program, *command[1:]]).returncode:
        sys.exit(f"{' '.join(command[:2])} failed")
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def train(name: str, out: Path, limits: dict[str, list[str]]) -> None:
    for stage in ("autoencoder", "diffusion"):
        configs = ["-c", f"configs/data/{name}.yaml", "-c", f"configs/{stage}/{name}.yaml"]
        run("ldm", "fit", *TRAINER, *configs, "--run", str(out), *limits.get(stage, []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--emoji", nargs="?", const="short", choices=["short", "full"])
    arguments = parser.parse_args()
    name = "emoji" if arguments.emoji else "digits"
    out = arguments.out or Path("runs") / ("demo-emoji" if arguments.emoji else "demo")
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    train(name, out, SHORT if arguments.emoji == "short" else {})
    model, samples = str(out / "diffusion" / "model"), out / "samples"
    if arguments.emoji:
        run("ldm", "sample", model, "--class", EMOJI_ROWS, "--per-class", "10", "--out", str(samples))
    else:
        run("ldm", "sample", model, "--n", "100", "--out", str(samples))
        run("python", "tools/judge_digits.py", str(samples))
        run("ldm", "sample", "emoji", "--class", EMOJI_ROWS, "--per-class", "10", "--out", str(out / "emoji"))
        shutil.copy(out / "emoji" / "grid.png", out / "emoji.png")
    shutil.copy(samples / "grid.png", out / "samples.png")
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.  Everything is in {out}:")
    print(f"  {out / 'samples.png'}  pictures from the model you just trained")
    if not arguments.emoji:
        print(f"  {out / 'emoji.png'}    pictures from the emoji model that comes with the package, a row per category")
    print(f"  {out / 'autoencoder' / 'pictures'}  originals above reconstructions")
    print(f"  {model}  the trained model, with everything that `ldm sample` needs")
    ldm = Path(os.path.relpath(sys.executable)).parent / "ldm"
    print("Next:")
    print(f"  {ldm} sample {model} --n 16 --seed 1 --out runs/more")
    print(f"  {ldm} sample emoji --class face-smiling,animal-mammal --n 16 --out runs/emoji-samples")
    options = "-c trainer/cpu.yaml -c data/folder.yaml -c autoencoder/emoji.yaml --data.size 64 --run runs/mine"
    print(f"  {ldm} fit {options} --data.path PICTURES")


if __name__ == "__main__":
    main()
