"""The latent cache under two writers and under kills: every cache must come out whole and equal to the one that a single run writes.

    python tools/torture_cache.py --out FOLDER [--pairs 50] [--kills 50]

pairs: two `ldm encode` of one run, the second at a random offset.  kills: SIGKILL at a random moment of an encoding, up to three times,
then one that is left alone.  Commands run in forked children of a process that has imported ldm, so that a try costs seconds.
"""

import argparse
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from crash_campaign import start

from ldm import registry

OPTIONS = ["-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/digits.yaml", "-c", "diffusion/digits.yaml"]
SMALL = [
    "--model.network.channels=16",
    "--data.batch_size=8",
    "--trainer.enable_model_summary=false",
]


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def encode(run: Path, first: Path) -> list[str]:
    return ["encode", *OPTIONS, *SMALL, "--model.first_stage", str(first), "--run", str(run)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=50)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    registry.load()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log, draw, failures = chosen.out / "log.txt", random.Random(0), 0
    first = chosen.out / "first" / "autoencoder" / "model"
    small = ["--model.autoencoder.channels=16", "--trainer.max_steps=2", "--trainer.val_check_interval=2", *SMALL[1:]]
    train = ["fit", *OPTIONS[:-1], "autoencoder/digits.yaml", *small, "--run", str(chosen.out / "first")]
    if start(train, log).wait():
        sys.exit(f"the first stage was not trained: see {log}")
    began = time.monotonic()
    if start(encode(chosen.out / "whole", first), log).wait():
        sys.exit(f"a single encoding failed: see {log}")
    lasts, whole = time.monotonic() - began, content(chosen.out / "whole" / "latents")
    for number in range(chosen.pairs + chosen.kills):
        run = chosen.out / "try"
        shutil.rmtree(run, ignore_errors=True)
        if number < chosen.pairs:
            one = start(encode(run, first), log)
            time.sleep(draw.uniform(0, lasts))
            statuses = [start(encode(run, first), log).wait(), one.wait()]
            good = statuses == [0, 0]
        else:
            kills = draw.randint(1, 3)
            for _ in range(kills):
                child = start(encode(run, first), log)
                time.sleep(draw.uniform(0, lasts))
                child.kill()
                child.wait()
            good = start(encode(run, first), log).wait() == 0
        same = content(run / "latents") == whole
        failures += not (good and same)
        if not (good and same):
            print(f"try {number}: {'another content' if good else 'a command failed'}", flush=True)
    print(f"{chosen.pairs} pairs and {chosen.kills} killed encodings of {lasts:.1f} s: {failures} failures")
    sys.exit(bool(failures))
