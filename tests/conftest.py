"""Runs of the real commands at toy size, shared by the tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm.commands.train
from ldm.cli import main

torch.set_num_threads(1)  # as in the processes that tests start: the last bits of a sum depend on it; and the workers share the cores
CSV = ["-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml"]
QUIET = ["--trainer.enable_model_summary=false"]
TINY_AUTOENCODER = ["--model.autoencoder.channels=16", "--data.batch_size=8"]
TINY_DIFFUSION = ["--model.network.channels=16", "--model.sampling_steps=2", "--data.batch_size=8"]


LONG = ("two_processes", "what_a_page_says", "measures_every_case", "judged_by_a_classifier")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first: at the end one process would wait for another."""
    items.sort(key=lambda item: not any(name in item.name for name in LONG))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Add noise to every parameter, so that no zero initialisation hides a layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def stage1(run: Path, *extra: str, data: str = "digits", steps: int = 2, command: str = "fit") -> list[str]:
    config = ["-c", f"data/{data}.yaml", "-c", "autoencoder/digits.yaml", "--run", str(run)]
    return [
        command,
        *CSV,
        *QUIET,
        *config,
        *TINY_AUTOENCODER,
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        *extra,
    ]


def stage2(run: Path, *extra: str, data: str = "digits", steps: int = 2, command: str = "fit") -> list[str]:
    config = ["-c", f"data/{data}.yaml", "-c", "diffusion/digits.yaml", "--run", str(run)]
    return [
        command,
        *CSV,
        *QUIET,
        *config,
        *TINY_DIFFUSION,
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        *extra,
    ]


def ldm(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ldm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages on the digits, 10 steps each."""
    run = tmp_path_factory.mktemp("trained")
    assert main(stage1(run, steps=10)) == 0
    assert main(stage2(run, steps=10)) == 0
    return run


@pytest.fixture(scope="session")
def random_trunk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Weights files of torchvision's classifiers, convolutions only, with random numbers in them."""
    from torchvision import models

    folder = tmp_path_factory.mktemp("weights")

    def make(name: str) -> Path:
        path = folder / f"{name}.pth"
        if not path.is_file():
            with torch.device("meta"):
                shapes = {key: value.shape for key, value in getattr(models, name)().features.state_dict().items()}
            sizes = {key: (2 / max(1, shape[1:].numel())) ** 0.5 if len(shape) > 1 else 0.1 for key, shape in shapes.items()}
            torch.save({f"features.{key}": sizes[key] * normal(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}, path)
        return path

    return make


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """A folder of small JPEGs in two sub-folders."""

    def make(count: int = 12) -> Path:
        generator = np.random.default_rng(0)
        for i in range(count):
            folder = tmp_path / "photos" / ("cats" if i % 2 else "dogs")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        return tmp_path / "photos"

    return make
