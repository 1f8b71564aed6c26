"""What Weights & Biases gets of a run, read back from its offline files; a sweep's trials."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from conftest import stage1, stage2
from toys import autoencoder
from wandb.proto.wandb_internal_pb2 import Record

from ldm import model_folder
from ldm.callbacks.tracking import as_artifact
from ldm.cli import main

BLOCK, HEADER = 32768, 7  # bytes of LevelDB's log format, in which W&B keeps a run: github.com/google/leveldb/blob/main/doc/log_format.md


def records(path: Path) -> Iterator[Record]:
    data, place, parts = path.read_bytes(), HEADER, b""  # after W&B's own header
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


class Run:
    """Configuration, history, pictures and artifacts of the offline runs below a folder, in the order in which they were made."""

    def __init__(self, folder: Path) -> None:
        self.ids, self.config, self.history = list[str](), dict[str, Any](), list[dict[str, Any]]()
        self.artifacts, self.alerts, self.facts = list[Any](), list[Any](), list[Any]()
        for path in sorted(folder.rglob("*.wandb")):
            for record in records(path):
                self._take(record)

    def _take(self, record: Record) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.ids.append(record.run.run_id)
            self.facts.append(record.run)
        for update in record.run.config.update if kind == "run" else record.config.update if kind == "config" else []:
            self.config["/".join([update.key] if update.key else update.nested_key)] = json.loads(update.value_json)
        if kind == "history":
            items = {"/".join([one.key] if one.key else one.nested_key): json.loads(one.value_json) for one in record.history.item}
            self.history.append(items)
        if kind == "artifact":
            self.artifacts.append(record.artifact)
        if kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            self.artifacts.append(record.request.log_artifact.artifact)
        if kind == "alert":
            self.alerts.append(record.alert)


def to_wandb(arguments: list[str]) -> list[str]:
    """The same with W&B as its logger."""
    place = arguments.index("trainer/csv.yaml")
    return [*arguments[: place - 1], *arguments[place + 1 :]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Stage 1, stopped and gone on with, and stage 2."""
    folder = tmp_path_factory.mktemp("wandb") / "mine"
    every = "--trainer.log_every_n_steps=1"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(folder / "none"))
        assert main(to_wandb(stage1(folder, every, steps=2))) == 0
        assert main(to_wandb(stage1(folder, every, "--ckpt_path=auto", steps=4))) == 0
        assert main(to_wandb(stage2(folder, every, steps=3))) == 0
    assert wandb.run is None, "a run ends with its stage"
    return Run(folder / "autoencoder"), Run(folder / "diffusion")


def test_both_stages_can_be_read_back(runs: tuple[Run, Run]) -> None:
    for run, stage in zip(runs, ("autoencoder", "diffusion"), strict=True):
        config = run.config
        assert config["data/init_args/size" if "data/init_args/size" in config else "data"]
        origin, made_of = config["origin"], config["made_of"]
        assert {"command", "git", "versions", "device", "processes"} <= set(origin)
        assert made_of["data_fingerprint"]
        assert "1,797 images" in made_of["data"]
        assert (run.facts[0].run_group, run.facts[0].job_type) == ("mine", stage)
        names = {name for row in run.history for name in row}
        wanted = {"train/loss", "train/lr", "train/gradient_norm", "train/ema_decay", "time/images_per_second", "time/waits_for_data"}
        assert wanted | {"memory/host_GB", "train/skipped_steps"} <= names


def test_a_resumed_run_is_one_run(runs: tuple[Run, Run]) -> None:
    one, _ = runs
    assert len(set(one.ids)) == 1
    steps = [row["trainer/global_step"] for row in one.history if "train/loss" in row]
    assert steps == sorted(steps) == list(dict.fromkeys(steps))
    assert len(steps) == 4


def test_numbers_of_latents_and_noise_levels(runs: tuple[Run, Run]) -> None:
    first, second = ({name for row in run.history for name in row} for run in runs)
    assert {f"val/latent_power_{band}" for band in range(4)} <= first
    assert {f"train/loss_level_{quarter}" for quarter in range(4)} <= second


def test_validations_have_numbers_and_pictures_with_captions(runs: tuple[Run, Run]) -> None:
    first, second = ({name: value for row in run.history for name, value in row.items() if name.startswith("val/")} for run in runs)
    assert first["val/psnr"] > 0
    assert second["val/loss"] > 0
    assert first["val/reconstructions/_type"] == "images/separated"
    assert second["val/samples/count"] == 16
    assert second["val/samples/captions"][:2] == ["seed 0, class 0", "seed 1, class 0"]
    assert second["val/trajectory/count"] == 1


def test_the_model_is_an_artifact_that_names_what_it_is_made_of(runs: tuple[Run, Run]) -> None:
    first, second = (next(one for one in run.artifacts[::-1] if not one.use_after_commit) for run in runs)
    assert (first.type, second.type) == ("model", "model")
    assert (first.name, second.name) == ("mine-autoencoder", "mine-diffusion")
    one, other = json.loads(first.metadata), json.loads(second.metadata)
    assert (one["steps"], other["steps"]) == (4, 3)
    assert one["model_fingerprint"] == other["first_stage_fingerprint"], "stage 2 names its first stage"
    assert one["data_fingerprint"] == other["data_fingerprint"]
    assert {file.path for file in second.manifest.contents} == {"config.yaml", "model.safetensors"}


def test_lineage_goes_from_the_data_over_stage_1_to_stage_2(runs: tuple[Run, Run]) -> None:
    used = [[one for one in run.artifacts if one.use_after_commit] for run in runs]
    made = [next(one for one in run.artifacts[::-1] if not one.use_after_commit) for run in runs]
    assert [[one.type for one in stage] for stage in used] == [["dataset", "dataset"], ["dataset", "model"]], "stage 1 was started twice"
    data, again, same = (one for stage in used for one in stage if one.type == "dataset")
    assert (data.name, data.digest) == (again.name, again.digest) == (same.name, same.digest)
    (first_stage,) = (one for one in used[1] if one.type == "model")
    assert (first_stage.name, first_stage.digest) == (made[0].name, made[0].digest), "stage 2 uses what stage 1 made"


def test_names_of_artifacts_are_those_that_wandb_allows(tmp_path: Path) -> None:
    folder = tmp_path / "my run é" / "autoencoder" / "model"
    model_folder.save(autoencoder(), folder, {})
    assert as_artifact(folder, {}).name == "my_run__-autoencoder"
    assert as_artifact(model_folder.find("emoji"), {}).name == "emoji"


def test_a_trial_of_a_sweep_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = yaml.safe_load((Path(__file__).parent.parent / "configs" / "sweep.yaml").read_text())
    assert sweep["command"][:2] == ["ldm", "fit"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    for trial in ("t1", "t2"):
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        arguments = stage1(tmp_path / "sweep", steps=1)
        assert main([*arguments, "--model.optimizer.lr=0.001"]) == 0
        assert f"trial {trial} of a sweep: its run is in {tmp_path / 'sweep' / trial}" in capsys.readouterr().out
        assert (tmp_path / "sweep" / trial / "autoencoder" / "model" / "config.yaml").is_file()
