"""ldm train: what it chooses, that it goes on, what it refuses, and its report."""

import json
import re
import shlex
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ldm.commands.auto as auto
from ldm import model_folder
from ldm.auto import choose as choosing
from ldm.auto import report
from ldm.auto.choose import Candidate, choose
from ldm.auto.plan import (
    FIRST_BATCH,
    SECOND_BATCH,
    SIZES,
    START,
    Facts,
    Machine,
    Plan,
    Shape,
    Speed,
    after_first,
    described,
    from_data,
    plan,
)
from ldm.auto.speed import machine, measure
from ldm.callbacks.loggers import CSVLog
from ldm.cli import main
from ldm.commands.train import parse
from ldm.console.configs import find_configs
from ldm.errors import UserError

FACTS = Facts("pictures", 1000, 3, False, 3, 200.0, ("1,000 images",))
CPU, GPUS = Machine("cpu", 1, 2, 24 * 2**30), Machine("cuda", 8, 64, 80 * 2**30)


def speed(shape: Shape, fast: float = 1.0) -> Speed:
    """As the area of the pictures and of the latents."""
    return Speed(0.1 * (shape.size / 64) ** 2 / fast, 0.2 * (shape.side / 16) ** 2 / fast, 0.002 / fast)


@settings(deadline=None, max_examples=80)
@given(
    hours=st.floats(0.06, 200), fast=st.floats(0.5, 500), side=st.floats(32, 2000), images=st.integers(20, 10**6), gpus=st.booleans(),
)  # fmt: skip
def test_a_plan_keeps_to_the_time_and_to_the_pictures(hours: float, fast: float, side: float, images: int, gpus: bool) -> None:
    facts, where = replace(FACTS, side=side, images=images), GPUS if gpus else CPU
    with suppress(UserError):  # where the time is too short for a few steps
        found = plan(facts, where, lambda shape: speed(shape, fast), hours)
        check(found, side, hours, gpus)
        longer = plan(facts, where, lambda shape: speed(shape, fast), 2 * hours)
        assert longer.shape.size >= found.shape.size


def check(found: Plan, side: float, hours: float, gpus: bool) -> None:
    assert sum(found.seconds) <= hours * 3600
    assert found.shape.size <= side * 1.1
    assert found.shape.size in SIZES
    assert from_data(json.loads(json.dumps(asdict(found)))) == found
    first, second = found.fit("runs/x").values()
    assert first[0] == second[0] == "fit"
    assert ("trainer/gpu.yaml" in first) == gpus


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("where", [CPU, GPUS], ids=["cpu", "gpus"])
def test_the_commands_of_every_size_are_commands_of_ldm(size: int, where: Machine, tmp_path: Path) -> None:
    pictures(tmp_path / "in", side=16)
    facts = replace(FACTS, path=str(tmp_path / "in"), side=float(size))
    found = plan(facts, where, lambda shape: speed(shape, 1e4), 1000.0)
    assert found.shape.size == size
    arguments = found.fit(str(tmp_path / "run"))["autoencoder"][1:]
    model = parse(find_configs(arguments if where is CPU else _on_cpu(arguments))).model.model
    assert model.factor == found.shape.factor
    assert ("Shifted" in found.fit("x")["diffusion"]) == (found.shape.side > 32)
    assert len(described(found)) == 2


def _on_cpu(arguments: list[str]) -> list[str]:
    position = arguments.index("trainer/gpu.yaml")
    return [*arguments[: position - 1], *arguments[position + 1 :]]


@given(slower=st.floats(0.2, 3), beside=st.floats(0.5, 2))
def test_when_the_machine_is_slower_stage_2_has_fewer_steps(slower: float, beside: float) -> None:
    """slower: than it was measured at first; beside: times its steps' own time that stage 1 took."""
    found = plan(FACTS, CPU, lambda shape: speed(shape, 20), 0.5)
    now = Speed(slower * found.speed.first, slower * found.speed.second, slower * found.speed.call)
    stage = START + beside * found.first_steps * max(found.speed.first, now.first)
    later = after_first(found, min(stage, 800.0), stage, now)
    each = min(1.5, max(1.0, beside)) * now.second
    rest = later.hours * 3600 - later.second_steps * each - min(stage, 800.0)
    assert 0 < rest < 0.25 * later.hours * 3600 + slower * 90, "what is left is for encoding, choosing and showing"
    assert (later.first_steps, later.shape, later.speed) == (found.first_steps, found.shape, now)
    assert after_first(found, 1800.0, stage, now).second_steps == 5


def test_without_hours_a_sensible_time_is_taken() -> None:
    found = plan(FACTS, CPU, speed)
    assert found.shape.size == 64
    assert 0.05 <= found.hours <= 48
    assert found.second_steps * SECOND_BATCH == pytest.approx(400_000, rel=0.2)
    few = plan(replace(FACTS, images=20), CPU, speed)
    assert few.second_steps * SECOND_BATCH <= 1.3 * 1500 * 20, "a small set is not passed through for ever"
    assert FIRST_BATCH <= SECOND_BATCH


@pytest.mark.parametrize(
    ("changes", "hours", "sentence"),
    [
        ({}, 0.001, "--hours is 0.001; allowed is 0.05 or more"),
        ({"side": 5.0}, 1.0, "a median of 5 px; at least 8"),
        ({}, 0.05, "give more --hours"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict, hours: float, sentence: str) -> None:
    slow = 1.0 if hours != 0.05 else 0.01
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan(replace(FACTS, **changes), CPU, lambda shape: speed(shape, slow), hours)


def test_the_speed_of_this_machine_is_measured() -> None:
    found = measure(replace(machine(), device="cpu"), Shape(16, 3, 4, (1,), 32))
    assert 0 < found.call < found.second
    assert found.first > 0


def pictures(folder: Path, count: int = 12, side: int = 40, names: tuple[str, ...] = ("cats", "dogs")) -> Path:
    for i in range(count):
        path = folder / names[i % len(names)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each stage, on a machine whose speed is known."""
    monkeypatch.setenv("LDM_SHORTEN", "2")
    monkeypatch.setattr(auto, "measure", lambda where, shape, least: speed(shape, 100.0))
    monkeypatch.setattr(auto, "machine", lambda: CPU)


def test_one_command_trains_goes_on_and_reports(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run = pictures(tmp_path / "in", names=("cats", "<b>dogs")), tmp_path / "run"
    command = ["train", str(source), "--hours", "0.1", "--run", str(run)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "12 images in a folder" in said
    assert "trains 0.1 hours on 2 cores" in said
    assert "the same by hand:\nldm fit -c trainer/cpu.yaml -c data/folder.yaml -c autoencoder/emoji.yaml" in said
    assert (run / "samples.png").is_file()
    card = model_folder.load(run).card
    assert model_folder.find(run) == run / "model"
    assert card["sampling"]["guidance"]["init_args"]["scale"] == card["chosen"]["scale"]
    page = (run / "report.html").read_text()
    assert "<b>dogs" not in page, "names are escaped"
    assert "&lt;b&gt;dogs" in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", ""), "it asks nobody for anything"
    assert main(["sample", str(run), "--n=1", "--steps=2", "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in said.split("the same by hand:")[1].splitlines() if line.startswith("ldm ")]
    assert [line.split()[1] for line in lines] == ["fit", "fit", "sample"]
    for line, stage in zip(lines, ("autoencoder", "diffusion"), strict=False):
        assert main([word.replace(str(run), str(tmp_path / "hand")) for word in shlex.split(line)[1:]]) == 0
        one, other = ((root / stage / "model" / "model.safetensors").read_bytes() for root in (run, tmp_path / "hand"))
        assert one == other, "it prints other commands than those that it ran"
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("is trained already") == 2
    for name in ("config.yaml", "model.safetensors"):  # as if it had been stopped in stage 2
        (run / "diffusion" / "model" / name).unlink()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("is trained already") == 1
    assert f"goes on in {run}" in said
    assert main(["train", str(pictures(tmp_path / "other")), "--run", str(run)]) == 1
    assert f"is a training on '{source}'" in capsys.readouterr().err
    assert main([*command[:2], "--hours", "3", "--run", str(run)]) == 1
    assert "was begun with --hours 0.1: leave --hours out to go on" in capsys.readouterr().err
    (run / "train.json").unlink()
    assert main(command) == 1
    assert "choose another --run, or give --overwrite" in capsys.readouterr().err


def test_what_is_no_set_of_pictures_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "nowhere"), "--run", str(run)]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["train", str(pictures(tmp_path / "in")), "--text-encoder", "x", "--run", str(run)]) == 1
    assert "the images have no captions" in capsys.readouterr().err
    assert main(["train"]) == 1
    assert "path is missing" in capsys.readouterr().err
    assert not run.exists()


def test_the_checkpoint_and_the_guidance_of_the_least_distance_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Fake:
        class network:
            name = "toy"

        def distance(self, loaded: str, scale: float, count: int) -> float:
            asked.append((loaded, scale))
            return {"last": 10.0, "best": 8.0}[loaded] + (scale - 1.5) ** 2

    monkeypatch.setattr(choosing.model_folder, "load", lambda path: path)
    found = choose(Fake(), ["last", "best"], 9, True, lambda line: None)  # type: ignore[arg-type]
    assert found[0] == Candidate("best", 1.5, 8.0)
    assert len(asked) == len(set(asked)) == 4, "the second checkpoint with the best guidance of the first alone"
    assert len(choose(Fake(), ["last"], 9, False, lambda line: None)) == 1  # type: ignore[arg-type]


def test_curves_of_a_run_that_was_started_twice(tmp_path: Path) -> None:
    (tmp_path / "diffusion" / "logs").mkdir(parents=True)
    (tmp_path / "diffusion" / "logs" / "metrics.csv").write_text("step,train/loss\n0,1.0\n10,0.5\n")
    log = CSVLog(str(tmp_path / "diffusion"))
    log.begin(10)  # from a checkpoint of step 10
    log.log_metrics({"train/loss": 0.4}, 10)
    log.log_metrics({"train/loss": 0.2, "val/loss": 0.3}, 20)
    log.save()
    (curve,) = report.curves(tmp_path / "diffusion")
    assert (curve.name, curve.last, curve.low, curve.high) == ("diffusion: train/loss", 20, "0.2", "1")
    assert curve.points == "60.0,10.0 235.0,145.0 410.0,190.0"


def test_a_plan_says_what_it_is_told() -> None:
    found = Plan(FACTS, CPU, Shape(64, 3, 4, (1,), 64), Speed(0.1, 0.2, 0.01), 1.0, 100, 200, "encoder")
    assert "told the captions" in described(found)[1]
    assert "--model.conditioner" in found.fit("x")["diffusion"]
