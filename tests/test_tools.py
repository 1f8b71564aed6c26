"""The tools and the README's commands."""

import json
import re
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


@pytest.mark.slow
def test_what_is_killed_signalled_or_starved_goes_on(tmp_path: Path) -> None:
    """A few tries of each kind; two ranks of which one has a fault are the fifth of --ranks."""
    few = ["--kills=3", "--signals=4", "--disk=2", "--twice=0", "--ranks=5", "--only", "stage1", "encode"]
    command = [sys.executable, str(ROOT / "tools" / "crash_campaign.py"), "--out", str(tmp_path), *few]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "two ranks, a fault of the second | 1 | 0 |" in result.stdout


def test_digits_are_judged_by_a_classifier_that_knows_them(trained: Path, tmp_path: Path) -> None:
    assert main(["sample", str(trained / "diffusion" / "model"), "--n=10", "--steps=1", "--out", str(tmp_path)]) == 0
    command = [sys.executable, str(ROOT / "tools" / "judge_digits.py"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    accuracy = float(re.search(r"classifier: ([0-9.]+)%", said).group(1))  # type: ignore[union-attr]
    assert accuracy > 97
    assert "of 10 pictures" in said


def test_print_config_shows_the_sum_of_files_and_overrides(tmp_path: Path, capsys) -> None:
    assert main([*stage2(tmp_path), "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "channels: 16" in shown
    assert "class_path: ldm.nn.unet.UNet" in shown
