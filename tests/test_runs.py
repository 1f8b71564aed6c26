"""fit, encode, validate, ema end to end at toy size: what they write, that they are exact, that they resume."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CSV, QUIET, ldm, stage1, stage2
from PIL import Image

from ldm import model_folder
from ldm.cli import main
from ldm.interfaces import Batch
from ldm.stages.autoencoder import AutoencoderStage


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_fit_writes_checkpoints_pictures_metrics_and_a_model_folder_without_pickle(trained: Path) -> None:
    for stage in ("autoencoder", "diffusion"):
        root = trained / stage
        assert (root / "checkpoints" / "last.ckpt").is_file()
        assert sorted(p.name for p in (root / "model").iterdir()) == ["config.yaml", "model.safetensors"]
        assert list((root / "pictures").glob("*_0000010.png"))
        assert list((root / "logs").rglob("metrics.csv"))
        card = model_folder.load(root / "model").card
        assert card["steps"] == 10
        assert card["classes"] == list("0123456789")


def test_the_frozen_autoencoder_is_bit_equal_after_stage_2(trained: Path) -> None:
    first = model_folder.load(trained / "autoencoder" / "model").model
    second = model_folder.load(trained / "diffusion" / "model").model.latents.autoencoder
    assert model_folder.fingerprint(first) == model_folder.fingerprint(second)


def test_the_first_stage_may_be_that_of_another_stage_2(trained: Path, tmp_path: Path) -> None:
    assert main(stage2(tmp_path, f"--model.first_stage={trained}/diffusion/model")) == 0
    one, other = (model_folder.load(run / "diffusion" / "model").model.latents.autoencoder for run in (trained, tmp_path))
    assert model_folder.fingerprint(one) == model_folder.fingerprint(other)


def test_the_model_folder_holds_the_averaged_weights_of_the_checkpoint(trained: Path) -> None:
    folder = model_folder.load(trained / "diffusion" / "model").model.state_dict()
    checkpoint = model_folder.load(trained / "diffusion" / "checkpoints" / "last.ckpt").model.state_dict()
    raw = weights(trained / "diffusion" / "checkpoints" / "last.ckpt")
    assert all(torch.equal(folder[name], checkpoint[name]) for name in folder)
    assert any(not torch.equal(folder[name], raw[f"model.{name}"]) for name in folder)


def test_latent_statistics_are_those_of_the_training_images(trained: Path) -> None:
    latents = model_folder.load(trained / "diffusion" / "model").model.latents
    assert int(latents.count) == 1797 - 180
    assert latents.size.tolist() == [8, 8]
    moments = torch.from_numpy(np.load(next((trained / "latents").glob("*/moments.npy")))[:, 0]).float()
    mean, log_variance = moments.chunk(2, dim=1)
    std = (mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(latents.shift, mean.mean((0, 2, 3)), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.scale, std, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("stage", [stage1, stage2], ids=["stage1", "stage2"])
def test_resuming_inside_an_epoch_equals_an_uninterrupted_run_bit_for_bit(trained: Path, tmp_path: Path, stage) -> None:
    saving = ["--trainer.callbacks.init_args.every_n_train_steps=3", "--trainer.callbacks.init_args.save_top_k=-1"]
    options = [*saving, "--trainer.val_check_interval=4", "--trainer.accumulate_grad_batches=2"]
    for name in ("whole", "parts"):
        if stage is stage2:
            shutil.copytree(trained / "autoencoder" / "model", tmp_path / name / "autoencoder" / "model")
    assert main(stage(tmp_path / "whole", *options, steps=7)) == 0
    root = "autoencoder" if stage is stage1 else "diffusion"
    checkpoint = tmp_path / "whole" / root / "checkpoints" / "step=3.ckpt"
    assert main(stage(tmp_path / "parts", *options, "--ckpt_path", str(checkpoint), steps=7)) == 0
    ends = [tmp_path / name / root for name in ("whole", "parts")]
    assert_same_weights(*(end / "checkpoints" / "last.ckpt" for end in ends))
    folders = [(end / "model" / "model.safetensors").read_bytes() for end in ends]
    assert folders[0] == folders[1], "the averaged weights differ"


def test_a_plain_folder_of_jpegs_trains_both_stages(photos, tmp_path: Path) -> None:
    folder, run = photos(), tmp_path / "run"
    size = ["--data.size=32", "--data.val_fraction=0.3"]
    assert main(stage1(run, "--data.path", str(folder), *size, data="folder")) == 0
    assert main(stage2(run, "--data.path", str(folder), *size, data="folder")) == 0
    assert model_folder.load(run / "diffusion" / "model").card["classes"] == ["cats", "dogs"]


def test_stage_2_without_a_cache_and_without_classes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "autoencoder", tmp_path / "autoencoder")
    assert main(stage2(tmp_path, "--data.cache=null", "--model.conditioner=Unconditional", "--model.network.vector_dim=0")) == 0
    assert not (tmp_path / "latents").exists()
    loaded = model_folder.load(tmp_path / "diffusion" / "model")
    cached = model_folder.load(trained / "diffusion" / "model").model.latents
    torch.testing.assert_close(loaded.model.latents.scale, cached.scale, rtol=0.02, atol=0)
    assert main(["sample", str(tmp_path / "diffusion" / "model"), "--n=2", "--steps=2", "--out", str(tmp_path / "s")]) == 0


def test_encode_writes_the_cache_and_trains_nothing(trained: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(trained / "autoencoder", tmp_path / "autoencoder")
    assert main(stage2(tmp_path, command="encode")) == 0
    assert "1617 images of 32 px encoded" in capsys.readouterr().out
    assert list((tmp_path / "latents").glob("*/latents.json"))
    assert not (tmp_path / "diffusion" / "checkpoints").exists()


def test_validate_and_test_report_what_the_training_measured_last_with_averaged_weights(trained: Path) -> None:
    with next((trained / "autoencoder" / "logs").rglob("metrics.csv")).open() as file:
        last = [row for row in csv.DictReader(file) if row.get("val/psnr")][-1]
    for command in ("validate", "test"):
        arguments = stage1(trained, "--ckpt_path", "last")
        assert main([command, *arguments[1:]]) == 0
        metrics = json.loads((trained / "autoencoder" / f"{command}.json").read_text())
        for name in ("psnr", "ssim", "reconstruction", "latent_std_0"):
            assert metrics[f"val/{name}"] == pytest.approx(float(last[f"val/{name}"]), rel=1e-5)


def test_a_run_that_came_to_its_end_goes_on_from_there_bit_for_bit(tmp_path: Path) -> None:
    same = ["--model.optimizer.decay=constant", "--trainer.limit_val_batches=1"]
    for run, stops in (("whole", [5]), ("parts", [3, 5])):
        for steps in stops:
            resumed = ["--ckpt_path", "last"] if steps > stops[0] else []
            assert main(stage1(tmp_path / run, *same, *resumed, steps=steps)) == 0
            last = tmp_path / run / "autoencoder" / "checkpoints" / "last.ckpt"
            assert torch.load(last, weights_only=True)["global_step"] == steps, "500 steps are between checkpoints"
    whole, parts = (
        torch.load(tmp_path / run / "autoencoder" / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "parts")
    )
    assert all(torch.equal(whole["state_dict"][name], parts["state_dict"][name]) for name in whole["state_dict"])
    assert all(torch.equal(whole["ldm"]["averaged"][name], parts["ldm"]["averaged"][name]) for name in whole["ldm"]["averaged"])


def test_two_processes_encode_and_measure_as_one(trained: Path, tmp_path: Path) -> None:
    """They train in tests/test_elastic.py."""
    shutil.copytree(trained / "autoencoder", tmp_path / "autoencoder")
    ddp, found = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"], []
    result = ldm(*stage2(tmp_path, *ddp, command="encode"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "1617 images of 32 px encoded" in result.stdout
    held_out = ["--ckpt_path=last", "--data.val_fraction=0.0095"]  # an odd number of images, in uneven shares
    for options, command in (([], main), (ddp, lambda arguments: ldm(*arguments).returncode)):
        assert command(stage1(tmp_path, *held_out, *options, command="validate")) == 0
        found.append(json.loads((tmp_path / "autoencoder" / "validate.json").read_text()))
    assert (found[0].pop("n"), found[0].pop("size"), found[0].pop("made")) == (17, 32, [])
    assert found[0] == pytest.approx({name: found[1][name] for name in found[0]}, rel=1e-4, abs=1e-5)


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.parametrize(
    ("number", "environment", "devices"),
    [
        pytest.param(signal.SIGINT, {}, [], id="ctrl-c"),
        pytest.param(signal.SIGUSR1, SLURM, [], id="slurm"),  # whose requeue is the same command, with `--ckpt_path auto`
        pytest.param(signal.SIGTERM, {}, ["--trainer.devices=2", "--trainer.strategy=ddp"], id="two processes", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_that_resumes(
    tmp_path: Path, number: signal.Signals, environment: dict[str, str], devices: list[str]
) -> None:  # fmt: skip
    often = ["--trainer.val_check_interval=100000", "--trainer.log_every_n_steps=1", "--ckpt_path=auto"]
    arguments = stage1(tmp_path, *often, *devices, steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    metrics = tmp_path / "autoencoder" / "logs" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    last = tmp_path / "autoencoder" / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert step > 0
    assert f"stopped at step {step}" in errors
    assert main(stage1(tmp_path, "--ckpt_path=auto", steps=step + 2)) == 0
    assert torch.load(last, weights_only=True)["global_step"] == step + 2


def test_the_last_validation_is_made_up_for_where_a_signal_stopped_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(stage1(tmp_path / "whole", steps=2)) == 0
    one, run = stage1(tmp_path / "one", "--ckpt_path=auto", steps=2), tmp_path / "one" / "autoencoder"
    step = AutoencoderStage.validation_step

    def stopped(stage: AutoencoderStage, batch: Batch, batch_idx: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        step(stage, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderStage, "validation_step", stopped)
        assert main(one) == 128 + signal.SIGTERM
    assert not (run / "checkpoints" / "best.ckpt").is_file()
    assert main(one) == 0
    whole, made_up = ((tmp_path / name / "autoencoder" / "logs" / "metrics.csv").read_text() for name in ("whole", "one"))
    found = [[row["val/psnr"] for row in csv.DictReader(io.StringIO(text)) if row.get("val/psnr")] for text in (whole, made_up)]
    assert found[0] == found[1]
    assert len(found[0]) == 1
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert len(list((run / "pictures").iterdir())) == 1
    assert main(one) == 0, "and only once"
    assert made_up == (run / "logs" / "metrics.csv").read_text()
    for name in ("whole", "one"):
        assert main(stage1(tmp_path / name, "--ckpt_path=last", steps=4)) == 0
    assert_same_weights(*(tmp_path / name / "autoencoder" / "checkpoints" / "last.ckpt" for name in ("whole", "one")))


CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted([*CONFIGS.glob("losses/*.yaml"), *CONFIGS.glob("evaluation/*.yaml")])


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_every_addition_to_stage_1_runs_for_two_tiny_steps(path: Path, random_trunk, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    options = config["model"]["init_args"]
    for loss in options.get("losses", []):
        if loss["class_path"] == "LPIPS":
            loss["init_args"]["weights"] = str(random_trunk("vgg16"))
        else:
            pytest.importorskip("timm")
    (tmp_path / "addition.yaml").write_text(yaml.safe_dump(config))
    from_the_start = ["--model.adversary.start=0", "--model.adversary.alone=0"] if "adversary" in options else []
    logging = ["--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1"]
    assert main(stage1(tmp_path, "-c", str(tmp_path / "addition.yaml"), *from_the_start, *logging)) == 0
    (logged,) = tmp_path.rglob("metrics.csv")
    assert ("train/d_loss" in logged.read_text()) == ("adversary" in options)
    assert ("val/rFD-mnv2" in logged.read_text()) == ("metrics" in options)


OBJECTIVES = {  # what the toy runs below have instead of the carried emoji model
    "learned-variance": [],
    "emoji-4-steps": ["--model.init={}", "--model.objective.teacher={}", "--model.first_stage={}"],
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("objective/*.yaml")), ids=lambda p: p.stem)
def test_every_objective_runs_for_two_tiny_steps_and_its_model_samples(path: Path, trained: Path, tmp_path: Path) -> None:
    model = str(trained / "diffusion" / "model")
    options = ["-c", str(path), f"--model.first_stage={trained}/autoencoder/model", *(o.format(model) for o in OBJECTIVES[path.stem])]
    run = stage2(tmp_path, *options)
    run += [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        f"--trainer.default_root_dir={tmp_path}/x",
        "--model.sampling_steps=2",
    ]
    assert main(run) == 0
    assert main(["sample", str(tmp_path / "x" / "model"), "--n=2", "--out", str(tmp_path / "out")]) == 0
    before, after = (model_folder.load(folder).model.denoiser.state_dict() for folder in (model, tmp_path / "x" / "model"))
    same = [name for name, tensor in before.items() if tensor.shape == after[name].shape and torch.allclose(tensor, after[name], atol=0.01)]
    assert (len(same) == len(before)) == (path.stem == "emoji-4-steps"), "the student starts from its teacher"


def test_a_classifier_of_noisy_latents_is_trained_and_guides(trained: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(trained / "diffusion" / "model", tmp_path / "diffusion" / "model")
    logging = ["--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1"]
    config = ["-c", "data/digits.yaml", "-c", "classifier/digits.yaml", "--run", str(tmp_path), "--data.batch_size=8", *logging]
    limits = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    assert main(["fit", *CSV, *QUIET, *config, *limits]) == 0
    classifier = str(tmp_path / "classifier" / "model")
    common = ["sample", str(trained / "diffusion" / "model"), "--n=2", "--steps=2"]
    for scale in (0, 20):
        guidance = ["--guidance=ClassifierGuidance", f"--guidance.classifier={classifier}", f"--guidance.scale={scale}"]
        assert main([*common, *guidance, "--out", str(tmp_path / str(scale))]) == 0
    assert main([*common, "--guidance=CFG", "--guidance.scale=1", "--out", str(tmp_path / "plain")]) == 0
    pictures = [(tmp_path / name / "0.png").read_bytes() for name in ("plain", "0", "20")]
    read = [Image.open(tmp_path / name / "0.png").tobytes() for name in ("plain", "0", "20")]
    assert len(set(pictures)) == 3, "their settings differ"
    assert read[0] == read[1] != read[2]
    unconditional = [
        "--model.conditioner=Unconditional",
        "--model.network.vector_dim=0",
        f"--model.first_stage={trained}/autoencoder/model",
    ]
    assert main([*stage2(tmp_path / "plain", *unconditional, "--trainer.limit_val_batches=1")]) == 0
    asked = ["sample", str(tmp_path / "plain" / "diffusion" / "model"), *common[2:], "--class=3,8", *guidance]
    assert main([*asked, "--out", str(tmp_path / "classes")]) == 0, "a model without classes is led to one"
    lines = [json.loads(line) for line in (tmp_path / "classes" / "manifest.jsonl").read_text().splitlines()]
    assert [line["condition"] for line in lines] == [{"class": "3"}, {"class": "8"}]
    assert main([*asked, "--class=eleven", "--out", str(tmp_path / "eleven")]) == 1
    assert "class 'eleven' is unknown; allowed: 0, 1" in capsys.readouterr().err
    assert main(["sample", classifier, "--out", str(tmp_path / "none")]) == 1
    assert "makes no pictures" in capsys.readouterr().err
    other = ["--guidance=ClassifierGuidance", f"--guidance.classifier={trained}/autoencoder/model", "--out", str(tmp_path / "other")]
    assert main([*common, *other]) == 1
    assert "does not work in the same latents" in capsys.readouterr().err
    assert main(["fit", *CSV, *QUIET, *config, "--model.diffusion", classifier]) == 1
    assert "give a model of stage 2" in capsys.readouterr().err


def test_an_average_is_chosen_after_training_by_its_distance_to_real_images(trained: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(trained / "autoencoder" / "model", tmp_path / "autoencoder" / "model")
    run = stage2(tmp_path, "--trainer.limit_val_batches=1", steps=6)
    position = run.index("trainer/csv.yaml") + 1
    every = "--trainer.callbacks.init_args.every_n_steps=2"
    assert main([*run[:position], "-c", "trainer/power-ema.yaml", every, *run[position:]]) == 0
    assert len(list((tmp_path / "diffusion" / "averages").iterdir())) == 6
    early = ["ema", "--run", str(tmp_path / "diffusion"), "--std=0.1", "--out", str(tmp_path / "early")]
    assert main([*early, "--step=2"]) == 0
    assert model_folder.load(tmp_path / "early").card["steps"] == 2
    weaker = ["--guidance=CFG", "--guidance.scale=2", "--guidance.weaker", str(tmp_path / "early"), "--n=1", "--steps=2"]
    assert main(["sample", str(tmp_path / "diffusion" / "model"), *weaker, "--out", str(tmp_path / "guided")]) == 0
    assert main([*early, "--overwrite", "--step=3"]) == 1
    assert "step is 3; stored are 2, 4, 6" in capsys.readouterr().err
    ema = ["ema", "--run", str(tmp_path / "diffusion"), "--out", str(tmp_path / "ema")]
    assert main([*ema, "--reference=digits", "--n=4", "--candidates=0.05,0.1"]) == 0
    said = capsys.readouterr().out
    distances = {float(std): float(fd) for std, fd in re.findall(r"length ([\d.]+) +FD-mnv2 ([\d.]+)", said)}
    assert distances.keys() == {0.05, 0.1}
    assert model_folder.load(tmp_path / "ema").card["average"] == min(distances, key=distances.__getitem__)
    assert main(["sample", str(tmp_path / "ema"), "--n=1", "--steps=2", "--out", str(tmp_path / "out")]) == 0
    assert main(ema) == 1
    assert "give either --std, or --reference" in capsys.readouterr().err


TRAINERS = [
    pytest.param(path, marks=pytest.mark.slow if path.stem in ("compile", "ddp") else (), id=path.stem)
    for path in sorted(CONFIGS.glob("trainer/*.yaml"))
]


@pytest.mark.parametrize("path", TRAINERS)
def test_every_trainer_config_runs_for_two_tiny_steps(path: Path, tmp_path: Path) -> None:
    if path.stem == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    arguments = stage1(tmp_path)
    position = arguments.index("trainer/csv.yaml") + 1
    arguments = [*arguments[:position], "-c", str(path), *arguments[position:], "--trainer.limit_val_batches=1"]
    assert (ldm(*arguments).returncode if path.stem == "ddp" else main(arguments)) == 0
    assert (tmp_path / "autoencoder" / "model" / "config.yaml").is_file()


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba_images_go_through_all_of_stage_1(channels: int, photos, tmp_path: Path, capsys) -> None:
    data = [
        "--data.path",
        str(photos(12)),
        "--data.size=32",
        "--data.val_fraction=0.4",
        f"--data.channels={channels}",
        "--data.batch_size=2",
    ]
    files = ["-c", "losses/lite0.yaml", "-c", "evaluation/features.yaml"]
    run = [*stage1(tmp_path, *files, *data, data="folder"), "--model.adversary.start=0", "--model.adversary.alone=0"]
    assert main([*run, "--model.autoencoder.image_channels=3"]) == 1
    assert f"the images have {channels} channels, the autoencoder takes 3" in capsys.readouterr().err
    assert main(run) == 0
    assert list((tmp_path / "autoencoder" / "pictures").glob("*.png"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_every_config_opens_with_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert isinstance(yaml.safe_load(path.read_text()), dict)
