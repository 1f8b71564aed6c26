"""The training of stage 1 in memory: what each optimizer step changes, and what it must leave alone."""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import normal
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.autoencoder.adversary import PatchDiscriminator, PatchGAN
from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.callbacks.compile import Compile
from ldm.callbacks.finite import SkipNonFinite
from ldm.data.module import Loader
from ldm.draws import Draws
from ldm.interfaces import AutoencoderLoss, Batch, Discriminator, TrainingData
from ldm.stages.autoencoder import AutoencoderStage
from ldm.stages.optim import AdamW, Part, configure
from ldm.stages.training import seeds_of

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Batches(L.LightningDataModule, TrainingData):
    """These, as the loader gives them."""

    classes, size, channels, has_texts = [], 16, 3, False

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def cache_latents(self, moments: Callable[[Tensor], Tensor], key: str, device: torch.device) -> None:
        raise AssertionError("stage 1 has no latents to cache")

    def rank_batches(self) -> Iterator[Batch]:
        return iter(self.batches)


def fit(module: L.LightningModule, batches: list[Any], *callbacks: L.Callback, ckpt_path: str | None = None, **options: Any) -> L.Trainer:
    """One pass over the batches, and one log entry per step."""
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "log_every_n_steps": 1, "callbacks": list(callbacks), **options})
    trainer.fit(module, datamodule=Batches(batches), ckpt_path=ckpt_path)
    return trainer


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Each(L.Callback):
    """Keeps what `look` sees after each batch."""

    def __init__(self, look: Callable[[L.Trainer], Any]) -> None:
        self.look, self.seen = look, list[Any]()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(self.look(trainer))


class Counting(Discriminator):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network, self.calls = PatchDiscriminator(8, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x)


def toy(**options: Any) -> AutoencoderStage:
    torch.manual_seed(0)
    return AutoencoderStage(ConvAutoencoder(KL(2), 8, (1,), 1, patch=4), optimizer=AdamW(lr=1e-3, warmup=0), **options)


def pictures(count: int) -> list[dict[str, Tensor]]:
    return [{"image": (normal(2, 3, 16, 16, seed=seed) * 64 + 128).clamp(0, 255).to(torch.uint8)} for seed in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# The reconstruction loss
# ---------------------------------------------------------------------------------------------------------------------


class Twice(AutoencoderLoss):
    name, weight = "twice", 0.3

    def forward(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        return (2 * (x - reconstruction)).square().flatten(1).sum(1)


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_the_reconstruction_loss_and_its_gradients(reconstruction: str) -> None:
    stage = toy(reconstruction=reconstruction, learn_variance=True, losses=[Twice()]).double()
    s = nn.init.constant_(stage.log_variance, 0.3)
    x = normal(2, 3, 2, 2).double()
    y = (x + normal(2, 3, 2, 2, seed=1).sign() * (0.1 + normal(2, 3, 2, 2, seed=2).abs())).requires_grad_()  # away from |0|
    loss, logs = stage.reconstruction_loss(x, y)
    difference = (x - y).detach()
    error = (difference.abs() if reconstruction == "l1" else difference.square()).mean()
    total = error + 0.3 * 4 * difference.square().sum() / 2
    torch.testing.assert_close(logs["reconstruction"].detach(), error, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.detach(), total / math.exp(0.3) + 0.3, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(slope, 1 - total / math.exp(0.3), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda z: stage.reconstruction_loss(x, z)[0], y)


def test_the_variance_is_learned_only_if_asked_for() -> None:
    for learn in (False, True):
        stage = toy(learn_variance=learn)
        fit(stage, pictures(2))
        assert bool(stage.log_variance == 0) != learn


# ---------------------------------------------------------------------------------------------------------------------
# The adversary
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_before_its_start_the_adversary_costs_and_changes_nothing(accumulate: int) -> None:
    discriminator, start, steps = Counting(), 2, 4
    before = snapshot(discriminator)

    def look(trainer: L.Trainer) -> tuple[int, int, bool, bool, dict[str, Tensor]]:
        known = any(parameter in trainer.optimizers[0].state for parameter in discriminator.parameters())
        return trainer.global_step, discriminator.calls, known, same(snapshot(discriminator), before), snapshot(stage.model)

    each, stage = Each(look), toy(adversary=PatchGAN(discriminator, start=start))
    fit(stage, pictures(steps * accumulate), each, accumulate_grad_batches=accumulate)
    assert len(each.seen) == steps * accumulate
    for batch, (global_step, calls, known, unchanged, _) in enumerate(each.seen):
        assert global_step == (batch + 1) // accumulate, "a step of both networks is one step"
        assert calls == 1 + 3 * max(0, batch + 1 - start * accumulate), "the check, then real, fake, and fake for the generator"
        assert known == (global_step > start)
        assert unchanged == (global_step <= start)
    alone = toy()
    fit(alone, pictures(start * accumulate), accumulate_grad_batches=accumulate)
    assert same(each.seen[start * accumulate - 1][-1], snapshot(alone.model))
    assert not same(each.seen[-1][-1], snapshot(alone.model))


class Loud(PatchGAN):
    def discriminator_loss(self, x: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = super().discriminator_loss(x, reconstruction)
        return 1e6 * loss, logs


def test_a_large_gradient_of_the_discriminator_does_not_shrink_the_generator_s() -> None:
    ends = []
    for cls in (PatchGAN, Loud):
        stage = toy(adversary=cls(Counting()))
        fit(stage, pictures(1), gradient_clip_val=0.01)
        ends.append(snapshot(stage.model))
    assert same(*ends)


def test_gradients_are_clipped_at_their_own_size_not_at_that_of_a_loss_scaler() -> None:
    ends = []
    for limit in (None, 100.0):
        stage, scaler = toy(), torch.amp.GradScaler("cpu", init_scale=2.0**16)
        fit(stage, pictures(2), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=limit)
        ends.append(snapshot(stage.model))
    assert not same(ends[0], snapshot(toy().model)), "no step was made"
    assert same(*ends), "gradients far below 100 were clipped"


def test_each_group_is_clipped_by_itself() -> None:
    a, b, unused = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    optimizer = configure([Part([a], AdamW()), Part([b, unused], AdamW())], -1)["optimizer"]
    stage = toy()
    stage._trainer = SimpleNamespace(precision_plugin=SimpleNamespace())  # type: ignore[assignment]
    small, large = torch.tensor([0.3, -0.4, 0.0, 0.0]), torch.tensor([3e6, 4e6, 0.0, 0.0])
    for value, algorithm, wanted in (
        (1.0, "norm", (small, large / 5e6)),
        (0.1, "norm", (small / 5, large / 5e7)),
        (0.35, "value", (torch.tensor([0.3, -0.35, 0.0, 0.0]), torch.tensor([0.35, 0.35, 0.0, 0.0]))),
        (None, None, (small, large)),
    ):
        a.grad, b.grad = small.clone(), large.clone()
        stage.configure_gradient_clipping(optimizer, value, algorithm)
        torch.testing.assert_close(a.grad, wanted[0], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(b.grad, wanted[1], rtol=1e-5, atol=1e-9)
        assert unused.grad is None


def test_batch_norm_on_several_devices_has_to_be_synchronised() -> None:
    for norm, world_size, refused in (("batch", 2, True), ("batch", 1, False), ("group", 2, False)):
        stage = toy(adversary=PatchGAN(PatchDiscriminator(8, 1, norm)))  # type: ignore[arg-type]
        stage._trainer = SimpleNamespace(world_size=world_size)  # type: ignore[assignment]
        if refused:
            with pytest.raises(ValueError, match=r"batch norm needs --trainer\.sync_batchnorm true"):
                stage.on_fit_start()
        else:
            stage.on_fit_start()


# ---------------------------------------------------------------------------------------------------------------------
# Freezing
# ---------------------------------------------------------------------------------------------------------------------


def test_with_a_frozen_encoder_the_decoder_is_trained_alone() -> None:
    stage = toy(freeze=["encoder", "quant_conv"])
    before = snapshot(stage.model)
    fit(stage, pictures(2))
    changed = {name for name, tensor in stage.model.state_dict().items() if not torch.equal(tensor, before[name])}
    decoder = {name for name in before if name.startswith(("decoder", "post_quant_conv"))}
    assert changed == decoder
    assert before.keys() - changed == {name for name in before if name.startswith(("encoder", "quant_conv"))}


def test_a_name_to_freeze_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"freeze has 'nothing', .* they begin with encoder, quant_conv, post_quant_conv, decoder"):
        toy(freeze=["encoder", "nothing"])


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates
# ---------------------------------------------------------------------------------------------------------------------


def test_each_part_has_its_own_settings_and_warms_up_from_its_own_start() -> None:
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    generator = AdamW(lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1, warmup=4, decay="cosine")
    made = configure([Part([a], generator), Part([b], AdamW(lr=1e-3, betas=(0.0, 0.99), warmup=2), start=3)], max_steps=10)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    assert [group["params"] for group in optimizer.param_groups] == [[a], [b]]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.9), (0.0, 0.99)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for step in range(11):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[0] == pytest.approx(1e-2 * min(1, (step + 1) / 4) * (1 + math.cos(math.pi * step / 10)) / 2, abs=1e-18)
        if step >= 3:
            assert rates[1] == pytest.approx(1e-3 * min(1, (step - 3 + 1) / 2), abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_a_cosine_from_a_start_ends_at_the_last_step() -> None:
    part = Part([], AdamW(warmup=0, decay="cosine"), start=4)
    assert [part.factor(step, 10) for step in (4, 7, 10)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-15)


@pytest.mark.parametrize("start", [9, 10, 50_001])
def test_a_part_that_would_start_after_the_last_step_is_no_error(start: int) -> None:
    made = configure([Part([nn.Parameter(torch.zeros(1))], AdamW(decay="cosine"), start)], max_steps=10)
    assert made["optimizer"].param_groups[0]["lr"] > 0


def test_a_cosine_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs trainer.max_steps"):
        configure([Part([], AdamW()), Part([], AdamW(decay="cosine"))], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are left out
# ---------------------------------------------------------------------------------------------------------------------


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (batch @ self.weight - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return configure([Part(self.parameters(), AdamW(lr=0.1, warmup=0, weight_decay=0.1))], -1)


def moving(trainer: L.Trainer) -> dict[str, Tensor]:
    """The weights and Adam's state."""
    (state,) = trainer.optimizers[0].state.values()
    return {name: tensor.detach().clone() for name, tensor in {"weight": trainer.lightning_module.weight, **state}.items()}


def sequence(pattern: str, bad: float = math.nan) -> list[Tensor]:
    """A batch per letter: g is good, b is not finite."""
    good = (normal(4, 3, seed=seed) for seed in itertools.count())
    return [next(good) if letter == "g" else torch.full((4, 3), bad) for letter in pattern]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("pattern", ["ggbg", "bgbbg"])
def test_a_step_that_is_not_finite_is_as_if_it_had_never_been(pattern: str, bad: float) -> None:
    each, without, skip = Each(moving), Each(moving), SkipNonFinite()
    fit(Line(), sequence(pattern, bad), skip, each)
    fit(Line(), sequence("g" * pattern.count("g")), without)
    for position, state in enumerate(each.seen):
        good = pattern[: position + 1].count("g")
        if good:
            assert same(state, without.seen[good - 1])
        else:
            assert torch.equal(state["weight"], Line().weight)
            assert float(state["step"]) == 0
    assert skip.state_dict()["counts"][:2] == [pattern.count("b"), 0]


def test_too_many_steps_in_a_row_end_the_run() -> None:
    with pytest.raises(ValueError, match="3 steps in a row up to step 5 had gradients that are not finite and were skipped"):
        fit(Line(), sequence("bgbbbgg"), SkipNonFinite(limit=3))
    skip = SkipNonFinite(limit=3)
    fit(Line(), sequence("bbgbbgbb"), skip)
    assert skip.state_dict() == {"counts": [6, 2, 2]}
    with pytest.raises(ValueError, match="limit is 0; allowed is 1 or more"):
        SkipNonFinite(limit=0)


def test_too_many_steps_in_a_row_are_noticed_between_log_entries() -> None:
    with pytest.raises(ValueError, match="3 steps in a row"):
        fit(Line(), sequence("ggbbbggggggg"), SkipNonFinite(limit=3), log_every_n_steps=10)


def test_the_count_of_skipped_steps_survives_a_checkpoint(tmp_path) -> None:
    first = fit(Line(), sequence("gbb"), SkipNonFinite())
    first.save_checkpoint(tmp_path / "x.ckpt")
    assert {"counts": [2, 2, 2]} in torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"].values()
    skip = SkipNonFinite()
    fit(Line(), sequence("bgb"), skip, ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)
    assert skip.state_dict() == {"counts": [4, 1, 3]}
    with pytest.raises(ValueError, match="3 steps in a row"):
        fit(Line(), sequence("bgg"), SkipNonFinite(limit=3), ckpt_path=str(tmp_path / "x.ckpt"), max_epochs=2)


def test_the_adversarial_loss_has_the_gradients_of_its_formula_in_one_pass() -> None:
    torch.manual_seed(0)
    autoencoder = ConvAutoencoder(KL(2), channels=8, multipliers=(1,))
    adversary = PatchGAN(PatchDiscriminator(8, 1), weight=0.5)
    stage = AutoencoderStage(autoencoder, adversary=adversary, learn_variance=True).double()
    nn.init.normal_(stage.log_variance)
    x = normal(2, 3, 16, 16).double()

    def losses() -> tuple[Tensor, Tensor]:
        reconstruction = autoencoder(x, torch.zeros_like).x
        return reconstruction, stage.reconstruction_loss(x, reconstruction)[0]

    learned = [*autoencoder.decoder.parameters(), stage.log_variance, *adversary.parameters()]
    reconstruction, loss = losses()
    logs: dict[str, Tensor] = {}
    total = stage._with_adversary(x, reconstruction, loss, logs)
    found = torch.autograd.grad(total, learned, allow_unused=True)
    reconstruction, loss = losses()
    told_apart, _ = adversary.discriminator_loss(x, reconstruction)
    formula = loss + logs["d_weight"] * adversary.generator_loss(reconstruction) + told_apart
    torch.testing.assert_close(total, formula, rtol=1e-12, atol=0)
    for a, b in zip(found, torch.autograd.grad(formula, learned, allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_figures_of_stage_1_do_not_depend_on_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = AutoencoderStage(ConvAutoencoder(KL(2), channels=8, multipliers=(1,)))
    monkeypatch.setattr(stage, "log", lambda *_, **__: None)
    monkeypatch.setattr(stage, "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(stage.model, "decode", lambda z: 0.9 * image + 0.02)
    image, found = 0.05 * normal(2, 3, 32, 32), []
    for half in (False, True):
        stage.ssim.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            stage.validation_step({"id": ["a", "b"], "image": image}, 0)
        found.append(float(stage.ssim.compute()))
    assert found[0] == found[1], "a filter in half precision loses E[x^2] - E[x]^2"


@given(
    planned=st.lists(st.sampled_from([None, (3,), (2, 2)]), max_size=5),
    asked=st.lists(st.sampled_from([None, (3,), (2, 2)]), max_size=5),
)
def test_numbers_made_beforehand_are_those_that_are_asked_for(
    planned: list[tuple[int, ...] | None], asked: list[tuple[int, ...] | None]
) -> None:
    plain, begun = Draws([1, 2]), Draws([1, 2])
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", lambda self: self)  # there is no GPU
        begun.begin(planned, pool)
        for shape in asked:
            a, b = (draws.uniform() if shape is None else draws.normal(torch.empty(2, *shape)) for draws in (plain, begun))
            assert torch.equal(a, b)
    assert begun.asked == asked


def test_validations_run_as_they_are_written() -> None:
    module: Any = SimpleNamespace(model=ConvAutoencoder(KL(2), channels=8, multipliers=(1,)), device=torch.device("cpu"))
    parts, callback, trainer = module.model.parts_to_compile(), Compile(), SimpleNamespace()
    callback.on_fit_start(trainer, module)  # type: ignore[arg-type]
    compiled = [part._compiled_call_impl for part in callback.parts]
    assert len(compiled) == len(parts) == 2
    assert None not in compiled
    callback.on_validation_start(trainer, module)  # type: ignore[arg-type]
    assert [part._compiled_call_impl for part in callback.parts] == [None, None]
    callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
    assert [part._compiled_call_impl for part in callback.parts] == compiled


def test_random_numbers_of_the_next_batch_are_begun_while_this_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # there is no GPU
    stage = AutoencoderStage(ConvAutoencoder(KL(2), channels=8, multipliers=(1,)))
    batches: list[Batch] = [
        {"image": torch.zeros(2, 3, 8, 8), "draw": [5 * i + 1, 5 * i + 2], "place": [2 * i, 2 * i + 1]} for i in range(5)
    ]
    loader = Loader(batches, batch_size=None)  # type: ignore[arg-type]
    loader.begin, begun = stage._begin_draws, list[int]()
    for batch in loader:
        draws = stage.draws(batch, 0)
        begun.append(len(draws._made))
        assert torch.equal(draws.normal(torch.empty(2, 3)), Draws(seeds_of(batch, 0)).normal(torch.empty(2, 3)))
        draws.uniform()
    assert begun == [0, 0, 2, 2, 2], "of the first two nobody knows yet what they will be asked for"
