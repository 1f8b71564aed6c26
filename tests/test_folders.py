"""A folder of pictures: what is kept, merged, refused and locked, and how signals end a command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import main
from ldm.diffusion.guidance import APG, CFG, ClassifierGuidance
from ldm.diffusion.samplers import Sampler
from ldm.interfaces import Guidance
from ldm.registry import parts
from ldm.sampling.job import GRID_CELLS
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise
from ldm.sampling.settings import settings_in, settings_of, to_json


@pytest.fixture
def sample(trained: Path, tmp_path: Path):
    """`ldm sample` of the toy model into a folder; the exit status."""

    def run(*options: str, out: str = "out") -> int:
        model = str(trained / "diffusion" / "model")
        return main(["sample", model, "--steps=1", "--device=cpu", "--out", str(tmp_path / out), *options])

    return run


def strict(line: str) -> dict[str, object]:
    """JSON as every other language reads it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    found: dict[str, object] = json.loads(line, parse_constant=refuse)
    return found


def manifest(folder: Path) -> list[dict[str, object]]:
    return [strict(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_the_manifest_is_of_the_folder_not_of_the_last_command(sample, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sample("--n=3") == 0
    assert sample("--n=3", "--first=3") == 0
    assert [line["file"] for line in manifest(out)] == [f"{i}.png" for i in range(6)]
    assert main(["again", str(out / "3.png"), str(trained / "diffusion" / "model"), "--out", str(out), "--device=cpu"]) == 0
    assert sample("--n=2") == 0
    assert len(manifest(out)) == 6
    (out / "4.png").unlink()
    assert sample("--n=1") == 0
    assert [line["file"] for line in manifest(out)] == [f"{i}.png" for i in (0, 1, 2, 3, 5)]
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (2 * 34 + 2, 3 * 34 + 2), "five pictures, two in a row"


def test_the_class_of_a_picture_does_not_depend_on_how_many_are_made(sample, tmp_path: Path) -> None:
    assert sample("--n=2") == 0
    before = [(tmp_path / "out" / f"{i}.png").read_bytes() for i in range(2)]
    assert sample("--n=20") == 0
    assert [(tmp_path / "out" / f"{i}.png").read_bytes() for i in range(2)] == before
    classes = [line["condition"]["class"] for line in manifest(tmp_path / "out")]  # type: ignore[index]
    assert sorted(classes[:10]) == sorted(classes[10:]) == [str(i) for i in range(10)], "each class once in ten pictures"


def test_a_grid_has_a_limit(sample, tmp_path: Path) -> None:
    assert sample(f"--n={GRID_CELLS + 3}") == 0
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (10 * 34 + 2, 10 * 34 + 2)
    assert len(manifest(tmp_path / "out")) == GRID_CELLS + 3


def test_a_rerun_decodes_nothing_that_is_there(sample, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample("--n=3") == 0
    decoded: list[object] = []
    monkeypatch.setattr("ldm.sampling.job.OutputFolder._draw", lambda *arguments: None)
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: decoded.append(image) or load(image))
    assert sample("--n=3") == 0
    assert decoded == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.jsonl", b'{"audio": 1}\n'),
        ("manifest.jsonl", b"hello"),
        ("manifest.jsonl", b"[1]"),
        ("grid.png", b"mine"),
        ("0.png", b"mine"),
    ],
)
def test_files_of_somebody_else_are_never_overwritten(name: str, content: bytes, sample, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    assert sample("--n=2") == 1
    assert name in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_bytes() == content
    assert sample("--n=2", "--overwrite") == 0
    assert len(manifest(tmp_path / "out")) == 2


def test_a_picture_that_ends_too_early_is_made_again(sample, tmp_path: Path) -> None:
    assert sample("--n=1") == 0
    path = tmp_path / "out" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert sample("--n=1") == 1, "it may be somebody's"
    assert sample("--n=1", "--overwrite") == 0
    assert path.read_bytes() == whole


GUIDANCES = [CFG(3.0), CFG(2.0, low=0.1), APG(2.0), ClassifierGuidance("classifier")]


@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
@pytest.mark.parametrize("sampler", list(parts(Sampler, ("diffusion",)).values()), ids=lambda cls: cls.__name__)  # type: ignore[type-abstract]
def test_settings_are_strict_json(guidance: Guidance, sampler: type[Sampler]) -> None:
    config = SamplingConfig(sampler(), guidance)
    found = strict(to_json(settings_of(SampleRequest(3, SeedNoise(2**63, 3), {"class": "a"}), config, "0" * 64, {})))
    assert found["seed"] == 2**63
    assert found["condition"] == {"class": "a"}


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ldm", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_picture_in_work(number: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("sample", "emoji", "--n=400", "--steps=10", "--class=cat-face", "--device=cpu", "--out", str(out))
    deadline = time.monotonic() + 120
    while not (out / "1.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    made = len([path for path in out.glob("*.png") if path.stem.isdecimal()])
    assert process.returncode == 128 + number
    assert f"stopped, {made} of 400 pictures are in {out}; the same command makes the rest" in said
    assert 2 <= made < 400
    assert len(manifest(out)) == made


def test_two_commands_that_start_together_lose_nothing(tmp_path: Path) -> None:
    """Of two seeds the later one is refused, and no picture of the other is replaced.

    Where both write their first picture at the same moment, under different numbers, each finds one of the other: both are refused.
    """
    common = ["sample", "emoji", "--n=4", "--steps=2", "--class=cat-face", "--device=cpu", "--out", str(tmp_path / "out")]
    both = [start(*common, f"--seed={seed}") for seed in (1, 2)]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    codes = [code for _, code in ends]
    assert sorted(codes) in ([0, 1], [1, 1])
    assert all("was made with other settings" in said for said, code in ends if code == 1)
    if 0 in codes:
        assert {line["seed"] for line in manifest(tmp_path / "out")} == {codes.index(0) + 1}
    else:
        seeds = {settings_in(path)["seed"] for path in (tmp_path / "out").glob("[0-9].png")}  # type: ignore[index]
        assert seeds == {1, 2}, "each was refused for a picture of the other"


def test_bits_depend_neither_on_the_number_of_pictures_nor_on_threads(sample, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert sample("--n=1", out="one") == 0
    torch.set_num_threads(3)
    try:
        assert sample("--n=5", out="five") == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert sample("--n=5", out="again") == 0
    assert (tmp_path / "one" / "0.png").read_bytes() == (tmp_path / "five" / "0.png").read_bytes()
    for i in range(5):
        assert (tmp_path / "five" / f"{i}.png").read_bytes() == (tmp_path / "again" / f"{i}.png").read_bytes()


def test_a_folder_of_pictures_does_not_hide_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["sample", "emoji", "--n=1", "--steps=1", "--device=cpu", "--out"]
    assert main([*common, "emoji"]) == 0
    assert main([*common, "other"]) == 0
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name / "0.png")) for name in ("emoji", "other")))


def test_a_run_stands_for_the_model_below_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--n=1", "--steps=1", "--device=cpu", "--out"]
    for number, path in enumerate((trained, trained / "diffusion", trained / "diffusion" / "model")):
        assert main(["sample", str(path), *common, str(tmp_path / str(number))]) == 0
    pictures = {(tmp_path / str(number) / "0.png").read_bytes() for number in range(3)}
    assert len(pictures) == 1
    (tmp_path / "empty").mkdir()
    assert main(["sample", str(tmp_path / "empty"), *common, str(tmp_path / "x")]) == 1
    assert "no model at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"), [("preview.png", ["--preview"]), ("0.gif", ["--trajectory=2"]), ("1-steps.png", ["--trajectory=2"])]
)
def test_files_beside_the_pictures_are_not_overwritten_either(name: str, options: list[str], sample, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    assert sample("--n=2", *options) == 1
    assert f"{name} is not of ldm" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_bytes() == b"mine"
    assert not (tmp_path / "out" / "0.png").exists()
    assert sample("--n=2", *options, out="other") == 0
    assert sample("--n=3", *options, out="other") == 0, "our own are written anew"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_long_command_ends_in_order(number: int) -> None:
    process = start("likelihood", "emoji", "--images=emoji", "--n=64", "--device=cpu")
    assert process.stderr is not None
    said = ""
    while "Measuring" not in said and process.poll() is None:
        said += process.stderr.read(1)
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert rest.endswith("ldm likelihood: stopped\n")
