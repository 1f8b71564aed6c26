"""Every stage, conditioner, objective, sampler and task on a pretended GPU (tests/gpu): no device error, and no wait for the device."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu" / "cases.py"
CAN = shutil.which("cc") and torch.backends.cuda.is_built()
pytestmark = pytest.mark.skipif(not CAN, reason="a pretended GPU needs a C compiler (cc) and a CUDA build of torch")
WAITS_OF_A_STEP, WAITS_OF_A_CHUNK = 0, 1  # of ours; Lightning's own and the final copy of the pictures come on top


@pytest.mark.parametrize("group", ["first_stage", "objectives", "conditioners", "sampling", "commands"])
def test_on_a_pretended_gpu(group: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, str(SCRIPT), group, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())
    failed = {name: one["error"] or done.stderr[-2000:] for name, one in results.items() if one["status"]}
    assert not failed, json.dumps(failed, indent=1)
    for what, most in (("steps", WAITS_OF_A_STEP), ("chunks", WAITS_OF_A_CHUNK)):
        slow = {name: one[what] for name, one in results.items() if any(sum(each.values()) > most for each in one[what])}
        assert not slow, json.dumps(slow, indent=1)
    if group in ("first_stage", "objectives", "conditioners"):
        assert any(one["steps"] for one in results.values()), "steps were counted"


def test_the_first_day_on_a_gpu(tmp_path: Path) -> None:
    tool = Path(__file__).parents[1] / "tools" / "gpu_first_day.py"
    arguments = [
        str(tool),
        "--out",
        str(tmp_path),
        "--tiny",
        "--no-compile",
        "--presets",
        "autoencoder/kl-f8.yaml",
        "diffusion/unet-f8.yaml",
    ]
    for script in ([str(SCRIPT.with_name("pretend.py"))], []):
        done = subprocess.run([sys.executable, *script, *arguments], capture_output=True, text=True)
        results = json.loads((tmp_path / "results.json").read_text())
        assert done.returncode == 0, done.stderr[-3000:]
        assert results["device"] == ("Pretended GPU" if script else "cpu")
        assert results["correct"]["32-true"]["differences"]["network"] < 1e-5
        assert "| `diffusion/unet-f8.yaml` | 2 | all kept |" in (tmp_path / "table.md").read_text()


def test_the_cost_of_a_convolution_is_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from presets import PER_PARAMETER, cost

    def make(batch: int) -> Any:
        conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        x = torch.randn(batch, 8, 10, 10)
        return conv, lambda: conv(x).float().square().mean()

    found = cost(make)
    assert found.parameters == 16 * 8 * 9 + 16
    assert found.flops == 2 * 2 * 100 * 16 * 8 * 9, "forward and by the weight; the image needs no gradient"
    assert found.activations == 2 * 8 * 100 + 4 * 16 * 100, "the image in bf16, and the result in fp32, which its square keeps"
    memory = PER_PARAMETER * found.parameters / 0.9 + 10.5 * found.activations / 0.9
    assert found.batch(memory) == 10
