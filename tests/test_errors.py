"""A user's mistake ends with one sentence and a status other than 0: no traceback, nothing lost."""

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CSV, ldm, stage1, stage2
from PIL import Image

from ldm.cli import main
from ldm.errors import UserError


def fails_with(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    for part in parts:
        assert part in said
    assert said.startswith(f"ldm {arguments[0]}: ")


def folder_run(tmp_path: Path, path: Path, *extra: str) -> list[str]:
    return stage1(tmp_path / "run", "--data.path", str(path), "--data.size=32", "--data.val_fraction=0.3", *extra, data="folder")


def test_missing_folder(tmp_path, capsys) -> None:
    fails_with(capsys, folder_run(tmp_path, tmp_path / "nowhere"), "nowhere", "there is no file or folder")


def test_empty_folder(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    fails_with(capsys, folder_run(tmp_path, tmp_path / "empty"), "no images in", "empty", ".jpg")


def test_no_path(tmp_path, capsys) -> None:
    fails_with(capsys, stage1(tmp_path, data="folder"), "data", "path")


def test_corrupt_images_are_named_skipped_and_counted(photos, tmp_path, capsys) -> None:
    folder = photos()
    (folder / "cats" / "1.jpg").write_bytes((folder / "cats" / "1.jpg").read_bytes()[:300])
    (folder / "dogs" / "bad.png").write_text("not an image")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert (
            main(folder_run(tmp_path, folder, "--trainer.max_epochs=2", "--trainer.max_steps=-1", "--model.optimizer.decay=constant")) == 0
        )
    assert "2 unreadable images were skipped" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:skipped an image")
def test_more_corrupt_images_than_allowed(photos, tmp_path, capsys) -> None:
    folder = photos()
    for path in sorted(folder.rglob("*.jpg"))[:6]:
        path.write_bytes(b"\xff\xd8 nothing")
    fails_with(capsys, folder_run(tmp_path, folder, "--data.max_damaged=1"), "images cannot be read", "max_damaged = 1", ".jpg")


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--model.autoencoder.chanels=3", "chanels"),
        ("--trainer.max_step=3", "trainer.max_step is unknown: allowed are max_steps"),
        ("--model.optimizer.lr=fast", "lr"),
        ("--data.size=33", "data.size is 33; the autoencoder, whose factor is 4, needs a multiple of 4: 32 or 36"),
        ("--data.val_fraction=2", "val_fraction"),
        ("--data.batch_size=0", "batch_size"),
        ("--ckpt_path=last", "no checkpoint"),
        ("--trainer.precision=bf16-true", "bf16-mixed"),
        ("--model.autoencoder.bottleneck.channels=0", "KL has 0 channels"),
        ("--model.freeze=[encoder,decoder,quant_conv,post_quant_conv]", "nothing is left to train"),
    ],
)
def test_wrong_options(tmp_path, capsys, option: str, part: str) -> None:
    fails_with(capsys, stage1(tmp_path, option), part)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.autoencoder.channels=24"], ["in the checkpoint", "16", "24", "--model.init"]),
        (["--model.adversary=PatchGAN", "--model.adversary.discriminator=PatchDiscriminator"], ["the checkpoint has no adversary", "init"]),
    ],
)
def test_a_checkpoint_of_another_layout(trained, tmp_path, capsys, options: list[str], parts: list[str]) -> None:
    for command in ("fit", "validate"):
        fails_with(capsys, stage1(tmp_path, "--ckpt_path", str(last_of(trained)), *options, command=command), *parts)


def last_of(run: Path) -> Path:
    return run / "autoencoder" / "checkpoints" / "last.ckpt"


def test_a_discriminator_for_other_images_is_refused_before_the_first_step(tmp_path, capsys) -> None:
    adversary = ["--model.adversary=PatchGAN", "--model.adversary.start=1000", "--model.adversary.discriminator=PatchDiscriminator"]
    fails_with(capsys, stage1(tmp_path, *adversary, "--model.adversary.discriminator.layers=6"), "32x32 px are too small", "fewer layers")
    fails_with(capsys, stage1(tmp_path, *adversary, "--model.adversary.discriminator.image_channels=2"), "leave its image_channels out")


def test_a_loss_may_not_flatter_itself(tmp_path, capsys) -> None:
    pytest.importorskip("timm")
    (tmp_path / "mine.yaml").write_text(
        "model: {init_args: {losses: [{class_path: Lite0}], "
        "metrics: [{class_path: FeatureDistance, init_args: {features: {class_path: Lite0Features}}}]}}"
    )
    fails_with(capsys, stage1(tmp_path, "-c", str(tmp_path / "mine.yaml")), "lite0 is in a loss and in a distance")


@pytest.mark.filterwarnings("ignore:skipped an image")
def test_pixels_that_are_no_numbers(photos, tmp_path, capsys) -> None:
    folder, values = photos(), np.random.default_rng(0).random((40, 40), dtype=np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(folder / "cats" / "bad.tiff")
    fails_with(capsys, folder_run(tmp_path, folder, "--data.max_damaged=0"), "bad.tiff", "not finite numbers")


def test_wrong_key_in_yaml(tmp_path, capsys) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  init_args:\n    autoencoder:\n      init_args:\n        chanels: 3\n")
    fails_with(capsys, stage1(tmp_path, "-c", str(tmp_path / "mine.yaml")), "chanels")


def test_yaml_that_is_not_yaml(tmp_path, capsys) -> None:
    (tmp_path / "mine.yaml").write_text("model: [\n")
    fails_with(capsys, stage1(tmp_path, "-c", str(tmp_path / "mine.yaml")), "mine.yaml")


def test_missing_config(capsys) -> None:
    fails_with(capsys, ["fit", "-c", "data/none.yaml"], "data/none.yaml", "data/digits.yaml")


def test_missing_first_stage(tmp_path, capsys) -> None:
    fails_with(capsys, stage2(tmp_path), "has no model of stage 1 yet: train it first, with the same --run")


def test_first_stage_of_another_shape(trained, tmp_path, capsys) -> None:
    shutil.copytree(trained / "autoencoder", tmp_path / "autoencoder")
    fails_with(capsys, stage2(tmp_path, "--model.network.in_channels=5"), "5 latent channels", "makes 2")


def test_wrong_number_of_classes(trained, tmp_path, capsys) -> None:
    shutil.copytree(trained / "autoencoder", tmp_path / "autoencoder")
    chosen = ["--model.conditioner=ClassLabel", "--model.conditioner.num_classes=3"]
    fails_with(capsys, stage2(tmp_path, *chosen), "has 3 classes, the data 10", "num_classes out, which follows")


@pytest.mark.skipif(os.geteuid() != 0 and not hasattr(os, "chmod"), reason="needs permissions")
def test_unwritable_output(trained, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    fails_with(capsys, stage1(tmp_path / "file" / "run"), "file")
    model = str(trained / "diffusion" / "model")
    fails_with(capsys, ["sample", model, "--n=1", "--steps=1", "--out", str(tmp_path / "file" / "out")], "file")
    if os.geteuid() != 0:  # root may write everywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        fails_with(capsys, stage1(locked / "run"), "locked")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--class", "cow"], ["cow", "allowed: 0, 1"]),
        (["--steps", "5000"], ["5000", "1 to 1000"]),
        (["--sampler", "Nope"], ["sampler", "Nope"]),
        (["--sampler", "Ancestral", "--sampler.eta", "2"], ["eta is 2"]),
        (["--nmu", "3"], ["--nmu", "did you mean --n "]),
        (["-c", "sampling/none.yaml"], ["there is no config file 'sampling/none.yaml'", "sampling/ddim.yaml"]),
    ],
)
def test_wrong_options_of_sample(trained, tmp_path, capsys, options: list[str], parts: list[str]) -> None:
    fails_with(capsys, ["sample", str(trained / "diffusion" / "model"), "--out", str(tmp_path), *options], *parts)


def test_sample_from_what_is_no_model(trained, tmp_path, capsys) -> None:
    fails_with(capsys, ["sample"], "model is missing")
    fails_with(capsys, ["sample", "nothing"], "no model at 'nothing'")
    fails_with(capsys, ["sample", str(trained / "autoencoder" / "model")], "ConvAutoencoder", "stage 2")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    fails_with(capsys, ["sample", str(tmp_path / "x.png")], "not a checkpoint")


def test_unknown_command(capsys) -> None:
    assert main(["trane"]) == 2
    assert "there is no command 'trane'; the commands are train" in capsys.readouterr().err


def test_a_diverging_run_says_so_and_keeps_its_checkpoint(tmp_path, capsys) -> None:
    assert main(stage1(tmp_path, steps=2)) == 0
    fails_with(
        capsys,
        stage1(tmp_path, "--overwrite", "--model.optimizer.lr=1e30", "--model.optimizer.warmup=0", steps=60),
        "steps in a row",
        "learning rate",
    )
    assert torch.load(tmp_path / "autoencoder" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0


def test_no_traceback_in_a_process_of_its_own(tmp_path) -> None:
    result = ldm("fit", *CSV, "-c", "data/folder.yaml", "-c", "autoencoder/digits.yaml", "--data.path", "/nowhere", "--run", str(tmp_path))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == "ldm fit: there is no file or folder '/nowhere': check the path"


def test_a_fault_of_ldm_is_told_apart_from_a_mistake(tmp_path, capsys, monkeypatch) -> None:
    def fails(command: str, arguments: list[str]) -> int:
        raise ValueError("shapes do not match")

    monkeypatch.setattr("ldm.commands.wav.main", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["wav", "x.png", "--rate=3"]) == 70
    said = capsys.readouterr().err
    (report,) = tmp_path.glob("ldm-fault-*.txt")
    assert said == f"ldm wav: this is a fault of ldm (ValueError: shapes do not match).  Please report it with the file {report}\n"
    text = report.read_text()
    assert text.startswith("ldm wav x.png --rate=3\n")
    assert "Traceback (most recent call last)" in text
    assert "in fails" in text
    monkeypatch.setenv("LDM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="shapes do not match"):
        main(["wav", "x.png"])


def test_a_users_mistake_is_a_value_error_to_programs() -> None:
    assert issubclass(UserError, ValueError)


def test_what_the_machine_refuses_is_one_sentence(tmp_path, capsys, monkeypatch) -> None:
    def full(command: str, arguments: list[str]) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("ldm.commands.wav.main", full)
    assert main(["wav", "x.png"]) == 1
    assert capsys.readouterr().err == f"ldm wav: No space left on device: {tmp_path / 'x'}: make room there\n"


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU's memory is used up: take a smaller"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "the machine's memory is used up"),
        (MemoryError(), "the machine's memory is used up"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "a process that reads the data was ended from outside"),
        (RuntimeError("DataLoader worker (pid(s) 3, 4) exited unexpectedly"), "fewer --data.num_workers"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:3"), "the connection to another process"),
        (OSError(24, "Too many open files"), "ulimit -n"),
    ],
)
def test_what_libraries_say_is_translated(raised: Exception, sentence: str, capsys, monkeypatch) -> None:
    def fails(command: str, arguments: list[str]) -> int:
        raise raised

    monkeypatch.setattr("ldm.commands.wav.main", fails)
    assert main(["wav", "x.png"]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert "fault of ldm" not in said


def test_memory_that_is_not_there_is_one_sentence(tmp_path) -> None:
    code = "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); from ldm.errors import of_library\n"
    code += "try: torch.zeros(2**34)\nexcept RuntimeError as error: print(of_library(error))"
    import subprocess
    import sys

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("the machine's memory is used up")


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (SystemExit(3), 3)])
def test_exit_statuses(raised: BaseException, status: int, capfd, monkeypatch) -> None:
    def ends(command: str, arguments: list[str]) -> int:
        raise raised

    monkeypatch.setattr("ldm.commands.wav.main", ends)
    monkeypatch.setattr("os.dup2", lambda *_: None)  # would close pytest's stdout
    assert main(["wav", "x.png"]) == status
    assert capfd.readouterr().err == ("ldm wav: stopped\n" if status == 130 else "")


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from ldm.cli import main; main(['--help']); print(sorted({'torch', 'lightning', 'wandb', 'yaml'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"
