"""Learned variances, steps drawn by their loss, distillation, classifier guidance: each against something exact."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import C, Function, close, conditional, normal, oracle, quick, replay
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.distillation import ProgressiveDistillation
from ldm.diffusion.guidance import APG, CFG, ClassifierGuidance
from ldm.diffusion.objective import Importance, Simple
from ldm.diffusion.samplers import Ancestral
from ldm.diffusion.schedule import LDMSchedule, LinearSchedule
from ldm.diffusion.variance import LearnedNoise, LearnedVariance, log_variances
from ldm.draws import Draws
from ldm.interfaces import Cond

# ---------------------------------------------------------------------------------------------------------------------
# Learned variances
# ---------------------------------------------------------------------------------------------------------------------


@quick
@given(t=st.integers(1, 999))
def test_both_variances_are_those_of_ddpm(t: int) -> None:
    schedule = LinearSchedule()
    beta, alpha_bar = schedule.betas(), 1 / (1 + schedule.sigmas**2)
    small, large = log_variances(schedule.sigmas[t], schedule.sigmas[t - 1])
    posterior = beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])  # Eq. 7, arXiv:2006.11239
    close(small.exp() * alpha_bar[t - 1], posterior, 1e-9)
    close(large.exp() * alpha_bar[t - 1], beta[t], 1e-9)


class Wavy(nn.Module):
    """eps and the fraction of the variance, of the step alone and of x."""

    learn_variance = True

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.cat([torch.sin(1.3 * x) + 0.2 * x, torch.tanh(x.flip(1) + (t / 300).view(-1, 1, 1, 1))], dim=1)


@pytest.mark.parametrize("n", [10, 1000])
def test_sampling_is_that_of_diffusers(n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule, network = LinearSchedule(), Wavy()
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    draws = [normal(2, 2, 4, 4, seed=100 + i) for i in range(n)]
    start = normal(2, 2, 4, 4)
    sigmas = schedule.steps(n)
    learned = LearnedNoise(Denoiser(network, schedule), sigmas, replay(draws))  # type: ignore[arg-type]
    z = Ancestral(1.0).sample(lambda x, s: learned.predict(x, s, Cond()), schedule.prior(start, sigmas[0]), sigmas, learned.noise)
    x, left = start, iter(draws)
    for t, t_next in pairwise([*scheduler.timesteps.tolist(), -1]):
        output = network(x, torch.full((2,), float(t), dtype=torch.float64), Cond())
        clean = scheduler.step(output, t, x).pred_original_sample
        # its noise is drawn inside: the mean is Eq. 7 of arXiv:2006.11239, for its estimate of x0
        log_variance = scheduler._get_variance(t, predicted_variance=output[:, 2:])
        a, a_next = scheduler.alphas_cumprod[t].double(), scheduler.alphas_cumprod[t_next].double() if t_next >= 0 else torch.ones(())
        beta = 1 - a / a_next
        x = a_next.sqrt() * beta / (1 - a) * clean + (a / a_next).sqrt() * (1 - a_next) / (1 - a) * x
        if t_next >= 0:
            x = x + torch.exp(0.5 * log_variance.double()) * next(left)
    close(z, x, 1e-4)


def test_the_bound_is_the_divergence_of_two_normal_distributions() -> None:
    schedule = LinearSchedule()
    denoiser = Denoiser(Wavy(), schedule)  # type: ignore[arg-type]
    t = torch.tensor([0, 1, 37, 999])
    sigma, z0 = schedule.sigma(t), normal(4, 2, 3, 3)
    x = z0 + sigma.view(-1, 1, 1, 1) * normal(4, 2, 3, 3, seed=1)
    output = denoiser.raw(x, sigma, Cond())
    guess = denoiser.z0(x, sigma, output)
    found = LearnedVariance.bound(denoiser, (z0 - guess).square(), output[:, 2:], sigma)
    beta, alpha_bar = schedule.betas(), 1 / (1 + schedule.sigmas**2)
    for i, step in enumerate(t.tolist()):
        before = alpha_bar[step - 1] if step else torch.ones((), dtype=torch.float64)

        def mean(z: Tensor, i: int = i, step: int = step, before: Tensor = before) -> Tensor:  # in variables of variance 1
            seen = x[i] * alpha_bar[step].sqrt()
            return (before.sqrt() * beta[step] * z + (1 - beta[step]).sqrt() * (1 - before) * seen) / (1 - alpha_bar[step])

        posterior = beta[step] * (1 - before) / (1 - alpha_bar[step])
        if step == 0:
            posterior = beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
        variance = torch.exp(torch.lerp(posterior.log(), beta[step].log(), (output[i, 2:] + 1) / 2))
        model = torch.distributions.Normal(mean(guess[i]), variance.sqrt())
        if step == 0:
            close(found[i], -model.log_prob(z0[i]), 1e-8)
        else:
            truth = torch.distributions.Normal(mean(z0[i]), posterior.sqrt().expand_as(z0[i]))
            close(found[i], torch.distributions.kl_divergence(truth, model), 1e-8)


def test_the_bound_trains_the_variance_alone_and_the_objective_the_mean_alone() -> None:
    schedule, z0, noise, t = LDMSchedule(), normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([0.0, 400.0, 999.0])
    output = normal(3, 4, 4, 4, seed=2).requires_grad_()
    denoiser = Denoiser(Function(lambda x, t, cond: output), schedule)  # type: ignore[arg-type]
    loss = LearnedVariance(Simple(), weight=0.5).loss(denoiser, z0, noise, t, Cond())
    (both,) = torch.autograd.grad(loss.sum(), output)
    (mean,) = torch.autograd.grad(Simple().loss(denoiser, z0, noise, t, Cond()).sum(), output)
    close(both[:, :2], mean[:, :2], 1e-12)
    assert (both[:, 2:] != 0).all()
    assert (mean[:, 2:] == 0).all()
    with pytest.raises(ValueError, match="learn_variance to true"):
        LearnedVariance(Simple()).loss(Denoiser(Function(lambda x, t, cond: x), schedule), z0, noise, t, Cond())  # type: ignore[arg-type]


def test_the_best_variance_of_a_perfect_mean_is_the_posteriors() -> None:
    schedule, sigma = LinearSchedule(), LinearSchedule().sigma(torch.tensor([500]))
    denoiser = Denoiser(Wavy(), schedule)  # type: ignore[arg-type]
    fractions = torch.linspace(-1, 1, 9, dtype=torch.float64).view(9, 1, 1, 1)
    bounds = LearnedVariance.bound(denoiser, torch.zeros(9, 1, 1, 1), fractions, sigma.expand(9)).flatten()
    assert float(bounds[0]) == pytest.approx(0, abs=1e-12)
    assert (bounds.diff() > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Steps drawn by their loss
# ---------------------------------------------------------------------------------------------------------------------


class Known(Simple):
    """A loss that is (1 + t)^2 at step t."""

    def error(self, denoiser: Any, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
        return (1 + denoiser.schedule.t(sigma)) ** 2


def test_importance_keeps_the_mean_of_the_loss_and_lowers_its_variance() -> None:
    torch.manual_seed(0)
    schedule = LinearSchedule(num_steps=50)
    denoiser = Denoiser(Function(lambda x, t, cond: x), schedule)  # type: ignore[arg-type]
    objective, z0, losses = Importance(Known(), bins=25, memory=5), torch.zeros(2000, 1, 1, 1), []
    truth = (1 + torch.arange(50, dtype=torch.float64)).square()
    for step in range(40):
        noise, t = objective.draw(z0, schedule, Draws(range(2000 * step, 2000 * step + 2000)))
        losses.append(objective.loss(denoiser, z0, noise, t, Cond()).double())
    assert torch.isfinite(torch.stack(losses)).all()
    found = torch.cat(losses[20:])
    assert float(found.mean()) == pytest.approx(float(truth.mean()), abs=4 * float(found.std()) / math.sqrt(len(found)))
    assert float(found.std()) < 0.2 * float(truth.std())
    wanted = truth.square().view(25, 2).mean(1).sqrt()
    torch.testing.assert_close(objective.chances().double(), wanted / wanted.sum(), rtol=0.1, atol=1e-3)
    _, t = objective.draw(z0, schedule, Draws(range(2000)))
    drawn = torch.bincount((t / 2).long(), minlength=25) / len(t)
    assert float((drawn - objective.chances()).abs().max()) < 4 * math.sqrt(0.12 / 2000)
    objective.eval()
    torch.testing.assert_close(objective.loss(denoiser, z0[:50], z0[:50], torch.arange(50), Cond()).double(), truth, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------------------------------


def test_a_student_of_the_oracle_ends_where_the_oracle_does() -> None:
    schedule, steps, substeps = LinearSchedule(), 4, 8
    z0, noise = normal(64, 3, 1, 1), normal(64, 3, 1, 1, seed=1)
    objective = ProgressiveDistillation(Simple(), teacher="-", steps=steps, substeps=substeps)
    _, t = objective.draw(z0, schedule, Draws(range(64)))
    coarse, fine = schedule.steps(steps), schedule.steps(steps * substeps)
    assert set(schedule.sigma(t).tolist()) <= set(schedule.sigma(schedule.t(coarse[:-1])).tolist())
    targets: dict[str, Tensor] = {}

    class Recorded(Simple):
        def error(self, denoiser: Any, output: Tensor, x: Tensor, z0: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
            targets.update(x=x, z0=z0, sigma=sigma)
            return super().error(denoiser, output, x, z0, sigma)

    objective.objective = Recorded()
    denoiser = Denoiser(Function(lambda x, t, cond: x), schedule, "x0")  # type: ignore[arg-type]

    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        return oracle(x, sigma.view(-1, 1, 1, 1))

    loss = objective.loss(denoiser, z0, noise, t, Cond(), teacher)
    assert loss.shape == (64,)
    for i in range(64):
        step = int((coarse[:-1] - targets["sigma"][i]).abs().argmin())
        part = fine[step * substeps : (step + 1) * substeps + 1]
        x = targets["x"][i : i + 1]
        end = Ancestral().sample(oracle, x, part, replay([]))
        one = Ancestral().sample(lambda x, s, i=i: targets["z0"][i : i + 1], x, coarse[step : step + 2], replay([]))
        close(one, end, 1e-8)


def test_guidance_takes_a_noise_level_for_each_sample() -> None:
    x, levels = normal(3, 2, 4, 4), torch.tensor([0.4, 1.0, 3.0], dtype=torch.float64)
    asked, nothing = Cond(vector=normal(3, 2, seed=5)), Cond(vector=normal(3, 2, seed=6))

    def predict(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return conditional(x, sigma.view(-1, 1, 1, 1), cond)

    for guidance in (CFG(3.0), CFG(3.0, low=0.5, high=2.0, rescale=0.5), APG(2.0, low=2.0)):
        together = guidance.guide(predict, asked, nothing)(x, levels)
        for i, level in enumerate(levels):
            one = guidance.guide(predict, asked[i : i + 1], nothing[i : i + 1])(x[i : i + 1], level)
            close(together[i : i + 1], one, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Classifier guidance
# ---------------------------------------------------------------------------------------------------------------------


def test_classifier_guidance_turns_the_oracle_of_a_mixture_into_that_of_a_class() -> None:
    """Two classes N(+-2, C^2) alike: the unconditional D and the class' log-probability in closed form give the class' own D."""
    x, sigma = 2 * normal(5, 3, 1, 1), torch.tensor(0.8, dtype=torch.float64)
    centres = torch.tensor([2.0, -2.0], dtype=torch.float64)

    def posterior(x: Tensor) -> Tensor:
        log_p = torch.stack([-0.5 * ((x - c).square() / (C**2 + sigma**2)).sum((1, 2, 3)) for c in centres], dim=1)
        return log_p.log_softmax(1)

    def of_class(x: Tensor, centre: Tensor) -> Tensor:
        return centre + C**2 / (C**2 + sigma**2) * (x - centre)

    def mixture(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        weights = posterior(x).exp()
        return sum((weights[:, i].view(-1, 1, 1, 1) * of_class(x, c) for i, c in enumerate(centres)), torch.zeros(()))

    def gradient(x: Tensor, sigma: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(posterior(x)[:, 1].sum(), x)[0]

    guided = ClassifierGuidance("-").guide(mixture, Cond(), Cond(), gradient)(x, sigma)
    close(guided, of_class(x, centres[1]), 1e-10)
    asked, nothing = Cond(vector=normal(3, 2, seed=5)), Cond(vector=normal(3, 2, seed=6))
    y = normal(3, 2, 2, 2)
    for told, expected in ((True, asked), (False, nothing)):
        denoise = ClassifierGuidance("-", scale=0.0, conditional=told).guide(conditional, asked, nothing, gradient)
        close(denoise(y, sigma), conditional(y, sigma, expected), 0)
