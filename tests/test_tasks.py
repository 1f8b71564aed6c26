"""Tasks without training, windows and interpolation, on the Gaussian oracle (ldm/sampling/tasks.py, wrappers.py, ldm/degradations.py)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from oracles import MU, C, close, conditional, flow, no_noise, normal, oracle, quick, replay
from torch import Tensor

from ldm import model_folder
from ldm.degradations import Degradation, Downscale, GaussianBlur, Grayscale
from ldm.diffusion.guidance import APG
from ldm.diffusion.samplers import Ancestral, Heun, RePaint
from ldm.diffusion.schedule import LinearSchedule
from ldm.interfaces import Cond, Denoise, Task, TaskInput
from ldm.sampling.pipeline import generate
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise
from ldm.sampling.tasks import Between, Edit, ImageToImage, Inpaint, Outpaint, RemoveNoise, Restore, Style
from ldm.sampling.wrappers import slerp, window_starts, windows

SCHEDULE = LinearSchedule()


def given(z0: Tensor, mask: Tensor | None = None, y: Tensor | None = None, scale: float = 1.0) -> TaskInput:
    """Images that are their own latents, or smaller by `scale`."""
    mask, image = torch.ones_like(z0[:, :1]) if mask is None else mask, z0 / scale
    return TaskInput(
        measurement=image if y is None else y, image=image, mask=mask, latents=z0, latent_mask=mask, source_denoise=oracle,
        decode=lambda z: z / scale, encode=lambda x: x * scale,
    )  # fmt: skip


def run(task: Task, known: TaskInput, n: int = 50, sampler: Any = None, seed: int = 9) -> Tensor:
    noise = replay([normal(*known.latents.shape, seed=seed + i) for i in range(1000)])
    x, sigmas = task.start(known, noise, SCHEDULE, SCHEDULE.steps(n))
    return task.finish(known.decode((sampler or Ancestral()).sample(task.wrap(oracle, known), x, sigmas, noise)), known)


# ---------------------------------------------------------------------------------------------------------------------
# From an image
# ---------------------------------------------------------------------------------------------------------------------


def test_strength_0_is_the_image_and_strength_1_ignores_it() -> None:
    one, other = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    assert torch.equal(run(ImageToImage(0.0), given(one)), one)
    assert torch.equal(run(ImageToImage(1.0), given(one)), run(ImageToImage(1.0), given(other)))
    assert torch.equal(run(ImageToImage(1.0), given(one)), run(Task(), given(one)))
    distances = [float((run(ImageToImage(s), given(one)) - one).norm()) for s in (0.2, 0.5, 0.8)]
    assert distances == sorted(distances)
    with pytest.raises(ValueError, match=r"strength is 1\.2; allowed is 0"):
        ImageToImage(1.2)


@quick
@for_all(strength=st.floats(0.001, 1), n=st.integers(1, 60))
def test_all_steps_are_done_from_the_share_of_the_time_on(strength: float, n: int) -> None:
    calls = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma))
        return oracle(x, sigma)

    z0, noise = normal(1, 3, 2, 2), normal(1, 3, 2, 2, seed=1)
    x, sigmas = ImageToImage(strength).start(given(z0), lambda: noise, SCHEDULE, SCHEDULE.steps(n))
    first = float(SCHEDULE.sigma(torch.tensor(strength * (len(SCHEDULE.sigmas) - 1), dtype=torch.float64)))
    assert float(sigmas[0]) == pytest.approx(first, rel=1e-9)
    if strength < 1:
        close(x, z0 + first * noise, 1e-9)
    Ancestral().sample(counted, x, sigmas, no_noise)
    assert len(calls) == n
    assert calls == sigmas[:-1].tolist() == sorted(calls, reverse=True)
    assert sigmas[-1] == 0


def test_noise_of_a_known_level_is_removed_along_the_flow() -> None:
    noisy, level = MU + normal(5, 3, 1, 1), 0.7
    found = run(RemoveNoise(level), given(noisy), n=400, sampler=Heun())
    close(found, flow(noisy, torch.tensor(level), torch.tensor(0.0)), 1e-3)


def test_from_one_image_to_another_both_come_back() -> None:
    one, other = MU + C * normal(3, 3, 1, 1), MU + C * normal(3, 3, 1, 1, seed=5)
    errors = {}
    for n in (50, 200):
        pair = given(one)._replace(second_latents=other, weight=torch.tensor([0.0, 1.0, 0.5]))
        found = run(Between(), pair, n)
        errors[n] = max(float((found[0] - one[0]).abs().max()), float((found[1] - other[1]).abs().max()))
    assert errors[200] < errors[50] / 3
    assert errors[200] < 0.2
    with pytest.raises(ValueError, match="needs a second image"):
        run(Between(), given(one), 4)


def test_inversion_finds_the_way_back_better_with_more_steps() -> None:
    z0 = MU + C * normal(4, 3, 1, 1)
    errors = [float((run(Edit(0.8), given(z0), n) - z0).abs().max()) for n in (25, 100, 400)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.06


def test_style_takes_over_the_statistics_of_the_image() -> None:
    z0 = 3 * normal(2, 3, 8, 8) + 1
    made = run(Style(until=0.0), given(z0))
    close(made.mean((2, 3)), z0.mean((2, 3)), 1e-6)
    close(made.std((2, 3)), z0.std((2, 3)), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Inpainting
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Ancestral(), Ancestral(1.0), RePaint(times=3)], ids=repr)
def test_what_is_known_stays_bit_for_bit(sampler: Any) -> None:
    z0, mask = normal(2, 3, 4, 4), (normal(2, 1, 4, 4, seed=1) > 0).double()
    for strength in (0.4, 1.0):
        made = run(Inpaint(strength), given(z0, mask), sampler=sampler)
        assert torch.equal(torch.where(mask == 0, made, 0), torch.where(mask == 0, z0, 0))
        assert ((made != z0) | (mask == 0)).all()


def test_latents_and_pixels_have_masks_of_their_own() -> None:
    """A latent is made anew where any of its pixels is; the pixels beside it still stay."""
    x, (mask, latent_mask) = normal(1, 3, 8, 8), (torch.zeros(1, 1, side, side, dtype=torch.float64) for side in (8, 2))
    mask[..., 0, 5] = latent_mask[..., 0, 1] = 1
    task, z0 = Inpaint(), x[..., ::4, ::4]
    known = given(x, mask)._replace(latents=z0, latent_mask=latent_mask)
    seen = task.wrap(lambda x, sigma: x * 0 + 7, known)(z0, torch.tensor(1.0))
    assert torch.equal(seen, torch.where(latent_mask == 1, 7.0, z0))
    assert torch.equal(task.finish(x * 0 + 7, known), torch.where(mask == 1, 7.0, x))


def test_outpainting_keeps_the_image_in_its_place() -> None:
    x = normal(1, 3, 4, 6)
    task = Outpaint(left=2, bottom=3)
    large, mask = task.canvas(x, torch.ones(1, 1, 4, 6))
    assert large.shape == (1, 3, 7, 8)
    assert torch.equal(large[..., :4, 2:], x)
    assert torch.equal(mask[..., :4, 2:], torch.zeros(1, 1, 4, 6))
    assert int(mask.sum()) == 7 * 8 - 4 * 6


def test_repeated_steps_keep_the_marginals() -> None:
    count, sigmas = 2000, SCHEDULE.steps(1000)
    draw = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(count, 3, 1, 1, generator=draw, dtype=torch.float64)  # noqa: E731
    made = RePaint(times=3).sample(oracle, SCHEDULE.prior(noise(), sigmas[0]), sigmas, noise)
    assert float(((made.mean(0) - MU[0]).abs() / (C[0] / count**0.5)).max()) < 4
    assert float((made.std(0) / C[0] - 1).abs().max()) < 4 / (2 * count) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degradation", [Downscale(4), GaussianBlur(1.5), Grayscale()], ids=repr)
def test_a_restored_picture_fits_what_was_measured(degradation: Degradation) -> None:
    scale = 10.0  # so that pictures are in [-1, 1]
    truth = ((MU + C * normal(3, 3, 16, 16)) / scale).clamp(-1, 1)
    y = degradation(truth)
    task = Restore(degradation)
    x, mask = task.canvas(y, torch.ones_like(y[:, :1]))
    assert x.shape == truth.shape
    assert torch.equal(mask, torch.ones_like(truth[:, :1]))
    error = {}
    for name, chosen in {"restored": task, "sampled": Task()}.items():
        made = run(chosen, given(scale * x, y=y, scale=scale), n=100)
        error[name] = (degradation(made) - y).abs()
    assert error["restored"].square().mean() < 0.02 * error["sampled"].square().mean()
    assert 127.5 * error["restored"].max() < (0.6 if degradation == Grayscale() else 0.5), "levels of 255; luma is that of 8 bits"
    assert task.downscale == degradation.factor


def test_degradations_keep_what_is_constant_and_grey_is_luma() -> None:
    flat = torch.full((1, 3, 16, 16), 0.3)
    for degradation in (Downscale(4), GaussianBlur(2.0), Grayscale()):
        close(degradation(flat), torch.full_like(degradation(flat), 0.3), 1e-6)
    close(Grayscale()(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)), torch.full((1, 3, 1, 1), 0.299), 1e-6)
    impulse = torch.zeros(1, 3, 31, 31)
    impulse[..., 15, 15] = 1
    row = GaussianBlur(2.0)(impulse)[0, 0, 15]
    spread = (row * (torch.arange(31) - 15) ** 2).sum() / row.sum()
    assert float(spread) == pytest.approx(4, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Windows, interpolation
# ---------------------------------------------------------------------------------------------------------------------


@quick
@for_all(height=st.integers(4, 15), width=st.integers(4, 15), overlap=st.floats(0, 0.9))
def test_windows_leave_a_local_d_alone(height: int, width: int, overlap: float) -> None:
    x, sigma, sizes, made = normal(2, 3, height, width), torch.tensor(0.7), set(), []

    def local(x: Tensor, sigma: Tensor) -> Tensor:
        sizes.add(tuple(x.shape[2:]))
        return oracle(x, sigma)

    joined, places = windows(lambda: made.append(1) or local, (4, 4), overlap), window_starts((height, width), (4, 4), overlap)  # type: ignore[func-returns-value]
    for _ in range(2):
        close(joined(x, sigma), oracle(x, sigma), 1e-12)
    assert sizes == {(4, 4)}
    assert {0, height - 4} == {min(top for top, _ in places), max(top for top, _ in places)}
    assert {0, width - 4} == {min(left for _, left in places), max(left for _, left in places)}


def test_each_window_remembers_its_own_steps() -> None:
    """Guidance with momentum in windows is guidance with momentum of each window alone."""
    cond, null, sigma = Cond(vector=normal(1, 2, seed=5)), Cond(vector=normal(1, 2, seed=6)), torch.tensor(0.7)

    def make() -> Denoise:
        return APG(3.0, momentum=-0.5).guide(conditional, cond, null)

    steps = [normal(1, 2, 4, 8, seed=seed) for seed in range(3)]
    joined, left, right = windows(make, (4, 4), 0.0), make(), make()
    for x in steps:
        close(joined(x, sigma), torch.cat([left(x[..., :4], sigma), right(x[..., 4:], sigma)], dim=3), 1e-12)


def test_windows_leave_no_seams_in_pictures() -> None:
    """The step in brightness where the middle window ends (columns 32 and 96), relative to the steps 4, 8 and 12 px beside it: windows
    that count everywhere alike had 2.7 and 3.0 in eight such pictures."""
    loaded = model_folder.load("emoji")
    config = replace(SamplingConfig.of(loaded.card), steps=8, size=(64, 128))
    requests = [SampleRequest(i, SeedNoise(0, i), {"class": name}) for i, name in enumerate(loaded.card["classes"][::6])]
    steps = generate(loaded.model, requests, config, loaded.card["classes"]).diff(dim=3).abs().mean((0, 1, 2))
    for column in (32, 96):
        beside = torch.stack([steps[column - 1 + offset] for offset in (-12, -8, -4, 4, 8, 12)])
        assert steps[column - 1] < 1.3 * beside.mean()


@quick
@for_all(weight=st.floats(0, 1), seed=st.integers(0, 1000))
def test_slerp_goes_from_one_to_the_other_and_keeps_the_length(weight: float, seed: int) -> None:
    a, b = normal(3, 8, 8, seed=seed), normal(3, 8, 8, seed=seed + 5000)
    close(slerp(a, b, 0.0), a, 1e-12)
    close(slerp(a, b, 1.0), b, 1e-12)
    between = slerp(a, b, weight)
    assert 0.97 * min(a.norm(), b.norm()) <= between.norm() <= 1.03 * max(a.norm(), b.norm())
    close(slerp(a, a, weight), a, 1e-12)
