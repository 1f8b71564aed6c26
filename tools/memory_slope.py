"""Whether a long training grows: resident memory and open files over its steps, of both stages of a tiny model.

    python tools/memory_slope.py --out FOLDER [--steps 20000]

Prints the slope of a straight line through the second half of each, per 1,000 steps, with the range of what was seen there.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from ldm import registry
from ldm.commands import train
from ldm.console.configs import find_configs

EVERY = 100  # steps between two looks
COMMON = ["-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/digits.yaml", "--data.batch_size=4"]
STAGES = {
    "autoencoder": ["-c", "autoencoder/digits.yaml", "--model.autoencoder.channels=8"],
    "diffusion": ["-c", "diffusion/digits.yaml", "--model.network.channels=16", "--model.sampling_steps=2"],
}


class Watch(L.Callback):
    """Resident bytes and open files, every EVERY steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append((trainer.global_step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))


def watched(stage: str, run: Path, steps: int) -> np.ndarray:
    """(looks, 3): step, bytes, open files."""
    length = ["--trainer.val_check_interval=2000", f"--trainer.max_steps={steps}"]
    cli = train.parse(find_configs([*COMMON, *STAGES[stage], *length, "--run", str(run), "--overwrite"]))
    cli.model.settings, watch = cli.settings, Watch()
    cli.trainer.callbacks.insert(0, watch)  # type: ignore[attr-defined]
    train.fit(cli)
    return np.array(watch.seen, dtype=np.float64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    chosen = parser.parse_args()
    if chosen.steps < 10 * EVERY:
        parser.error(f"--steps is {chosen.steps}; a line through fewer than 5 looks says nothing: give {10 * EVERY} or more")
    registry.load()
    rows = ["| stage | memory, MB per 1,000 steps | its range, MB | open files per 1,000 steps | their range |", "|---|---|---|---|---|"]
    for stage in STAGES:
        found = watched(stage, chosen.out, chosen.steps)
        late = found[len(found) // 2 :]
        (memory, _), (files, _) = (np.polyfit(late[:, 0] / 1000, late[:, i], 1) for i in (1, 2))
        low, high, fewest, most = late[:, 1].min() / 1e6, late[:, 1].max() / 1e6, late[:, 2].min(), late[:, 2].max()
        rows.append(f"| {stage} | {memory / 1e6:+.3f} | {low:.0f} to {high:.0f} | {files:+.3f} | {fewest:.0f} to {most:.0f} |")
    print("\n".join(rows))
