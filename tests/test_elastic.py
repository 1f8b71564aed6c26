"""What a training sees and draws depends on (seed, place) alone: not on ranks, workers, or how a step's images fall into batches."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ldm, normal, stage1, stage2
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm import model_folder
from ldm.cli import main
from ldm.data.order import Order
from ldm.draws import Draws
from ldm.interfaces import Cond

quick = settings(deadline=None, max_examples=60)


@quick
@given(seeds=st.lists(st.integers(0, 2**126), min_size=1, max_size=6, unique=True), data=st.data())
def test_a_samples_numbers_do_not_depend_on_its_batch(seeds: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(seeds)))
    like = torch.zeros(len(seeds), 2, 3)
    whole, parts = Draws(seeds), [Draws(part) for part in (seeds[:cut], seeds[cut:]) if part]
    lengths = [len(part.seeds) for part in parts]
    for draw in ("normal", "uniform", "normal"):
        arguments = [like.split(lengths)] if draw == "normal" else [[None] * len(parts)]
        found = torch.cat([getattr(p, draw)(*([x] if x is not None else [])) for p, x in zip(parts, arguments[0], strict=True)])
        assert torch.equal(getattr(whole, draw)(*([like] if draw == "normal" else [])), found)


def test_draws_are_standard_normal_and_uniform() -> None:
    draws = Draws(range(2000))
    noise, u = draws.normal(normal(2000, 4, 8, 8)), draws.uniform()
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert float(noise.std()) == pytest.approx(1, abs=0.005)
    assert abs(float(np.corrcoef(noise[:-1].flatten(), noise[1:].flatten())[0, 1])) < 0.01, "neighbouring seeds are independent"
    assert float(u.mean()) == pytest.approx(0.5, abs=0.03)
    assert 0 <= float(u.min()) <= float(u.max()) < 1
    assert Draws([1]).normal(torch.zeros(1, 3, dtype=torch.float16)).dtype == torch.float16


@quick
@given(
    count=st.integers(1, 80), step=st.sampled_from([12, 24]), epoch=st.integers(0, 3), mirror=st.booleans(),
    splits=st.tuples(*[st.sampled_from([(1, 12, 1), (2, 6, 1), (3, 4, 1), (1, 6, 2), (1, 3, 4), (2, 3, 2), (4, 1, 3)])] * 2),
)  # fmt: skip
def test_the_images_of_a_step_do_not_depend_on_how_they_are_split(
    count: int, step: int, epoch: int, mirror: bool, splits: tuple[tuple[int, int, int], ...]
) -> None:
    """splits: ranks, batch, batches that are accumulated; each of them 12 (or 24) images a step."""
    seen = []
    for world, batch, accumulate in splits:
        batch *= step // 12
        orders = [Order(count, world, rank, batch, mirror, 3, lambda: 0, accumulate=accumulate) for rank in range(world)]
        for order in orders:
            order.set_epoch(epoch)
        keys = [list(order) for order in orders]
        assert len({len(one) for one in keys}) == 1
        assert len(keys[0]) % (batch * accumulate) == 0, "an epoch is whole optimizer steps"
        merged = [key for together in zip(*keys, strict=True) for key in together]
        seen.append([sorted(merged[i : i + step], key=lambda key: key.place) for i in range(0, len(merged), step)])
    assert seen[0] == seen[1]


SPLITS = {"one": ["--data.batch_size=8"], "accumulated": ["--data.batch_size=4", "--trainer.accumulate_grad_batches=2"]}
DDP = ["--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp"]
SLOW = ["--model.optimizer.lr=2e-4", "--model.optimizer.warmup=0", "--model.optimizer.decay=constant", "--trainer.limit_val_batches=2"]


@torch.no_grad()
def outputs(run: Path, root: str) -> torch.Tensor:
    """What a trained model makes of some fixed input, in float64.  Not its weights: a bias before a normalisation has no effect and no
    gradient but rounding, of which Adam makes whole steps."""
    model = model_folder.load(run / root / "model").model.double()
    if root == "autoencoder":
        return model.decode(model.encode(normal(4, 3, 32, 32).double().clamp(-1, 1)).mode())
    x, t, cond = normal(4, 2, 8, 8).double(), torch.tensor([1.0, 100.0, 500.0, 990.0]).double(), Cond(normal(4, 64).double())
    return model.denoiser.network(x, t, cond)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize(("stage", "root"), [(stage1, "autoencoder"), (stage2, "diffusion")], ids=["stage1", "stage2"])
def test_accumulated_batches_are_one_large_batch(trained: Path, tmp_path: Path, stage, root: str) -> None:
    found = []
    for name, options in SPLITS.items():
        if stage is stage2:
            shutil.copytree(trained / "autoencoder" / "model", tmp_path / name / "autoencoder" / "model")
        assert main(stage(tmp_path / name, *SLOW, *options, steps=4)) == 0
        found.append(outputs(tmp_path / name, root))
    assert distance(*found) < 1e-6


@pytest.mark.parametrize(
    ("stage", "root"),
    [pytest.param(stage1, "autoencoder", id="stage1", marks=pytest.mark.slow), pytest.param(stage2, "diffusion", id="stage2")],
)
def test_two_processes_go_on_where_one_stopped_and_back(trained: Path, tmp_path: Path, stage, root: str) -> None:
    for name in ("whole", "parts"):
        if stage is stage2:
            shutil.copytree(trained / "autoencoder" / "model", tmp_path / name / "autoencoder" / "model")
    assert main(stage(tmp_path / "whole", *SLOW, *SPLITS["one"], steps=6)) == 0
    for steps, options in ((2, SPLITS["one"]), (4, DDP), (6, SPLITS["one"])):
        resume = ["--ckpt_path=last"] if steps > 2 else []
        arguments = stage(tmp_path / "parts", *SLOW, *options, *resume, steps=steps)
        if options is DDP:
            result = ldm(*arguments)
            assert result.returncode == 0, result.stderr[-2000:]
        else:
            assert main(arguments) == 0
    assert distance(outputs(tmp_path / "whole", root), outputs(tmp_path / "parts", root)) < 1e-6


def test_with_another_batch_a_run_goes_on_at_the_same_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(stage1(tmp_path, *SLOW, "--data.batch_size=8", steps=3)) == 0
    seen: list[int] = []

    def watched(self: object, batch: dict, batch_idx: int) -> torch.Tensor:
        seen.extend(batch["place"])
        return original(self, batch, batch_idx)

    from ldm.stages.autoencoder import AutoencoderStage

    original, AutoencoderStage.training_step = AutoencoderStage.training_step, watched  # type: ignore[method-assign]
    try:
        capsys.readouterr()
        assert main(stage1(tmp_path, *SLOW, "--data.batch_size=6", "--ckpt_path=last", steps=5)) == 0
    finally:
        AutoencoderStage.training_step = original  # type: ignore[method-assign]
    assert seen == list(range(24, 36))
    assert "the batch was 8 images and is 6: this goes on after image 24 of the epoch" in capsys.readouterr().out


def test_accumulation_of_more_batches_than_an_epoch_has(tmp_path: Path, photos) -> None:
    folder = ["--data.path", str(photos(12)), "--data.size=32", "--data.val_fraction=0.3"]
    options = [*folder, "--data.batch_size=4", "--trainer.accumulate_grad_batches=5", "--trainer.log_every_n_steps=1"]
    assert main(stage1(tmp_path, *SLOW, *options, data="folder", steps=3)) == 0
    checkpoint = torch.load(tmp_path / "autoencoder" / "checkpoints" / "last.ckpt", weights_only=True)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    assert (checkpoint["global_step"], batches) == (3, 15), "each step is of five batches, whatever an epoch is"
