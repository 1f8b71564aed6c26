"""A run folder belongs to one run; what is resumed, signalled, written and read is what is said."""

import errno
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import randomise, stage1, stage2
from toys import latent_diffusion

from ldm import model_folder
from ldm.callbacks.loggers import CSVLog, WandbLog
from ldm.cli import main
from ldm.console.configs import find_configs
from ldm.errors import UserError
from ldm.files import refusal, replacing, sweep, write_atomically
from ldm.run_folder import RunFolder
from ldm.signals import Interrupted, Signals, breakable
from ldm.stages.resume import changes, require_same_model

CONSTANT = "--model.optimizer.decay=constant"


def test_a_run_is_not_replaced_and_goes_on_with_todays_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = stage1(tmp_path, CONSTANT, "--ckpt_path=auto", "--trainer.limit_val_batches=1", steps=2)
    assert main(first) == 0, "auto begins where there is nothing"
    last = tmp_path / "autoencoder" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    assert main([one for one in first if one != "--ckpt_path=auto"]) == 1
    assert "--ckpt_path last, starts anew with --overwrite" in capsys.readouterr().err
    assert main([*first, "--trainer.fast_dev_run=true", "--trainer.logger=false"]) == 0
    assert last.read_bytes() == before
    changed = ["--model.optimizer.lr=1e-6", "--model.optimizer.weight_decay=0.5"]
    capsys.readouterr()
    assert main([*stage1(tmp_path, CONSTANT, "--trainer.limit_val_batches=1", steps=4), *changed, "--ckpt_path=last"]) == 0
    said = capsys.readouterr().out
    assert "model.optimizer.lr 0.002 -> 1e-06" in said
    assert "trainer.max_steps 2 -> 4" in said
    group = torch.load(last, weights_only=True)["optimizer_states"][0]["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"]) == (1e-6, 0.5)
    assert group["lr"] <= 1e-6
    assert main([*first, "--data.size=16"]) == 1
    assert "in the checkpoint 32" in capsys.readouterr().err
    last.write_bytes(before[:1000])
    assert main(first) == 1
    said = capsys.readouterr().err
    assert "last.ckpt is damaged" in said
    assert "best.ckpt" in said


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, of which the second can go on."""
    run = tmp_path_factory.mktemp("stages")
    for stage in (stage1, stage2):
        assert main(stage(run, CONSTANT, "--trainer.limit_val_batches=1", steps=4)) == 0
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".ldm.lock"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--overwrite", "--ckpt_path=last"], "give one of them"),
        (["--overwrite", "--trainer.max_steps=-1", "--model.optimizer.decay=cosine"], "max_steps"),
        (["--overwrite", "--data.cache=/proc/none"], "choose another --data.cache"),
        (["--ckpt_path=last", "--data.size=16"], "data.size is 16, in the checkpoint 32"),
        (["--ckpt_path=last", "--model.network.channels=32"], "model.network.channels is 32, in the checkpoint"),
        (["--ckpt_path=last", "--model.network=DiT"], "model.network is DiT, in the checkpoint UNet"),
        (["--ckpt_path=last", "--model.init={run}"], "model.init is"),
        (["--ckpt_path=last", "--model.first_stage={other}"], "is not the one whose latents the checkpoint was trained on"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_refused_changes_nothing(
    options: list[str], said: str, stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    other = tmp_path / "other" / "model"
    if "{other}" in options[-1]:
        loaded = model_folder.load(stages / "autoencoder")
        model_folder.save(randomise(loaded.model), other, loaded.card)
    before = contents(stages)
    assert main(stage2(stages, CONSTANT, *(one.format(run=stages, other=other) for one in options), steps=6)) == 1
    assert said in capsys.readouterr().err
    assert contents(stages) == before


def test_what_trains_no_longer_is_refused(stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(stages, tmp_path / "run")
    assert main(stage1(tmp_path / "run", CONSTANT, "--ckpt_path=last", "--model.freeze=[encoder]", steps=6)) == 1
    assert "tensors are trained, in the checkpoint" in capsys.readouterr().err
    assert main(stage2(tmp_path / "run", CONSTANT, "--model.prediction=eps", "--ckpt_path=last", command="validate")) == 1
    assert "model.prediction is eps, in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(2)),
        lambda found: found.pop("lr_schedulers"),
        lambda found: found.update(optimizer_states=[]),
        lambda found: found.update(global_step="x"),
        lambda found: found.update({"pytorch-lightning_version": "abc"}),
        lambda found: found.pop("loops"),
    ],
    ids=["moments", "no schedule", "no optimizer", "step", "version", "no loops"],
)
def test_a_checkpoint_with_other_things_in_it_is_damaged(
    damage: Callable[[Any], Any], stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    found = torch.load(stages / "diffusion" / "checkpoints" / "last.ckpt", weights_only=True)
    damage(found)
    torch.save(found, tmp_path / "other.ckpt")
    arguments = stage2(
        tmp_path / "run", CONSTANT, f"--ckpt_path={tmp_path}/other.ckpt", f"--model.first_stage={stages}/autoencoder/model", steps=6
    )
    assert main(arguments) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_dry_run_and_a_measurement_leave_a_run_as_it_is(stages: Path, tmp_path: Path) -> None:
    before = contents(stages)
    for more in (["--overwrite"], ["--ckpt_path=last"]):
        assert main(stage2(stages, CONSTANT, "--trainer.fast_dev_run=2", "--trainer.logger=false", *more, steps=6)) == 0
    assert main(stage2(tmp_path, CONSTANT, "--trainer.fast_dev_run=2", f"--model.first_stage={stages}/autoencoder/model")) == 0
    assert not list(tmp_path.rglob("*.ckpt"))
    assert main(stage2(stages, CONSTANT, "--ckpt_path=last", "--trainer.limit_val_batches=1", command="validate")) == 0
    (stages / "diffusion" / "validate.json").unlink()
    assert contents(stages) == before


def test_the_best_stays_the_best_over_a_resume(stages: Path, tmp_path: Path) -> None:
    shutil.copytree(stages, tmp_path / "run")
    best = tmp_path / "run" / "diffusion" / "checkpoints" / "best.ckpt"
    before = best.read_bytes()
    bad = ["--model.optimizer.lr=5", "--model.optimizer.warmup=0", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    assert main([*stage2(tmp_path / "run", CONSTANT, "--ckpt_path=last", steps=6), *bad]) == 0
    assert best.read_bytes() == before


def test_an_overwritten_run_is_gone_when_the_new_one_begins(stages: Path, tmp_path: Path) -> None:
    shutil.copytree(stages, tmp_path / "run")
    run = tmp_path / "run" / "autoencoder"
    (run / "pictures" / "old.png").write_bytes(b"")
    assert main(stage1(tmp_path / "run", CONSTANT, "--overwrite", "--trainer.limit_val_batches=1", steps=2)) == 0
    assert not (run / "pictures" / "old.png").exists()
    assert not (run / ".overwritten").exists()
    assert model_folder.read_card(run / "model")["steps"] == 2
    (run / ".overwritten" / "pictures").mkdir(parents=True)
    (run / ".overwritten" / "pictures" / "old.png").write_bytes(b"")
    with RunFolder(run).owned("fit"):
        assert (run / "pictures" / "old.png").exists(), "a process that was killed before its training began gives back what it moved"


def test_validations_come_at_the_end_of_the_last_epoch_and_with_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", CONSTANT]
    for name, options in (("a", ["--trainer.max_epochs=2"]), ("b", ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"])):
        assert main(stage1(tmp_path / name, *few, *options, steps=1000)) == 0
        assert '"val/psnr"' in capsys.readouterr().out
        assert (tmp_path / name / "autoencoder" / "checkpoints" / "best.ckpt").is_file()
    again = stage1(tmp_path / "a", *few, "--trainer.max_epochs=2", "--ckpt_path=last", steps=1000)
    assert main(again) == 0
    assert "nothing was left to train" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["1e3", "null", "#x", "[x]", "{y}", "007", "true", "- x", "~x"])
def test_any_name_can_be_a_folders(name: str) -> None:
    (option, text) = find_configs(["--run", f"./{name}" if name == "~x" else name])
    assert option == "--run"
    assert yaml.safe_load(text) == text
    assert Path(text) == Path(name)


def test_a_home_folder_is_one_in_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for arguments in (["--run", "~/x"], ["--run=~/x"], ["--data.path", "~/x"], ["--data.path=~/x"]):
        assert find_configs(arguments)[-1].rpartition("=")[2] == "/home/me/x"


def test_every_end_leaves_a_checkpoint_and_a_saved_config_keeps_the_run(tmp_path: Path) -> None:
    run = stage1(tmp_path / "a", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", steps=1000)
    assert main(run) == 0
    assert torch.load(tmp_path / "a" / "autoencoder" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    saved = tmp_path / "a" / "autoencoder" / "fit.yaml"
    assert yaml.safe_load(saved.read_text())["trainer"]["default_root_dir"] == "${run}/autoencoder"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert main(["fit", "-c", str(saved), "--run", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "autoencoder" / "model" / "config.yaml").is_file()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()} == stamps


def test_a_folder_has_one_owner_and_is_swept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / ".x.abc.part.ckpt").write_bytes(b"of a killed process")
    with folder.owned("fit"):
        assert not list(tmp_path.glob("*.part*"))
        with pytest.raises(UserError, match=r"by `ldm fit`, process \d+"), RunFolder(tmp_path).owned("fit"):
            pass
        with replacing(tmp_path / "new.bin") as temporary:
            assert sweep(tmp_path) == [], "what is being written stays"
            temporary.write_bytes(b"1")
    assert (tmp_path / "new.bin").read_bytes() == b"1"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    code = f"""
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from ldm.errors import UserError
from ldm.files import write_atomically
try:
    write_atomically(Path({str(tmp_path / "f.bin")!r}), b"x" * 5000)
except UserError as error:
    sys.exit(str(error))
"""
    write_atomically(tmp_path / "f.bin", b"old")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "f.bin: File too large after 1,000 bytes" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["f.bin"]
    assert (tmp_path / "f.bin").read_bytes() == b"old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE) != (1000, 1000)
    assert refusal(tmp_path / "f", OSError(errno.EROFS, "Read-only file system"), 0).endswith("Read-only file system")


def test_signals_are_noted_and_break_what_may_break() -> None:
    with Signals() as signals:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals.number == signal.SIGHUP
        with pytest.raises(Interrupted), breakable():
            raise AssertionError("it does not begin")
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)  # the second of all
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.number == 0, "nohup"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_model_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """A process that is killed between its two files leaves the new model, not a damaged one."""
    model_folder.save(latent_diffusion(0), tmp_path, {"classes": [], "size": 16, "steps": 1})
    old = (tmp_path / "config.yaml").read_bytes()
    model_folder.save(latent_diffusion(1), tmp_path, {"classes": [], "size": 16, "steps": 2})
    (tmp_path / "config.yaml").rename(tmp_path / ".config.abc.part.yaml")
    (tmp_path / "config.yaml").write_bytes(old)
    assert model_folder.load(tmp_path).card["steps"] == 2
    model_folder.settle(tmp_path)
    assert model_folder.read_card(tmp_path)["steps"] == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "card", [{"size": -1}, {"size": 10**7}, {"classes": "abc"}, {"sampling": {}}, {"steps": -1}, {"cond_drop_prob": 2}, []], ids=str
)
def test_a_card_has_types_and_bounds(tmp_path: Path, card: object) -> None:
    model_folder.save(latent_diffusion(), tmp_path, {"classes": [], "size": 16})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["card"] = {**config["card"], **card} if isinstance(card, dict) else card
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="the card in"):
        model_folder.load(tmp_path)


def test_weights_that_are_not_finite_and_endless_models_are_refused(tmp_path: Path) -> None:
    model = latent_diffusion()
    next(model.parameters()).data.view(-1)[0] = torch.nan
    model_folder.save(model, tmp_path, {"classes": [], "size": 16})
    with pytest.raises(UserError, match="is not finite"):
        model_folder.load(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["model"]["init_args"]["network"]["init_args"]["num_blocks"] = 10**9
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="larger model"):
        model_folder.load(tmp_path)
    (tmp_path / "config.yaml").write_text("a: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(UserError, match="nested"):
        model_folder.load(tmp_path)


def test_settings_are_compared_by_their_options_names() -> None:
    before = {"model": {"class_path": "ldm.X", "init_args": {"a": 1, "b": [1, 2]}}, "trainer": {"logger": [{"class_path": "L"}]}}
    now = {"model": {"class_path": "X", "init_args": {"a": 2, "b": (1, 2), "c": None}}}
    assert changes(before, now) == ["model.a 1 -> 2"]
    with pytest.raises(UserError, match=r"model.a is 2, in the checkpoint 1"):
        require_same_model(before["model"], now["model"])


def test_parts_of_one_class_in_a_list_are_compared_one_by_one() -> None:
    one, other = ([{"class_path": "Pictures", "init_args": {"every": n}} for n in (1, second)] for second in (2, 3))
    assert changes({"callbacks": one}, {"callbacks": other}) == ["callbacks.Pictures 2.every 2 -> 3"]


def test_one_csv_file_over_all_starts(tmp_path: Path) -> None:
    for step in (0, 10):
        log = CSVLog(str(tmp_path))
        log.begin(step)
        for at in (step, step + 10):
            log.log_metrics({"train/loss": float(step)}, at)
        log.save()
    assert (tmp_path / "logs" / "metrics.csv").read_text().splitlines() == ["step,train/loss", "0,0.0", "10,10.0", "20,10.0"]


def test_wandb_that_does_not_start_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", "/proc/self/mem")  # nothing that can be read
    monkeypatch.setattr("wandb.run", None)  # of another test of this process
    log = WandbLog(save_dir=str(tmp_path / "run" / "autoencoder"))
    calls = []

    def init(**options: object) -> object:
        calls.append(options.get("mode"))
        if options.get("mode") != "disabled":
            raise OSError("no network")
        return type("Run", (), {"id": "x"})()

    monkeypatch.setattr("wandb.init", init)
    with pytest.warns(UserWarning, match="no network"):
        assert log.experiment.id == "x"
    assert calls == [None, "offline", "disabled"]
    assert log._wandb_init["group"] == "run"
    assert log._wandb_init["job_type"] == "autoencoder"
