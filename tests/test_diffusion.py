"""The mathematics of ldm/diffusion against papers written out in their own variables, exact solutions and diffusers.

A new sampler is picked up by itself and must be entered in SAMPLERS, a new schedule in SCHEDULES.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import MU, C, Function, close, column, conditional, flow, no_noise, normal, oracle, quick, replay, wavy
from torch import Tensor

from ldm.diffusion.denoiser import PRECONDITIONING, Denoiser
from ldm.diffusion.guidance import APG, CFG
from ldm.diffusion.multistep import DEIS, LMS, PLMS, UniPC
from ldm.diffusion.objective import EDM, P2, LearnedUncertainty, LogitNormal, LogNormal, MinSNR, Simple, Uniform
from ldm.diffusion.samplers import DDIM, DDPM, LCM, Ancestral, DPMSolverPP2M, DPMSolverPP2S, DPMSolverPP3M, Euler, Heun, RePaint, inverted
from ldm.diffusion.schedule import (
    CosineSchedule,
    FlowSchedule,
    KarrasSchedule,
    LDMSchedule,
    LinearSchedule,
    Shifted,
    SigmoidSchedule,
    ZeroTerminalSNR,
)
from ldm.draws import Draws
from ldm.interfaces import Cond, NoiseSchedule, Sampler
from ldm.registry import parts


class Expected(NamedTuple):
    sampler: Sampler  # set up so that it draws no noise
    order: int  # of convergence in 1 / n
    calls: Callable[[int], int] = lambda n: n  # of D for n steps that end at sigma = 0
    between: bool = False  # D is asked for between the given levels, too
    warm: bool = False  # a multistep method: its first steps, of lower order, are made so small that they do not count


SAMPLERS: dict[type, Expected] = {
    Ancestral: Expected(Ancestral(eta=0.0), 1),
    DDIM: Expected(DDIM(), 1),
    DDPM: Expected(DDPM(eta=0.0), 1),
    Euler: Expected(Euler(), 1),
    Heun: Expected(Heun(), 2, lambda n: 2 * n - 1),
    DPMSolverPP2S: Expected(DPMSolverPP2S(), 2, lambda n: 2 * n - 1, between=True),
    DPMSolverPP2M: Expected(DPMSolverPP2M(), 2),
    DPMSolverPP3M: Expected(DPMSolverPP3M(), 3, warm=True),
    UniPC: Expected(UniPC(), 3, warm=True),
    LMS: Expected(LMS(), 4, warm=True),
    DEIS: Expected(DEIS(), 3, warm=True),
    PLMS: Expected(PLMS(), 2, lambda n: n + (n > 1)),
    RePaint: Expected(RePaint(Ancestral(0.0), times=1), 1),
}


def cosine_alpha_bar(fraction: float) -> float:
    return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2


def sigmoid_alpha_bar(fraction: float) -> float:
    ends = [1 / (1 + math.exp(x)) for x in (-3, 3, 6 * fraction - 3)]
    return (ends[2] - ends[1]) / (ends[0] - ends[1])


def ldm_beta(t: int, T: int) -> float:
    return (math.sqrt(0.0015) + (math.sqrt(0.0195) - math.sqrt(0.0015)) * t / (T - 1)) ** 2


def from_betas(beta: Callable[[int, int], float]) -> Callable[[int], list[float]]:
    return lambda T: [math.sqrt(1 / a - 1) for a in alpha_bars([beta(t, T) for t in range(T)])[1:]]


def without_the_last_of_the_signal(T: int) -> list[float]:
    """Algorithm 1, arXiv:2305.08891, on LDM's betas."""
    signal = [math.sqrt(a) for a in alpha_bars([ldm_beta(t, T) for t in range(T)])[1:]]
    scaled = [(s - signal[-1]) * signal[0] / (signal[0] - signal[-1]) for s in signal]
    return [math.sqrt(1 / s**2 - 1) for s in scaled[:-1]] + [1e4]


class Levels(NamedTuple):
    make: Callable[[int], NoiseSchedule]  # by its number of steps
    sigmas: Callable[[int], list[float]]  # in plain floats


SCHEDULES: dict[type, Levels] = {
    LinearSchedule: Levels(LinearSchedule, from_betas(lambda t, T: 1e-4 + (0.02 - 1e-4) * t / (T - 1))),
    LDMSchedule: Levels(LDMSchedule, from_betas(ldm_beta)),
    CosineSchedule: Levels(
        CosineSchedule, from_betas(lambda t, T: min(1 - cosine_alpha_bar((t + 1) / T) / cosine_alpha_bar(t / T), 0.999))
    ),
    SigmoidSchedule: Levels(
        SigmoidSchedule, from_betas(lambda t, T: min(1 - sigmoid_alpha_bar((t + 1) / T) / sigmoid_alpha_bar(t / T), 0.999))
    ),
    FlowSchedule: Levels(FlowSchedule, lambda T: [(i + 1) / (T + 1) / (1 - (i + 1) / (T + 1)) for i in range(T)]),
    KarrasSchedule: Levels(
        KarrasSchedule, lambda T: [(0.002 ** (1 / 7) + i / (T - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(T)]
    ),
    Shifted: Levels(lambda T: Shifted(LDMSchedule(T), 3.0), lambda T: [3 * s for s in from_betas(ldm_beta)(T)]),
    ZeroTerminalSNR: Levels(lambda T: ZeroTerminalSNR(LDMSchedule(T)), without_the_last_of_the_signal),
}


def entry(table: dict[type, Any], cls: type) -> Any:
    if cls not in table:
        pytest.fail(f"{cls.__module__}.{cls.__name__} is new: enter it in SAMPLERS or SCHEDULES at the top of {__file__}")
    return table[cls]


SOLVERS = [cls for cls in parts(Sampler, ["diffusion"]).values() if cls is not LCM]  # LCM solves no equation
each_sampler = pytest.mark.parametrize("cls", SOLVERS)
each_schedule = pytest.mark.parametrize("cls", list(parts(NoiseSchedule, ["diffusion"]).values()))
each_prediction = pytest.mark.parametrize("prediction", list(PRECONDITIONING))


@lru_cache
def schedule_of(cls: type, num_steps: int = 1000) -> NoiseSchedule:
    return entry(SCHEDULES, cls).make(num_steps)


# ---------------------------------------------------------------------------------------------------------------------
# The Gaussian oracle's flow
# ---------------------------------------------------------------------------------------------------------------------


def grid(n: int, high: float = 10.0, low: float = 0.05, rho: float = 7.0) -> Tensor:
    """n steps down to low > 0, uneven in sigma and in log sigma (Eq. 5, arXiv:2206.00364)."""
    return torch.linspace(high ** (1 / rho), low ** (1 / rho), n + 1, dtype=torch.float64) ** rho


@each_sampler
def test_convergence_order_on_the_gaussian_flow(cls: type) -> None:
    expected = entry(SAMPLERS, cls)
    x = MU + normal(4, 3, 1, 1) * 10
    errors = []
    for n in (64, 128, 256, 512):
        sigmas = grid(n)
        if expected.warm:
            fractions = 2.0 ** -torch.arange(3 * math.log2(n), 0, -1, dtype=torch.float64)
            sigmas = torch.cat([sigmas[:1], torch.lerp(sigmas[0], sigmas[1], fractions), sigmas[1:]])
        end = expected.sampler.sample(oracle, x, sigmas, no_noise)
        errors.append(float((end - flow(x, sigmas[0], sigmas[-1])).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(expected.order, abs=0.05), f"errors {errors}, orders {orders}"
    assert errors[-1] < (0.05 if expected.order == 1 else 1e-3), "the end point is not that of the ODE"


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_noise_keeps_the_marginals(eta: float) -> None:
    n, count = 1000, 10_000  # so fine that D's discretisation stays below half a standard error
    sigmas = grid(n)
    generator = torch.Generator().manual_seed(1)
    draws = 0

    def noise() -> Tensor:
        nonlocal draws
        draws += 1
        return torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)

    start = MU + (C**2 + sigmas[0] ** 2).sqrt() * noise()
    end = Ancestral(eta).sample(oracle, start, sigmas, noise)
    assert draws == 1 + n
    variance = (C**2 + sigmas[-1] ** 2).flatten()
    mean_error = (end.mean(0).flatten() - MU.flatten()) / (variance / count).sqrt()
    variance_error = (end.var(0).flatten() - variance) / (variance * math.sqrt(2 / (count - 1)))
    assert mean_error.abs().max() < 3, mean_error
    assert variance_error.abs().max() < 3, variance_error
    # how much of the start the noise has replaced: nothing along the ODE, as much as the forward process for eta = 1
    correlation = torch.stack([torch.corrcoef(torch.stack([start[:, i, 0, 0], end[:, i, 0, 0]]))[0, 1] for i in range(3)])
    expected = ((C**2 + sigmas[-1] ** 2) / (C**2 + sigmas[0] ** 2)).flatten() ** (eta**2 / 2)
    correlation_error = (correlation - expected) / ((1 - expected**2) / math.sqrt(count))
    assert correlation_error.abs().max() < 3, correlation_error


@each_sampler
def test_ends_in_a_point_mass(cls: type) -> None:
    sigmas, point, x = schedule_of(LDMSchedule).steps(7), normal(2, 3, 2, 2, seed=1), normal(2, 3, 2, 2) * 90
    end = entry(SAMPLERS, cls).sampler.sample(lambda x, sigma: point, x, sigmas, no_noise)
    close(end, point, 1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: what they do with their arguments
# ---------------------------------------------------------------------------------------------------------------------


@each_sampler
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_calls_of_the_denoiser(cls: type, n: int) -> None:
    expected, sigmas, seen = entry(SAMPLERS, cls), schedule_of(LinearSchedule).steps(n), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == ()
        seen.append(float(sigma))
        return x / (1 + sigma**2)

    states = list(expected.sampler.steps(denoise, normal(1, 1, 2, 2), sigmas, no_noise))
    assert len(states) == n
    assert len(seen) == expected.calls(n)
    given = set(sigmas[:-1].tolist())
    assert given <= set(seen) if expected.between else given == set(seen), "D is asked for at the given noise levels"
    assert min(seen) > 0


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_changed_in_place(cls: type, dtype: torch.dtype) -> None:
    sampler, sigmas, same = entry(SAMPLERS, cls).sampler, grid(6), normal(2, 3, 1, 1, seed=3).to(dtype)
    x, levels, answer = normal(2, 3, 1, 1).to(dtype), sigmas.clone(), same.clone()
    for denoise in (lambda x, sigma: x, lambda x, sigma: same, lambda x, sigma: oracle(x, sigma).to(dtype)):
        before, states, copies = x.clone(), [], []
        for state in sampler.steps(denoise, x, sigmas, no_noise):
            states.append(state)
            copies.append(state.clone())
        assert torch.equal(x, before)
        assert torch.equal(same, answer)
        assert torch.equal(sigmas, levels)
        assert all(torch.equal(state, copy) for state, copy in zip(states, copies, strict=True))
        assert all(state.dtype == dtype and state.shape == x.shape for state in states)
        assert torch.equal(sampler.sample(denoise, x, sigmas, no_noise), states[-1])


def test_ancestral_changes_neither_x_nor_noise() -> None:
    sigmas, drawn = schedule_of(LDMSchedule).steps(5), [normal(2, 3, 1, 1, seed=s) for s in range(4)]
    x, copies = normal(2, 3, 1, 1, seed=9), [noise.clone() for noise in drawn]
    before = x.clone()
    Ancestral(1.0).sample(oracle, x, sigmas, replay(drawn))  # 4 draws for 5 steps: none in the last
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(drawn, copies, strict=True))


def test_ddim_and_ddpm_are_ancestral_under_their_names() -> None:
    sigmas, drawn, x = schedule_of(LDMSchedule).steps(5), [normal(2, 3, 1, 1, seed=s) for s in range(4)], normal(2, 3, 1, 1, seed=9)
    assert torch.equal(DDIM().sample(oracle, x, sigmas, no_noise), Ancestral(0.0).sample(oracle, x, sigmas, no_noise))
    assert torch.equal(DDPM().sample(oracle, x, sigmas, replay(drawn)), Ancestral(1.0).sample(oracle, x, sigmas, replay(drawn)))
    assert (DDIM().ancestral, DDPM().ancestral) == (False, True), "whose noise a network may have learned"


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: the papers' algorithms in the papers' variables
# ---------------------------------------------------------------------------------------------------------------------


def alpha_bars(betas: list[float]) -> list[float]:
    """[1, alpha_bar_1, ..., alpha_bar_T]"""
    products = [1.0]
    for beta in betas:
        products.append(products[-1] * (1 - beta))
    return products


def in_vp_variables(states: Iterator[Tensor], sigmas: Tensor) -> list[Tensor]:
    return [x / (1 + sigma**2).sqrt() for x, sigma in zip(states, sigmas[1:], strict=True)]


@pytest.mark.parametrize("end", [0.02, 0.4])
def test_ddpm_in_its_own_variables(end: float) -> None:
    T, shape = 50, (3, 2, 2, 2)
    noises = [normal(*shape, seed=s) for s in range(T)]

    # arXiv:2006.11239, Algorithm 2 with Eqs. 6, 7 and 15, t = T .. 1
    beta = [math.nan] + [1e-4 + (end - 1e-4) * t / (T - 1) for t in range(T)]
    abar = alpha_bars(beta[1:])
    x, paper = noises[0], []
    for t in range(T, 0, -1):
        eps = wavy(x, torch.full((3,), t - 1.0, dtype=torch.float64))
        x0 = (x - math.sqrt(1 - abar[t]) * eps) / math.sqrt(abar[t])
        on_x0 = math.sqrt(abar[t - 1]) * beta[t] / (1 - abar[t])
        on_x = math.sqrt(1 - beta[t]) * (1 - abar[t - 1]) / (1 - abar[t])
        beta_tilde = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
        x = on_x0 * x0 + on_x * x
        if t > 1:
            x = x + math.sqrt(beta_tilde) * noises[T - t + 1]
        paper.append(x)

    schedule = LinearSchedule(T, 1e-4, end)
    denoiser = Denoiser(Function(lambda x, t, cond: wavy(x, t)), schedule, "eps")
    sigmas = schedule.steps(T)
    prior = schedule.prior(noises[0], sigmas[0])
    close(prior / math.sqrt(1 + float(schedule.sigmas[-1]) ** 2), noises[0], 1e-14)
    states = Ancestral(1.0).steps(lambda x, s: denoiser.predict(x, s, Cond()), prior, sigmas, replay(noises[1:]))
    ours = in_vp_variables(states, sigmas)
    assert len(ours) == T
    for a, b in zip(ours, paper, strict=True):
        close(a, b, 1e-9)


EVERY_FIFTH = list(range(49, -1, -5))
UNEVEN = [49, 48, 40, 27, 25, 11, 3, 2, 0]


def sub_sequence(schedule: NoiseSchedule, tau: list[int]) -> Tensor:
    return torch.cat([schedule.sigmas[tau], torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tau", [EVERY_FIFTH, UNEVEN], ids=["even", "uneven"])
def test_ddim_in_its_own_variables(eta: float, tau: list[int]) -> None:
    T, shape = 50, (3, 2, 2, 2)
    noises = [normal(*shape, seed=s) for s in range(len(tau))]

    # arXiv:2010.02502, Eqs. 12 and 16; its alpha is DDPM's alpha_bar
    abar = alpha_bars([1e-4 + (0.3 - 1e-4) * t / (T - 1) for t in range(T)])
    x, paper = noises[0], []
    for i, t in enumerate(tau):
        a, a_prev = abar[t + 1], abar[tau[i + 1] + 1] if i + 1 < len(tau) else 1.0
        eps = wavy(x, torch.full((3,), float(t), dtype=torch.float64))
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * noises[i + 1]
        paper.append(x)

    schedule = LinearSchedule(T, 1e-4, 0.3)
    denoiser = Denoiser(Function(lambda x, t, cond: wavy(x, t)), schedule, "eps")
    sigmas = sub_sequence(schedule, tau)
    if tau == EVERY_FIFTH:
        assert torch.equal(schedule.steps(10), sigmas)
    noise = replay(noises[1:]) if eta else no_noise
    states = Ancestral(eta).steps(lambda x, s: denoiser.predict(x, s, Cond()), schedule.prior(noises[0], sigmas[0]), sigmas, noise)
    ours = in_vp_variables(states, sigmas)
    assert len(ours) == len(tau)
    for a, b in zip(ours, paper, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("tau", [EVERY_FIFTH, UNEVEN], ids=["even", "uneven"])
def test_dpm_solver_pp_2m_in_its_own_variables(tau: list[int]) -> None:
    # arXiv:2211.01095, Algorithm 2, x_theta being the predicted x0; uneven steps tell r from 1 / r
    T = 50
    abar = alpha_bars([1e-4 + (0.3 - 1e-4) * t / (T - 1) for t in range(T)])
    alpha = [math.sqrt(abar[t + 1]) for t in tau]
    sigma = [math.sqrt(1 - abar[t + 1]) for t in tau]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]

    def x_theta(x: Tensor, i: int) -> Tensor:
        return (x - sigma[i] * wavy(x, torch.full((3,), float(tau[i]), dtype=torch.float64))) / alpha[i]

    x, paper, buffer = normal(3, 2, 2, 2), [], []
    for i in range(1, len(tau)):
        buffer.append(x_theta(x, i - 1))
        D, h = buffer[-1], lam[i] - lam[i - 1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * D
        paper.append(x)
    paper.append(x_theta(x, len(tau) - 1))  # to sigma = 0 the step is of first order

    schedule = LinearSchedule(T, 1e-4, 0.3)
    denoiser = Denoiser(Function(lambda x, t, cond: wavy(x, t)), schedule, "eps")
    sigmas = sub_sequence(schedule, tau)
    prior = schedule.prior(normal(3, 2, 2, 2), schedule.sigmas[-1])
    ours = in_vp_variables(DPMSolverPP2M().steps(lambda x, s: denoiser.predict(x, s, Cond()), prior, sigmas, no_noise), sigmas)
    for a, b in zip(ours, paper, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("tau", [EVERY_FIFTH, UNEVEN], ids=["even", "uneven"])
def test_dpm_solver_pp_2s_in_its_own_variables(tau: list[int]) -> None:
    # arXiv:2211.01095, Algorithm 1 with r = 1/2: s lies half-way in lambda
    schedule = LinearSchedule(50, 1e-4, 0.3)
    sigmas = sub_sequence(schedule, tau)

    def at(lam: float) -> tuple[float, float, float]:
        """alpha, sigma and the network's t at half the log-SNR lam."""
        level = torch.tensor(math.exp(-lam), dtype=torch.float64)
        return float((1 + level**2).rsqrt()), float(level * (1 + level**2).rsqrt()), float(schedule.t(level))

    def x_theta(x: Tensor, lam: float) -> Tensor:
        alpha, sigma, t = at(lam)
        return (x - sigma * wavy(x, torch.full((3,), t, dtype=torch.float64))) / alpha

    x, paper, lams = normal(3, 2, 2, 2), [], [-math.log(float(level)) for level in sigmas[:-1]]
    for before, after in pairwise(lams):
        h, middle = after - before, (before + after) / 2
        (_, sigma_0, _), (alpha_s, sigma_s, _), (alpha, sigma, _) = at(before), at(middle), at(after)
        u = sigma_s / sigma_0 * x - alpha_s * (math.exp(-h / 2) - 1) * x_theta(x, before)
        x = sigma / sigma_0 * x - alpha * (math.exp(-h) - 1) * x_theta(u, middle)
        paper.append(x)
    paper.append(x_theta(x, lams[-1]))  # to sigma = 0 the step is of first order

    denoiser = Denoiser(Function(lambda x, t, cond: wavy(x, t)), schedule, "eps")
    prior = schedule.prior(normal(3, 2, 2, 2), sigmas[0])
    ours = in_vp_variables(DPMSolverPP2S().steps(lambda x, s: denoiser.predict(x, s, Cond()), prior, sigmas, no_noise), sigmas)
    for a, b in zip(ours, paper, strict=True):
        close(a, b, 1e-9)


def test_heun_in_its_own_variables() -> None:
    # arXiv:2206.00364, Algorithm 1 with sigma(t) = t and s(t) = 1
    def D(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) / (1 + t)

    times = torch.tensor([9.0, 8.5, 4.0, 1.0, 0.9, 0.1, 0.0], dtype=torch.float64)
    x = start = normal(2, 3, 2, 2) * 9
    paper = []
    for i in range(len(times) - 1):
        t, t_next = times[i], times[i + 1]
        d = x / t - D(x, t) / t
        x_next = x + (t_next - t) * d
        if t_next != 0:
            d_prime = x_next / t_next - D(x_next, t_next) / t_next
            x_next = x + (t_next - t) * (d / 2 + d_prime / 2)
        x = x_next
        paper.append(x)
    for a, b in zip(Heun().steps(D, start, times, no_noise), paper, strict=True):
        close(a, b, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Denoiser: the rows eps, v, x0
# ---------------------------------------------------------------------------------------------------------------------


def closed_form(prediction: str, z0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this prediction type should say, sigma (B,1,1,1)."""
    alpha, sigma_vp = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    return {"eps": eps, "v": alpha * eps - sigma_vp * z0, "x0": z0, "flow": eps - z0}[prediction]


def test_rows_with_a_closed_form() -> None:
    assert set(PRECONDITIONING) == {"eps", "v", "x0", "flow"}, "enter the new prediction type in closed_form and in test_min_snr_weight"
    with pytest.raises(ValueError, match="allowed are eps, v, x0, flow"):
        Denoiser(Function(lambda x, t, cond: x), LinearSchedule(), "score")  # type: ignore[arg-type]


@each_prediction
@quick
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_rows_agree_on_the_same_d(prediction: str, data: st.DataObject, seed: int) -> None:
    schedule = schedule_of(data.draw(st.sampled_from([LinearSchedule, LDMSchedule])))
    t = torch.tensor(data.draw(st.lists(st.floats(0, 999), min_size=3, max_size=3)), dtype=torch.float64)
    sigma = schedule.sigma(t)
    z0, eps = normal(2, 3, 2, 2, 2, seed=seed)
    x = z0 + column(sigma) * eps
    seen = []

    def answer(x_seen: Tensor, t_seen: Tensor, cond: Cond) -> Tensor:
        seen.append((x_seen, t_seen, cond))
        return denoiser.target(x, z0, sigma)

    denoiser, cond = Denoiser(Function(answer), schedule, prediction), Cond()
    close(denoiser.target(x, z0, sigma), closed_form(prediction, z0, eps, column(sigma)), 1e-9)
    close(denoiser.predict(x, sigma, cond), z0, 1e-9)
    close(denoiser.raw(x, sigma, cond), denoiser.target(x, z0, sigma), 0)
    c_out = denoiser.output_weight(sigma).sqrt()
    shifted = Denoiser(Function(lambda x, t, cond: answer(x, t, cond) + 1), schedule, prediction)
    close((shifted.predict(x, sigma, cond) - z0).abs(), column(c_out).expand_as(z0), 1e-9)
    # what the network is shown: DDPM's x_t, of unit variance, and the step
    alpha_bar = column(1 / (1 + sigma**2))
    for x_seen, t_seen, cond_seen in seen:
        close(x_seen, alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * eps, 1e-9)
        close(t_seen, t, 1e-8)
        assert cond_seen is cond


@each_prediction
def test_one_sigma_serves_the_whole_batch(prediction: str) -> None:
    schedule, x = schedule_of(LDMSchedule), normal(3, 2, 2, 2)
    denoiser = Denoiser(Function(lambda x, t, cond: wavy(x, t)), schedule, prediction)
    sigma = schedule.sigmas[321]
    close(denoiser.predict(x, sigma, Cond()), denoiser.predict(x, sigma.expand(3), Cond()), 1e-14)
    assert denoiser.predict(x.float(), sigma, Cond()).dtype == torch.float32


def test_predictions_sample_alike() -> None:
    """Networks that say the same in different ways are one model to a sampler."""
    schedule, ends = schedule_of(LinearSchedule, 50), []

    for prediction in PRECONDITIONING:

        def answer(x_vp: Tensor, t: Tensor, cond: Cond, prediction: str = prediction) -> Tensor:
            sigma = column(schedule.sigma(t))
            eps = wavy(x_vp, t)
            return closed_form(prediction, (1 + sigma**2).sqrt() * x_vp - sigma * eps, eps, sigma)

        denoiser = Denoiser(Function(answer), schedule, prediction)  # type: ignore[arg-type]
        start = schedule.prior(normal(3, 2, 2, 2), schedule.sigmas[-1])
        ends.append(DPMSolverPP2M().sample(lambda x, s, d=denoiser: d.predict(x, s, Cond()), start, schedule.steps(10), no_noise))
    for end in ends[1:]:
        close(end, ends[0], 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Objectives
# ---------------------------------------------------------------------------------------------------------------------


@each_prediction
@pytest.mark.parametrize("objective", [Simple(), MinSNR(), MinSNR(gamma=1.0)], ids=repr)
def test_losses_of_the_perfect_and_of_the_zero_network(objective: Simple, prediction: str) -> None:
    schedule = schedule_of(LDMSchedule)
    t, z0, noise = torch.tensor([0, 137, 640, 999]), normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    sigma = schedule.sigmas[t]
    target = closed_form(prediction, z0, noise, column(sigma))
    expected = target.square().mean((1, 2, 3))
    if isinstance(objective, MinSNR):
        c_out = {"eps": sigma, "v": sigma / (1 + sigma**2).sqrt(), "x0": sigma**0, "flow": sigma / (1 + sigma)}[prediction]
        expected = expected * (sigma**-2).clamp(max=objective.gamma) * c_out**2

    def perfect(x: Tensor, t_seen: Tensor, cond: Cond) -> Tensor:
        alpha_bar = column(1 / (1 + sigma**2))
        close(x, alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * noise, 1e-12)
        close(t_seen, t.double(), 1e-8)
        return target

    def loss(function: Callable[[Tensor, Tensor, Cond], Tensor]) -> Tensor:
        return objective.loss(Denoiser(Function(function), schedule, prediction), z0, noise, t, Cond())  # type: ignore[arg-type]

    zero = loss(lambda x, t, cond: torch.zeros_like(x))
    assert zero.shape == (4,)
    torch.testing.assert_close(zero.double(), expected, rtol=1e-5, atol=0)
    assert loss(perfect).max() < 1e-20
    assert loss(perfect).min() >= 0
    torch.testing.assert_close(loss(lambda x, t, cond: 3 * target).double(), 4 * expected, rtol=1e-5, atol=0)


@quick
@given(log_sigma=st.floats(-5, 10), gamma=st.floats(0.1, 50))
def test_min_snr_weight(log_sigma: float, gamma: float) -> None:
    sigma = torch.tensor([math.exp(log_sigma)], dtype=torch.float64)
    snr = math.exp(-2 * log_sigma)
    expected = {"eps": min(snr, gamma) / snr, "v": min(snr, gamma) / (snr + 1), "x0": min(snr, gamma)}
    expected["flow"] = min(snr, gamma) / (math.sqrt(snr) + 1) ** 2
    for prediction in PRECONDITIONING:
        denoiser = Denoiser(Function(lambda x, t, cond: x), schedule_of(LinearSchedule), prediction)  # type: ignore[arg-type]
        assert float(MinSNR(gamma=gamma).weight(denoiser, sigma)) == pytest.approx(expected[prediction], rel=1e-12)
        assert float(Simple().weight(denoiser, sigma)) == 1


@each_schedule
@each_prediction
def test_weights_are_finite_and_positive_on_every_level(cls: type, prediction: str) -> None:
    schedule = schedule_of(cls)
    denoiser = Denoiser(Function(lambda x, t, cond: x), schedule, prediction)
    for dtype in (torch.float32, torch.float64):
        weight = MinSNR().weight(denoiser, schedule.sigma(torch.arange(1000)).to(dtype)).to(dtype)
        assert weight.shape == (1000,)
        assert torch.isfinite(weight).all()
        assert (weight > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Guidance
# ---------------------------------------------------------------------------------------------------------------------


@quick
@given(scale=st.one_of(st.floats(-5, 20), st.sampled_from([0.0, 1.0, 0, 1, 0.5, 7.5])), seed=st.integers(0, 2**16))
def test_cfg_formula(scale: float, seed: int) -> None:
    x, sigma = normal(3, 2, 2, 2, seed=seed), torch.tensor(1.7, dtype=torch.float64)
    cond, null = Cond(vector=normal(3, 2, seed=seed + 1)), Cond(vector=normal(3, 2, seed=seed + 2))
    rows = []

    def predict(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        rows.append(len(x))
        return conditional(x, sigma, cond)

    guided = CFG(scale).guide(predict, cond, null)(x, sigma)
    with_cond, with_null = conditional(x, sigma, cond), conditional(x, sigma, null)
    if scale == 1:
        assert torch.equal(guided, with_cond)
    elif scale == 0:
        assert torch.equal(guided, with_null)
    else:
        close(guided, with_null + scale * (with_cond - with_null), 1e-12)
    assert rows == ([3] if scale in (0, 1) else [6]), "one call; half the batch where one prediction is enough"


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


@each_schedule
@pytest.mark.parametrize("num_steps", [2, 37, 1000])
def test_sigmas_against_the_closed_form(cls: type, num_steps: int) -> None:
    schedule = schedule_of(cls, num_steps)
    assert schedule.sigmas.dtype == torch.float64
    assert schedule.sigmas.shape == (num_steps,)
    expected = torch.tensor(entry(SCHEDULES, cls).sigmas(num_steps), dtype=torch.float64)
    torch.testing.assert_close(schedule.sigmas, expected, rtol=1e-9, atol=0)
    assert (schedule.sigmas.diff() > 0).all()
    assert schedule.sigmas[0] > 0


def test_cosine_alpha_bar() -> None:
    """Below the clamp the product of the betas telescopes to f(t) / f(0) (Eq. 17, arXiv:2102.09672)."""
    alpha_bar = 1 / (1 + schedule_of(CosineSchedule).sigmas ** 2)
    expected = [cosine_alpha_bar((t + 1) / 1000) / cosine_alpha_bar(0) for t in range(999)]
    close(alpha_bar[:-1], torch.tensor(expected, dtype=torch.float64), 1e-11)
    assert float(alpha_bar[-1]) == pytest.approx(expected[-1] * (1 - 0.999), rel=1e-6)


@pytest.mark.parametrize(
    ("cls", "name", "arguments"),
    [
        (LinearSchedule, "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        (LDMSchedule, "scaled_linear", {"beta_start": 0.0015, "beta_end": 0.0195}),
        (CosineSchedule, "squaredcos_cap_v2", {}),
    ],
)
def test_alpha_bar_is_that_of_diffusers(cls: type, name: str, arguments: dict[str, float]) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=name, **arguments).alphas_cumprod.double()
    ours = 1 / (1 + schedule_of(cls).sigmas ** 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)  # where alpha_bar itself is below 1e-5


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("n", [1, 2, 10, 25, 37, 1000])
def test_spacing_is_that_of_diffusers(spacing: str, n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    timesteps = scheduler.timesteps.tolist()
    if spacing == "linspace" and n == 1:
        timesteps = [999]  # diffusers' own is 0; a single step should start from noise
    schedule = schedule_of(LinearSchedule)
    assert torch.equal(schedule.steps(n, spacing)[:-1], schedule.sigmas[timesteps])


@each_schedule
@pytest.mark.parametrize("num_steps", [37, 1000])
@quick
@given(data=st.data(), spacing=st.sampled_from(["trailing", "leading", "linspace"]))
def test_steps(cls: type, num_steps: int, data: st.DataObject, spacing: str) -> None:
    schedule = schedule_of(cls, num_steps)
    n = data.draw(st.integers(1, num_steps), label="n")
    sigmas = schedule.steps(n, spacing)
    assert sigmas.shape == (n + 1,)
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    index = {level: t for t, level in enumerate(schedule.sigmas.tolist())}
    t = [index[level] for level in sigmas[:-1].tolist()]  # a KeyError: not a level of the schedule
    if spacing == "trailing":
        assert t[0] == num_steps - 1
        assert all(abs(t[i] - (num_steps - num_steps * i / n - 1)) <= 0.5 + 1e-9 for i in range(n))
        assert torch.equal(sigmas, schedule.steps(n))
    elif spacing == "leading":
        assert t == [i * (num_steps // n) for i in reversed(range(n))]
    else:
        assert t[0] == num_steps - 1
        assert n == 1 or all(abs(t[i] - (num_steps - 1) * (1 - i / (n - 1))) <= 0.5 + 1e-9 for i in range(n))
    if n == num_steps:
        assert t == list(reversed(range(num_steps)))


@each_schedule
@pytest.mark.parametrize("num_steps", [37, 1000])
def test_steps_that_do_not_exist(cls: type, num_steps: int) -> None:
    schedule = schedule_of(cls, num_steps)
    for n in (-1, 0, num_steps + 1, 10 * num_steps):
        for spacing in ("trailing", "leading", "linspace"):
            with pytest.raises(ValueError, match=f"^{n} sampling steps .* 1 to {num_steps}$"):
                schedule.steps(n, spacing)
    with pytest.raises(ValueError, match="allowed are trailing, leading, linspace"):
        schedule.steps(5, "cosine")
    with pytest.raises(ValueError, match="num_steps is 0"):
        _ = entry(SCHEDULES, cls).make(0).sigmas


@each_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 37, 1000])
@quick
@given(data=st.data())
def test_t_and_sigma_are_inverse(cls: type, num_steps: int, data: st.DataObject) -> None:
    schedule = schedule_of(cls, num_steps)
    top = num_steps - 1
    t = torch.tensor(data.draw(st.lists(st.floats(0, top), min_size=1, max_size=5), label="t"), dtype=torch.float64)
    sigma = schedule.sigma(t)
    assert sigma.shape == t.shape
    assert (sigma >= schedule.sigmas[0] * (1 - 1e-12)).all()
    assert (sigma <= schedule.sigmas[-1] * (1 + 1e-12)).all()
    close(schedule.t(sigma), t, 1e-8)
    close(schedule.t(sigma[0]), t[0], 1e-8)  # a single level, of shape ()
    torch.testing.assert_close(schedule.sigma(schedule.t(sigma)), sigma, rtol=1e-10, atol=0)


@each_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 37, 1000])
def test_sigma_at_whole_steps_and_between(cls: type, num_steps: int) -> None:
    schedule = schedule_of(cls, num_steps)
    whole = torch.arange(num_steps)
    for t in (whole, whole.float(), whole.double()):
        torch.testing.assert_close(schedule.sigma(t), schedule.sigmas, rtol=1e-12, atol=0)
    close(schedule.t(schedule.sigmas), whole.double(), 1e-8)
    halfway = (schedule.sigmas[:-1] * schedule.sigmas[1:]).sqrt()
    torch.testing.assert_close(schedule.sigma(whole[:-1] + 0.5), halfway, rtol=1e-12, atol=0)
    if num_steps > 1:
        beyond = torch.stack([schedule.sigmas[0] / 2, schedule.sigmas[-1] * 2, torch.zeros((), dtype=torch.float64)])
        assert schedule.t(beyond).tolist() == [0, num_steps - 1, 0]


@each_schedule
@pytest.mark.parametrize(
    "spacing",
    ["trailing", "linspace", "leading"],
)
def test_the_network_sees_unit_variance_at_the_start(cls: type, spacing: str) -> None:
    schedule, noise = schedule_of(cls), normal(2, 2, 2, 2)
    seen = []
    denoiser = Denoiser(Function(lambda x, t, cond: seen.append(x) or x), schedule)
    start = schedule.steps(10, spacing)[0]
    denoiser.predict(schedule.prior(noise, start), start, Cond())
    close(seen[0], noise, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Spacings that are no levels, and lists of steps
# ---------------------------------------------------------------------------------------------------------------------


@each_schedule
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_karras_and_log_spacing(cls: type, n: int) -> None:
    schedule = schedule_of(cls)
    low, high = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    fractions = [i / max(n - 1, 1) for i in range(n)]
    karras = [(high ** (1 / 7) + f * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for f in fractions]
    even = [math.exp(math.log(high) + f * (math.log(low) - math.log(high))) for f in fractions]
    for spacing, expected in (("karras", karras), ("log", even)):
        sigmas = schedule.steps(n, spacing)
        torch.testing.assert_close(sigmas, torch.tensor([*expected, 0.0], dtype=torch.float64), rtol=1e-9, atol=0)
        assert (sigmas.diff() < 0).all()


def test_steps_from_a_list() -> None:
    schedule = schedule_of(LinearSchedule)
    sigmas = schedule.steps([999, 500.5, 0])
    assert float(sigmas[0]) == pytest.approx(float(schedule.sigmas[999]))
    assert float(sigmas[1]) == pytest.approx(float((schedule.sigmas[500] * schedule.sigmas[501]).sqrt()))
    assert sigmas.tolist()[2:] == [pytest.approx(float(schedule.sigmas[0])), 0.0]
    for bad in ([], [3, 5], [5, 5], [1000, 3], [3, -1]):
        with pytest.raises(ValueError, match="allowed are decreasing numbers from 999 to 0"):
            schedule.steps(bad)


# ---------------------------------------------------------------------------------------------------------------------
# Which steps are trained; further weights
# ---------------------------------------------------------------------------------------------------------------------


def test_time_samplers_have_their_distributions() -> None:
    schedule, u = schedule_of(LinearSchedule), (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert torch.equal(Uniform().sample(u, schedule).long().bincount(), torch.full((1000,), 20))
    t = LogitNormal(0.5, 2.0).sample(u, schedule) / 999
    logit = torch.log(t / (1 - t))
    assert float(logit.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(logit.std()) == pytest.approx(2.0, abs=1e-2)
    log_sigma = schedule.sigma(LogNormal(-0.5, 0.5).sample(u, schedule)).log()
    assert float(log_sigma.mean()) == pytest.approx(-0.5, abs=1e-3)
    assert float(log_sigma.std()) == pytest.approx(0.5, abs=1e-2)


def test_stratified_steps_are_spread_evenly() -> None:
    spread = []
    for objective in (Simple(stratified=True), Simple()):
        for first in (0, 12345):  # of any samples that follow one another, in whichever batches
            _, t = objective.draw(normal(100, 1, 1, 1), schedule_of(LinearSchedule), Draws(range(100), range(first, first + 100)))
            spread.append(torch.bincount((t // 50).long(), minlength=20))
    assert all(3 <= int(counts.min()) <= int(counts.max()) <= 7 for counts in spread[:2])
    assert all(int(counts.max()) > 7 for counts in spread[2:])


def test_offset_noise_is_constant_over_an_image() -> None:
    torch.manual_seed(0)
    noise, _ = Simple(offset=0.5).draw(torch.zeros(4000, 2, 8, 8), schedule_of(LinearSchedule), Draws(range(4000)))
    assert float(noise.mean((2, 3)).var()) == pytest.approx(0.25 + 1 / 64, rel=0.05)
    assert float((noise - noise.mean((2, 3), keepdim=True)).var()) == pytest.approx(1 - 1 / 64, rel=0.05)


@quick
@given(log_sigma=st.floats(-6, 6), gamma=st.floats(0, 3), k=st.floats(0.1, 3))
def test_p2_and_edm_weights(log_sigma: float, gamma: float, k: float) -> None:
    sigma = torch.tensor([math.exp(log_sigma)], dtype=torch.float64)
    snr = math.exp(-2 * log_sigma)
    for prediction in PRECONDITIONING:
        denoiser = Denoiser(Function(lambda x, t, cond: x), schedule_of(LinearSchedule), prediction)  # type: ignore[arg-type]
        on_z0 = float(denoiser.output_weight(sigma))
        assert float(P2(gamma=gamma, k=k).weight(denoiser, sigma)) == pytest.approx(snr / (k + snr) ** gamma * on_z0, rel=1e-9)
        assert float(EDM().weight(denoiser, sigma)) == pytest.approx((1 + snr) * on_z0, rel=1e-9)
    velocity = Denoiser(Function(lambda x, t, cond: x), schedule_of(LinearSchedule), "v")
    assert float(EDM().weight(velocity, sigma)) == pytest.approx(1, rel=1e-9), "EDM is v-prediction with log-normal sigmas"


def test_pseudo_huber_is_square_below_and_linear_above() -> None:
    schedule, z0 = schedule_of(LinearSchedule), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for error, expected in ((1e-4, 1e-8), (100.0, 2 * 0.1 * (100 - 0.1))):
        denoiser = Denoiser(Function(lambda x, t, cond, e=error: x * 0 + e), schedule, "x0")
        loss = Simple(huber=0.1).loss(denoiser, z0, z0, torch.tensor([500]), Cond())
        assert float(loss) == pytest.approx(expected, rel=1e-2)


def test_learned_uncertainty_finds_the_logarithm_of_the_loss() -> None:
    """loss / exp(u) + u is least for u = log loss."""
    schedule, scale = schedule_of(LinearSchedule), {100: 0.5, 800: 3.0}
    denoiser = Denoiser(Function(lambda x, t, cond: column(torch.tensor([scale[int(s)] for s in t])).expand_as(x).to(x)), schedule, "x0")
    objective = LearnedUncertainty(Simple())
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    t, z0 = torch.tensor([100, 800]), torch.zeros(2, 1, 1, 1)
    for _ in range(1500):
        optimizer.zero_grad()
        objective.loss(denoiser, z0, z0, t, Cond()).sum().backward()
        optimizer.step()
    least = [1 + math.log(s**2) for s in scale.values()]
    close(objective.loss(denoiser, z0, z0, t, Cond()).double(), torch.tensor(least, dtype=torch.float64), 1e-2)
    close(
        objective.eval().loss(denoiser, z0, z0, t, Cond()).double(), torch.tensor([s**2 for s in scale.values()], dtype=torch.float64), 1e-6
    )


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    x, sigma = MU + normal(5, 3, 1, 1), torch.tensor(0.7, dtype=torch.float64)
    schedule = schedule_of(LinearSchedule)

    def network(x_seen: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return oracle(x_seen * (1 + sigma**2).sqrt(), sigma)

    denoiser = Denoiser(Function(network), schedule, "x0")
    close(denoiser.score(x, sigma, Cond()), -(x - MU) / (C**2 + sigma**2), 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Guidance: interval, rescale, projection
# ---------------------------------------------------------------------------------------------------------------------

ASKED, NOTHING = Cond(vector=normal(3, 2, seed=5)), Cond(vector=normal(3, 2, seed=6))


def test_guidance_interval() -> None:
    x, rows = normal(3, 2, 2, 2), []

    def predict(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        rows.append(len(x))
        return conditional(x, sigma, cond)

    denoise, always = CFG(3.0, low=0.5, high=2.0).guide(predict, ASKED, NOTHING), CFG(3.0).guide(conditional, ASKED, NOTHING)
    for level, inside in ((0.4, False), (0.5, True), (1.0, True), (2.0, True), (2.1, False)):
        sigma = torch.tensor(level, dtype=torch.float64)
        rows.clear()
        close(denoise(x, sigma), always(x, sigma) if inside else conditional(x, sigma, ASKED), 0)
        assert rows == ([6] if inside else [3]), "outside the interval only one prediction is made"


@quick
@given(rescale=st.floats(0.01, 1))
def test_rescaled_guidance_has_the_deviation_of_the_conditional_prediction(rescale: float) -> None:
    x, sigma = normal(3, 2, 4, 4), torch.tensor(1.0, dtype=torch.float64)
    plain, wanted = CFG(5.0).guide(conditional, ASKED, NOTHING)(x, sigma), conditional(x, sigma, ASKED)
    result = CFG(5.0, rescale=rescale).guide(conditional, ASKED, NOTHING)(x, sigma)
    expected = (1 - rescale) * plain.std((1, 2, 3)) + rescale * wanted.std((1, 2, 3))
    close(result.std((1, 2, 3)), expected, 1e-12)


def test_apg_without_its_parts_is_cfg() -> None:
    x, sigma = normal(3, 2, 4, 4), torch.tensor(1.0, dtype=torch.float64)
    same = APG(5.0, parallel=1.0, momentum=0.0).guide(conditional, ASKED, NOTHING)(x, sigma)
    close(same, CFG(5.0).guide(conditional, ASKED, NOTHING)(x, sigma), 1e-12)


def test_apg_moves_at_right_angles_to_the_prediction_and_not_too_far() -> None:
    x, sigma, scale = normal(3, 2, 4, 4), torch.tensor(1.0, dtype=torch.float64), 5.0
    wanted = conditional(x, sigma, ASKED)
    moved = APG(scale, momentum=0.0, radius=0.1).guide(conditional, ASKED, NOTHING)(x, sigma) - wanted
    close((moved * wanted).sum((1, 2, 3)), torch.zeros(3, dtype=torch.float64), 1e-12)
    assert float(moved.flatten(1).norm(dim=1).max()) <= (scale - 1) * 0.1 * (1 + 1e-12)
    guide = APG(scale, parallel=1.0, momentum=-0.5)
    first, second = (guide.guide(conditional, ASKED, NOTHING) for _ in range(2))
    close(first(x, sigma), second(x, sigma), 0)
    difference = wanted - conditional(x, sigma, NOTHING)
    close(first(x, sigma), wanted + (scale - 1) * 0.5 * difference, 1e-12)  # the second step: difference - difference / 2


# ---------------------------------------------------------------------------------------------------------------------
# Samplers with noise, and upwards
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Euler(churn=40), Heun(churn=40), DPMSolverPP2S(0.7), DPMSolverPP2M(1.0), DPMSolverPP3M(1.0)], ids=repr)
def test_noisy_samplers_keep_the_marginals(sampler: Sampler) -> None:
    n, count = 1500, 8_000  # Euler's own error stays below a standard error
    sigmas, generator = grid(n), torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)

    start = MU + (C**2 + sigmas[0] ** 2).sqrt() * noise()
    end = sampler.sample(oracle, start, sigmas, noise)
    variance = (C**2 + sigmas[-1] ** 2).flatten()
    mean_error = (end.mean(0).flatten() - MU.flatten()) / (variance / count).sqrt()
    variance_error = (end.var(0).flatten() - variance) / (variance * math.sqrt(2 / (count - 1)))
    assert mean_error.abs().max() < 3, mean_error
    assert variance_error.abs().max() < 3, variance_error


def variance_of(sampler: Sampler, sigmas: Tensor) -> Tensor:
    """(3,) exactly: the oracle is linear, so that the end is a sum of the start and of all draws, each with its weight."""
    draws = 0

    def counted() -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros(1, 3, 1, 1, dtype=torch.float64)

    sampler.sample(oracle, MU, sigmas, counted)
    number = 0

    def one_each() -> Tensor:
        nonlocal number
        number += 1
        return (torch.arange(draws + 1) == number).double().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    start = MU + (torch.arange(draws + 1) == 0).double().view(-1, 1, 1, 1) * (C**2 + sigmas[0] ** 2).sqrt()
    return (sampler.sample(oracle, start, sigmas, one_each) - MU).square().sum(0).flatten()


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (Ancestral(1.0), 1),
        (DPMSolverPP2S(0.5), 2),
        (DPMSolverPP2S(1.0), 2),
        (DPMSolverPP2M(0.5), 2),
        (DPMSolverPP2M(1.0), 2),
        (DPMSolverPP3M(1.0), 2),
        (RePaint(Ancestral(1.0), 2), 1),
    ],
    ids=repr,
)
def test_variances_of_noisy_samplers_converge_with_their_order(sampler: Sampler, order: int) -> None:
    errors = []
    for n in (80, 160):
        sigmas = grid(n)
        wanted = (C**2 + sigmas[-1] ** 2).flatten()
        errors.append(float(((variance_of(sampler, sigmas) - wanted) / wanted).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - 0.25
    assert errors[1] < 0.1


def test_lcm_denoises_wholly_and_noises_again() -> None:
    sigmas, drawn, x = schedule_of(LDMSchedule).steps(3), [normal(2, 3, 1, 1, seed=s) for s in range(2)], normal(2, 3, 1, 1)
    first = oracle(x, sigmas[0]) + sigmas[1] * drawn[0]
    second = oracle(first, sigmas[1]) + sigmas[2] * drawn[1]
    close(LCM().sample(oracle, x, sigmas, replay(drawn)), oracle(second, sigmas[2]), 1e-12)


def test_inversion_finds_the_noise_that_makes_the_image() -> None:
    errors = []
    for n in (20, 40, 80, 160):
        sigmas = schedule_of(LDMSchedule).steps(n)
        z0 = MU + C * normal(4, 3, 1, 1, seed=8)
        upwards = inverted(sigmas)
        latent = Ancestral(0.0).sample(oracle, z0, upwards, no_noise)
        close(upwards[-1], sigmas[0], 0)
        errors.append(float((Ancestral(0.0).sample(oracle, latent, sigmas, no_noise) - z0).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 5
