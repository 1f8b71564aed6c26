"""600 odd and damaged files: read with the right pixels, or named and skipped; nothing else is raised, started or written."""

import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import stage1
from torch import Tensor

from ldm.cli import main
from ldm.data.images import SourceImages, open_images
from ldm.data.inspect import inspect
from ldm.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from odd_files import Odd, build
from odd_files_kinds import deep


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Odd]]:
    folder = tmp_path_factory.mktemp("odd") / "set"
    return folder, build(folder)


@pytest.fixture(autouse=True)
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ghostscript that leaves a trace."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("gs", "gswin64c"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {folder}/STARTED\n")
        (folder / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    yield
    assert not (folder / "STARTED").exists(), "a picture started a program"


def wrong(odd: Odd, pixels: Tensor) -> list[str]:
    """Where the colours are not the expected ones."""
    found = []
    for x, y, colour, tolerance in odd.pixels:
        got = pixels[:, int(y * pixels.shape[1]), int(x * pixels.shape[2])].int().tolist()
        if max(abs(a - b) for a, b in zip(got, colour, strict=True)) > tolerance:
            found.append(f"{odd.name!r} at {x}, {y} is {got}, expected {colour}")
    return found


def check(images: SourceImages, files: dict[str, Odd]) -> list[str]:
    """What is not as expected."""
    faults, seen = [], set[str]()
    for index in range(len(images)):
        odd = files[images.name(index)]
        seen.add(odd.name)
        try:
            pixels = images.pixels(index)
        except UserError as error:
            if odd.want == "right" or (Path(odd.name).name not in str(error) and repr(Path(odd.name).name)[1:-1] not in str(error)):
                faults.append(f"{odd.name!r} ({odd.kind}) is refused: {error}")
            continue
        if odd.want in ("skipped", "left out"):
            faults.append(f"{odd.name!r} ({odd.kind}) is read, expected: {odd.want}")
        faults += wrong(odd, pixels)
    faults += [f"{odd.name!r} ({odd.kind}) is not there" for odd in files.values() if odd.want == "right" and odd.name not in seen]
    return faults


def test_every_odd_file_is_read_right_or_named(corpus: tuple[Path, dict[str, Odd]]) -> None:
    folder, files = corpus
    assert len(files) >= 500
    assert len({odd.kind for odd in files.values()}) >= 100
    images = open_images(str(folder), 64)
    assert isinstance(images, SourceImages)
    assert check(images, files) == []
    left_out = {reason: count.number for reason, count in images.report.left_out.items()}
    assert left_out == {"hidden": 6, "no file": 2, "broken link": 3, "link in a circle": 1}


@pytest.mark.parametrize("name", sorted({odd.name.split("/")[0] for odd in deep()}))
def test_one_range_for_all_deep_pictures_of_a_set(name: str, tmp_path: Path) -> None:
    files = {odd.name.split("/")[1]: odd for odd in deep() if odd.name.startswith(f"{name}/")}
    for file, odd in files.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / file).write_bytes(odd.content)
    images = open_images(str(tmp_path / "set"), 64)
    assert isinstance(images, SourceImages)
    assert check(images, {file: Odd(file, odd.kind, odd.want, pixels=odd.pixels) for file, odd in files.items()}) == []


SOME = (
    "cut/jpg5.jpg",
    "cut/png3.png",
    "wrong/ps.jpg",
    "wrong/html.jpg",
    "shape/header.png",
    "shape/bomb.gif",
    "exif/damaged3.png",
    "text/workflow.png",
)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_ends_no_training(
    workers: int, corpus: tuple[Path, dict[str, Odd]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = corpus[1]
    chosen = [name for name, odd in files.items() if name in SOME or name.startswith(("good/", "mode/"))]
    for name in chosen:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(files[name].content)
    data = ["--data.path", str(tmp_path / "set"), "--data.size=32", "--data.max_damaged=1000", f"--data.num_workers={workers}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(stage1(tmp_path / "run", *data, data="folder", steps=8)) == 0
        told = capsys.readouterr()
        assert "images in a folder" in told.out
        assert main(stage1(tmp_path / "other", *data[:-2], "--data.max_damaged=0", data[-1], data="folder", steps=8)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be read, more than data.max_damaged = 0 allows" in error
    assert "Traceback" not in error
    assert "Worker" not in error


def test_a_process_of_the_loader_says_what_is_wrong_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{number}.png").write_bytes(b"no picture")
    data = ["--data.path", str(tmp_path / "set"), "--data.size=32", "--data.num_workers=1"]
    assert main(stage1(tmp_path / "run", *data, data="folder")) == 1
    error = capsys.readouterr().err
    assert re.search(r"ldm fit: none of \d images in a row can be read, the first is \d.png \(.*\): check the data$", error, re.MULTILINE)
    assert "DataLoader worker" not in error


def test_the_other_commands_name_what_they_cannot_read(
    corpus: tuple[Path, dict[str, Odd]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, files = corpus
    facts = inspect(str(folder), 16)
    assert set(facts["damaged"]) >= {odd.name for odd in files.values() if odd.want == "skipped"}
    assert set(facts["damaged"]) <= {odd.name for odd in files.values() if odd.want in ("skipped", "any")}
    assert facts["duplicates"]["exact"] > 20
    assert (
        main(["evaluate", "--images", str(folder / "wrong"), "--reference", str(folder / "mode"), "--size", "16", "--device", "cpu"]) == 0
    )
    told = capsys.readouterr().err
    assert "left out an image that cannot be read: html.jpg" in told
    assert "images were left out" in told
    for name in SOME[:6]:
        command = [
            "sample",
            "emoji",
            "--image",
            str(folder / name),
            "--strength=0.5",
            "--steps=2",
            "--n=1",
            "--device=cpu",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(command) == 1
        assert Path(name).name in capsys.readouterr().err


@pytest.mark.slow
def test_very_large_pictures(tmp_path: Path) -> None:
    files = build(tmp_path / "set", huge=True)
    large = {name: odd for name, odd in files.items() if name.startswith("shape/")}
    images = open_images(str(tmp_path / "set" / "shape"), 64)
    assert isinstance(images, SourceImages)
    assert (
        check(images, {Path(name).name: Odd(Path(name).name, odd.kind, odd.want, pixels=odd.pixels) for name, odd in large.items()}) == []
    )
