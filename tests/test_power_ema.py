"""Averages of any length, after training."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from ldm.callbacks.power_ema import PowerEMA, combination, gamma_of, inner, reconstruct, stored


@settings(deadline=None, max_examples=50)
@given(std=st.floats(0.01, 0.28))
def test_gamma_gives_the_relative_deviation(std: float) -> None:
    gamma = gamma_of(std)
    mean = (gamma + 1) / (gamma + 2)
    variance = (gamma + 1) / (gamma + 3) - mean**2
    assert math.sqrt(variance) == pytest.approx(std, rel=1e-6)


def test_lengths_that_cannot_be() -> None:
    for std in (0.0, -0.1, 0.3):
        with pytest.raises(ValueError, match=r"less than 0\.289"):
            gamma_of(std)


def test_inner_products_by_quadrature() -> None:
    def profile(tau: float, t: float, gamma: float) -> float:
        return (gamma + 1) * tau**gamma / t ** (gamma + 1)

    t, gamma = np.array([3.0, 7.0]), np.array([2.5, 9.0])
    found = inner(t, gamma, t, gamma)
    for i in range(2):
        for j in range(2):
            expected, _ = quad(lambda tau, i=i, j=j: profile(tau, t[i], gamma[i]) * profile(tau, t[j], gamma[j]), 0, min(t[i], t[j]))
            assert found[i, j] == pytest.approx(expected, rel=1e-9)


def test_a_stored_average_is_found_again() -> None:
    steps, stds = [100, 200, 300, 100, 200, 300], [0.05] * 3 + [0.1] * 3
    for i in range(6):
        np.testing.assert_allclose(combination(steps, stds, steps[i], stds[i]), np.eye(6)[i], atol=1e-6)


def wander(steps: int) -> list[float]:
    return np.cumsum(np.random.default_rng(0).standard_normal(steps) * 0.1).tolist()


def run(tmp_path: Path, weights: list[float], stds: tuple[float, ...], every: int) -> PowerEMA:
    """The callback over a run whose one weight takes these values."""
    model = torch.nn.Linear(1, 1, bias=False)
    module: Any = SimpleNamespace(model=model)
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True)
    callback = PowerEMA(str(tmp_path), stds, every)
    callback.on_fit_start(trainer, module)
    for step, value in enumerate(weights, 1):
        model.weight.data.fill_(value)
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, 0)
    return callback


def test_the_average_has_its_profile(tmp_path: Path) -> None:
    weights = wander(400)
    callback = run(tmp_path, weights, (0.1,), 1000)
    gamma = gamma_of(0.1)
    expected = 0.0
    for step, value in enumerate(weights, 1):
        beta = (1 - 1 / step) ** (gamma + 1)
        expected = beta * expected + (1 - beta) * value
    assert float(callback.tracks[0]["weight"]) == pytest.approx(expected, rel=1e-4)
    profile = (np.arange(1, 401) / 400) ** (gamma + 1) - (np.arange(400) / 400) ** (gamma + 1)  # the integral of tau^gamma
    assert expected == pytest.approx(float(profile @ np.array(weights)), rel=1e-6)


@pytest.mark.parametrize("std", [0.04, 0.07, 0.12, 0.15])
def test_another_length_is_reconstructed(tmp_path: Path, std: float) -> None:
    weights = wander(2000)
    run(tmp_path / "stored", weights, (0.05, 0.1), 100)
    direct = run(tmp_path / "direct", weights, (std,), 5000)
    assert len(stored(tmp_path / "stored")) == 40
    found, wanted = float(reconstruct(tmp_path / "stored", [std], 2000)[0]["weight"]), float(direct.tracks[0]["weight"])
    ends = [float(average["weight"]) for average in reconstruct(tmp_path / "stored", [0.05, 0.1], 2000)]
    assert abs(found - wanted) < 0.02 * np.std(weights)
    assert abs(found - wanted) < 0.2 * min(abs(end - wanted) for end in ends), "the stored averages themselves are further off"


def test_the_end_of_a_run_and_an_earlier_step_are_found(tmp_path: Path) -> None:
    weights = wander(130)
    callback = run(tmp_path, weights, (0.05, 0.1), 40)
    assert [step for _, step, _ in stored(tmp_path)] == [40, 80, 120] * 2
    callback.on_train_end(SimpleNamespace(is_global_zero=True), None)  # type: ignore[arg-type]
    assert [step for _, step, _ in stored(tmp_path)] == [40, 80, 120, 130] * 2
    for step in (80, 130):
        direct = run(tmp_path / "direct", weights[:step], (0.1,), 5000)
        assert float(reconstruct(tmp_path, [0.1], step)[0]["weight"]) == pytest.approx(float(direct.tracks[0]["weight"]), abs=1e-3)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    weights = wander(60)
    whole = run(tmp_path, weights, (0.1,), 1000)
    first = run(tmp_path, weights[:30], (0.1,), 1000)
    checkpoint: dict[str, Any] = {"global_step": 30}
    first.on_save_checkpoint(None, None, checkpoint)  # type: ignore[arg-type]
    second = PowerEMA(str(tmp_path), (0.1,), 1000)
    second.on_load_checkpoint(None, None, checkpoint)  # type: ignore[arg-type]
    model = torch.nn.Linear(1, 1, bias=False)
    module: Any = SimpleNamespace(model=model)
    trainer: Any = SimpleNamespace(global_step=30, is_global_zero=True)
    second.on_fit_start(trainer, module)
    for step, value in enumerate(weights[30:], 31):
        model.weight.data.fill_(value)
        trainer.global_step = step
        second.on_train_batch_end(trainer, module, None, None, 0)
    assert torch.equal(second.tracks[0]["weight"], whole.tracks[0]["weight"])


def test_an_empty_folder_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train with -c trainer/power-ema\.yaml"):
        reconstruct(tmp_path, [0.1], 5)
