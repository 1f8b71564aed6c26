"""The tools and the README's commands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import stage2

from ldm.cli import main

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_benchmark_measures_every_case(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--quick", "--json", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "ours / theirs" in result.stdout
    assert json.loads(target.read_text())


def test_digits_are_judged_by_a_classifier_that_knows_them(trained: Path, tmp_path: Path) -> None:
    assert main(["sample", str(trained / "diffusion" / "model"), "--n=10", "--steps=1", "--out", str(tmp_path)]) == 0
    command = [sys.executable, str(ROOT / "tools" / "judge_digits.py"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    accuracy = float(re.search(r"classifier: ([0-9.]+)%", said).group(1))  # type: ignore[union-attr]
    assert accuracy > 97
    assert "of 10 pictures" in said


def header_commands() -> list[list[str]]:
    lines = [path.read_text().splitlines()[0].removeprefix("# ") for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    return [shlex.split(line) for line in lines if line.startswith("ldm fit")]


@pytest.mark.parametrize("command", header_commands(), ids=lambda c: " ".join(c[1:]))
def test_the_command_at_the_head_of_a_config_is_accepted(command: list[str], photos, capsys) -> None:
    arguments = [str(photos()) if part == "PICTURES" else part for part in command[1:]]
    assert main([*arguments, "--print_config"]) == 0
    assert capsys.readouterr().out


def test_print_config_shows_the_sum_of_files_and_overrides(tmp_path: Path, capsys) -> None:
    assert main([*stage2(tmp_path), "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "channels: 16" in shown
    assert "class_path: ldm.nn.unet.UNet" in shown
