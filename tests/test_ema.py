"""The average of the weights (ldm/callbacks/ema.py): its closed form, when it is used, where it is kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import latent_diffusion

from ldm.callbacks.ema import CHECKPOINT_KEY as EMA_KEY
from ldm.callbacks.ema import EMA
from ldm.model_folder import CHECKPOINT_KEY, load, save

CARD = {"stage": "DiffusionStage", "classes": ["cat"], "size": 16, "steps": 3}


def stage(*values: float) -> Any:
    """A stage whose model has one trained and one frozen weight."""
    model = nn.Module()
    model.register_parameter("trained", nn.Parameter(torch.tensor(values, dtype=torch.float64)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False))
    return SimpleNamespace(model=model)


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step)


def run(ema: EMA, module: Any, weights: list[float], first: int = 1, accumulate: int = 1) -> None:
    """One optimizer step per entry of `weights`, each seen by `accumulate` batches of which only the last moves the weight."""
    for step, weight in enumerate(weights, start=first):
        for batch in range(accumulate):
            done = batch == accumulate - 1
            if done:
                module.model.trained.data.fill_(weight)
            ema.on_train_batch_end(trainer_at(step if done else step - 1), module, None, None, batch)


def closed_form(start: float, weights: list[float], decay: float) -> float:
    """w_0 prod d_k + sum_k (1 - d_k) w_k prod_{j > k} d_j with d_k = min(decay, (1 + k) / (10 + k))."""
    decays = [min(decay, (1 + k) / (10 + k)) for k in range(1, len(weights) + 1)]
    total = start * float(np.prod(decays))
    return total + sum((1 - d) * w * float(np.prod(decays[k + 1 :])) for k, (d, w) in enumerate(zip(decays, weights, strict=True)))


@settings(deadline=None, max_examples=40)
@given(
    start=st.floats(-10, 10),
    weights=st.lists(st.floats(-10, 10), min_size=1, max_size=12),
    decay=st.sampled_from([0.0, 0.2, 0.5, 0.999]),
    accumulate=st.integers(1, 4),
)
def test_ema_closed_form(start: float, weights: list[float], decay: float, accumulate: int) -> None:
    ema, module = EMA(decay), stage(start, start)
    ema.on_fit_start(trainer_at(0), module)
    assert list(ema.averaged) == ["trained"], "frozen weights are not averaged"
    assert ema.averaged["trained"].data_ptr() != module.model.trained.data_ptr()
    run(ema, module, weights, accumulate=accumulate)
    expected = closed_form(start, weights, decay)
    torch.testing.assert_close(ema.averaged["trained"], torch.full((2,), expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert torch.equal(module.model.trained.data, torch.full((2,), weights[-1], dtype=torch.float64)), "the raw weights are not touched"


def test_ema_waits_while_gradients_accumulate() -> None:
    ema, module = EMA(0.5), stage(1.0)
    ema.on_fit_start(trainer_at(0), module)
    module.model.trained.data.fill_(3.0)
    for _ in range(3):
        ema.on_train_batch_end(trainer_at(0), module, None, None, 0)
        assert ema.averaged["trained"].item() == 1.0
    ema.on_train_batch_end(trainer_at(1), module, None, None, 3)
    once = ema.averaged["trained"].item()
    assert once == pytest.approx(1.0 * 2 / 11 + 3.0 * 9 / 11, abs=1e-15)
    for _ in range(3):
        ema.on_train_batch_end(trainer_at(1), module, None, None, 0)
        assert ema.averaged["trained"].item() == once


@pytest.mark.parametrize("loop", ["validation", "test"])
def test_validation_sees_the_average_and_gives_the_weights_back(loop: str) -> None:
    ema, model = EMA(0.9), latent_diffusion()
    module = SimpleNamespace(model=model)
    ema.on_fit_start(trainer_at(0), module)
    randomise(model.denoiser, seed=1)
    ema.on_train_batch_end(trainer_at(1), module, None, None, 0)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in ema.averaged.items()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert set(averaged) == {name for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        getattr(ema, f"on_{loop}_start")(trainer_at(1), module)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averaged.get(name, raw[name])), name
        assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)
        with pytest.raises(AssertionError, match="averaged weights as raw ones"):
            ema.on_save_checkpoint(trainer_at(1), module, {})
        getattr(ema, f"on_{loop}_end")(trainer_at(1), module)
        assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in ema.averaged.items())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers, "the optimizer's tensors stay the model's"


def test_an_exception_in_validation_gives_the_weights_back() -> None:
    ema, module = EMA(0.5), stage(1.0)
    ema.on_validation_start(trainer_at(0), module)
    ema.on_validation_end(trainer_at(0), module)
    assert module.model.trained.item() == 1.0, "before training there is no average"
    ema.on_fit_start(trainer_at(0), module)
    run(ema, module, [3.0])
    average = ema.averaged["trained"].item()
    ema.on_exception(trainer_at(1), module, ValueError())
    assert module.model.trained.item() == 3.0
    ema.on_validation_start(trainer_at(1), module)
    assert module.model.trained.item() == average
    ema.on_exception(trainer_at(1), module, ValueError())
    assert (module.model.trained.item(), ema.averaged["trained"].item()) == (3.0, average)


def test_a_resumed_average_is_the_same(tmp_path: Path) -> None:
    weights = [2.0, -1.0, 0.5, 4.0]
    whole, module = EMA(0.9), stage(1.0)
    whole.on_fit_start(trainer_at(0), module)
    run(whole, module, weights)

    first, module = EMA(0.9), stage(1.0)
    first.on_fit_start(trainer_at(0), module)
    run(first, module, weights[:2])
    content: dict[str, Any] = {"global_step": 2, CHECKPOINT_KEY: {"card": CARD}}
    first.on_save_checkpoint(trainer_at(2), module, content)
    assert content[CHECKPOINT_KEY]["card"] == CARD
    torch.save(content, tmp_path / "x.ckpt")

    second, module = EMA(0.9), stage(weights[1])
    second.on_load_checkpoint(trainer_at(0), module, torch.load(tmp_path / "x.ckpt", weights_only=True))
    second.on_fit_start(trainer_at(2), module)
    run(second, module, weights[2:], first=3)
    assert torch.equal(second.averaged["trained"], whole.averaged["trained"])


def test_the_model_folder_takes_the_average(tmp_path: Path) -> None:
    ema, model = EMA(0.9), latent_diffusion()
    module = SimpleNamespace(model=model)
    ema.on_fit_start(trainer_at(0), module)
    randomise(model.denoiser, seed=1)
    ema.on_train_batch_end(trainer_at(1), module, None, None, 0)
    save(model, tmp_path, CARD, ema.averaged)
    state = load(tmp_path).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], ema.averaged.get(name, tensor)), name


def test_decays_that_cannot_be() -> None:
    for decay in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"decay is {decay}"):
            EMA(decay)
    assert EMA(0.0).decay == 0.0


def test_the_average_is_kept_where_model_folder_looks_for_it() -> None:
    assert EMA_KEY == CHECKPOINT_KEY
