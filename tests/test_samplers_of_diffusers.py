"""Our samplers against diffusers' schedulers: the same network, noise and steps give the same trajectory.

Where they differ on purpose:
- diffusers' DEIS ends above sigma = 0; its UniPC lowers its order step by step before the end.  Compared are the states before.
- its third-order DPM-Solver++ halves the second derivative (and converges with order 2); not compared, ours is of order 3.
- its singlestep solver counts calls as steps and puts the second one on the next level, and its last step is of first order: compared are
  the steps before, on levels that are even in log sigma, every second of which is one of ours.
- its Euler and Heun add the noise of s_churn after the network was called without it; ours is held to the paper (Algorithm 2,
  arXiv:2206.00364).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles import normal, wavy
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.multistep import DEIS, LMS, PLMS, UniPC
from ldm.diffusion.samplers import Ancestral, DPMSolverPP2M, DPMSolverPP2S, Euler, Heun
from ldm.diffusion.schedule import LDMSchedule
from ldm.interfaces import Cond, Network, Sampler

diffusers = pytest.importorskip("diffusers")
DRAWS = [normal(2, 2, 4, 4, seed=100 + i) for i in range(20)]
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE = LDMSchedule()


class Wavy(Network):
    in_channels = 2

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return wavy(x, t)


def ours(sampler: Sampler, sigmas: Tensor, noise: Tensor, draws: list[Tensor]) -> list[Tensor]:
    """The states in the variance-preserving variables."""
    denoiser, left = Denoiser(Wavy(), SCHEDULE), iter(draws)
    states = sampler.steps(lambda x, s: denoiser.predict(x, s, Cond()), SCHEDULE.prior(noise, sigmas[0]), sigmas, lambda: next(left))
    return [x / (1 + sigma**2).sqrt() for x, sigma in zip(states, sigmas[1:], strict=True)]


def theirs(scheduler: Any, noise: Tensor, in_sigma: bool, draws: str | None, **options: Any) -> list[Tensor]:
    """The same; some of their schedulers count in x = z0 + sigma * eps."""
    start = SCHEDULE.sigmas[int(scheduler.timesteps[0])]
    x, states = SCHEDULE.prior(noise, start) if in_sigma else noise, []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        drawn = {draws: DRAWS[i]} if draws else {}
        x = scheduler.step(wavy(seen, t.double().expand(len(x))).to(x), t, x, **drawn, **options).prev_sample
        sigma = scheduler.sigmas[i + 1].double() if in_sigma else torch.zeros(())
        states.append(x / (1 + sigma**2).sqrt())
    return states


@dataclass
class Case:
    sampler: Sampler
    scheduler: Callable[[], Any]
    in_sigma: bool = False
    leave_out: int = 0  # last states that are not compared
    every: int = 1  # of their states one of ours
    skip: int = 0  # first states of theirs that are provisional
    draws: str | None = None  # how their step is given noise
    options: dict[str, Any] = field(default_factory=dict)


def make(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**BETAS, **options)


TRAILING: dict[str, Any] = {"timestep_spacing": "trailing"}
CASES = {
    "DDIM": Case(Ancestral(0.0), make("DDIMScheduler", clip_sample=False, **TRAILING)),
    "Euler": Case(Euler(), make("EulerDiscreteScheduler", **TRAILING), in_sigma=True),
    "Heun": Case(Heun(), make("HeunDiscreteScheduler", **TRAILING), in_sigma=True, every=2),
    "DPM-Solver++ 2M": Case(
        DPMSolverPP2M(),
        make("DPMSolverMultistepScheduler", final_sigmas_type="zero", lower_order_final=False, euler_at_final=True, **TRAILING),
    ),
    "UniPC-2": Case(
        UniPC(2),
        make("UniPCMultistepScheduler", solver_order=2, final_sigmas_type="zero", lower_order_final=False, **TRAILING),
        leave_out=1,
    ),
    "UniPC-3": Case(UniPC(3), make("UniPCMultistepScheduler", solver_order=3, final_sigmas_type="zero", **TRAILING), leave_out=2),
    "DDIM, eta 0.6": Case(
        Ancestral(0.6), make("DDIMScheduler", clip_sample=False, **TRAILING), draws="variance_noise", options={"eta": 0.6}
    ),
    "DDPM": Case(Ancestral(1.0), make("DDPMScheduler", clip_sample=False, **TRAILING), draws="generator"),
    "Euler ancestral": Case(Ancestral(1.0), make("EulerAncestralDiscreteScheduler", **TRAILING), in_sigma=True, draws="generator"),
    "SDE-DPM-Solver++ 2M": Case(
        DPMSolverPP2M(1.0),
        make("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", final_sigmas_type="zero", euler_at_final=True, **TRAILING),
        draws="variance_noise",
    ),
    "PNDM": Case(PLMS(), make("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=True, **TRAILING), skip=1),
    "LMS": Case(LMS(4), make("LMSDiscreteScheduler", **TRAILING), in_sigma=True),
    "DEIS-2": Case(DEIS(2), make("DEISMultistepScheduler", solver_order=2, lower_order_final=False, **TRAILING), leave_out=1),
    "DEIS-3": Case(DEIS(3), make("DEISMultistepScheduler", solver_order=3, lower_order_final=False, **TRAILING), leave_out=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [10, 20])
def test_trajectories_are_those_of_diffusers(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("scheduling_ddpm", "scheduling_euler_ancestral_discrete"):  # they draw noise themselves; `generator` is our draw
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *shape, generator, **options: generator)
    case, noise = CASES[name], normal(2, 2, 4, 4)
    scheduler = case.scheduler()
    scheduler.set_timesteps(n)
    mine = ours(case.sampler, SCHEDULE.steps(n), noise, DRAWS)
    other = theirs(scheduler, noise, case.in_sigma, case.draws, **case.options)[case.skip :]
    other = [*other[case.every - 1 : -1 : case.every], other[-1]]
    assert len(mine) == len(other) == n
    for a, b in list(zip(mine, other, strict=True))[: n - case.leave_out]:
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


@pytest.mark.parametrize("n", [5, 10])
def test_singlestep_trajectories_are_those_of_diffusers(n: int) -> None:
    options = {"use_exponential_sigmas": True, "solver_type": "midpoint", "final_sigmas_type": "zero"}
    scheduler, noise = make("DPMSolverSinglestepScheduler", solver_order=2, **options)(), normal(2, 2, 4, 4)
    scheduler.set_timesteps(2 * n)
    levels = scheduler.sigmas.double()
    mine = ours(DPMSolverPP2S(), torch.cat([levels[:-1:2], levels[-1:]]), noise, [])
    x, other = noise, []
    for sigma, t in zip(levels, scheduler.timesteps, strict=False):  # their t are rounded
        x = scheduler.step(wavy(x, SCHEDULE.t(sigma).expand(len(x))).to(x), t, x).prev_sample
        other.append(x)
    for a, b in list(zip(mine, other[1::2], strict=True))[:-1]:
        assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())
