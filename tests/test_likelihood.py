"""Likelihoods of Gaussian data, whose entropy is known."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from oracles import MU, C, normal, oracle
from torch import Tensor

from ldm import model_folder
from ldm.autoencoder.pixels import Pixels
from ldm.cli import main
from ldm.conditioning.label import Unconditional
from ldm.data.images import DigitImages
from ldm.diffusion.likelihood import Bins, bits_per_dim, log_likelihood, variational_bound
from ldm.diffusion.schedule import KarrasSchedule, LDMSchedule
from ldm.diffusion.variance import data_variance, step_kl, step_variance
from ldm.latents.model import LatentDiffusion
from ldm.nn.unet import UNet
from ldm.ranges import to_float
from ldm.sampling.request import SamplingConfig

ENTROPY = float((0.5 * torch.log2(2 * math.pi * math.e * C**2)).mean())  # bits per dimension
LOW = 1e-3


def signs(like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=torch.Generator().manual_seed(1)).to(like) * 2 - 1


def log_density(z0: Tensor) -> Tensor:
    return torch.distributions.Normal(MU, C).log_prob(z0).flatten(1).sum(1)


def test_the_ode_gives_the_density() -> None:
    z0 = MU + C * normal(5, 3, 1, 1)
    sigmas = KarrasSchedule(2000, low=LOW, high=2000.0).sigmas
    found = log_likelihood(oracle, z0, sigmas, lambda: signs(z0))
    torch.testing.assert_close(found, log_density(z0), atol=1e-3 * 3 * math.log(2), rtol=0)


def test_the_ode_gives_the_entropy_in_bits_per_dim() -> None:
    """z0 at the quantiles of its distribution, so that the mean of -log p is the entropy without sampling noise."""
    quantiles = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).view(-1, 1, 1, 1)
    z0 = MU + C * quantiles
    z0 = MU + (z0 - MU) / (z0 - MU).square().mean(0, keepdim=True).sqrt() * C
    sigmas = KarrasSchedule(500, low=LOW, high=2000.0).sigmas
    found = float(bits_per_dim(-log_likelihood(oracle, z0, sigmas, lambda: signs(z0)), z0))
    assert found == pytest.approx(ENTROPY, abs=1e-3)


def test_the_bound_falls_to_the_entropy_like_one_over_the_steps() -> None:
    gaps, z0 = [], MU + C * normal(1000, 3, 1, 1, seed=3)
    for steps in (200, 800, 3200):
        generator, sigmas = torch.Generator().manual_seed(2), torch.logspace(-3, 3.3, steps, dtype=torch.float64)
        terms = variational_bound(oracle, z0, sigmas, lambda g=generator: torch.randn(z0.shape, generator=g, dtype=z0.dtype))
        assert terms.shape == (steps + 1, 1000)
        assert (terms[1:] >= 0).all()
        gaps.append(float(bits_per_dim(terms.sum(0) + log_density(z0), z0)))
    assert gaps[0] / gaps[1] == pytest.approx(4, abs=0.5)
    assert gaps[1] / gaps[2] == pytest.approx(4, abs=0.5)


def test_the_true_variances_make_the_bound_the_entropy() -> None:
    """The reverse steps of Gaussian data are Gaussian: with their variances few levels are enough, with the posterior's they are not."""
    sigmas, z0 = torch.tensor([0.5, 1.0, 3.0, 20.0, 500.0], dtype=torch.float64), MU + C * normal(200_000, 3, 1, 1, seed=4)
    last = sigmas[0]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal last
        last = sigma
        return oracle(x, sigma)

    def fraction() -> Tensor:
        true = C**2 * last**2 / (C**2 + last**2)  # variance of z0, given x
        if last == sigmas[0]:
            low, high = (data_variance(last, sigmas[1], torch.full_like(C, end)) for end in (-1.0, 1.0))
        else:
            below = sigmas[sigmas < last][-1]
            low, high = (step_variance(last, below, torch.full_like(C, end)) for end in (-1.0, 1.0))
            true = true * (1 - (below / last) ** 2) ** 2 + below**2 * (1 - (below / last) ** 2)
        return (2 * (true.log() - low) / (high - low) - 1).expand_as(z0)

    def gap(learned: Callable[[], Tensor] | None) -> float:
        generator = torch.Generator().manual_seed(2)
        terms = variational_bound(denoise, z0, sigmas, lambda: torch.randn(z0.shape, generator=generator).double(), learned=learned)
        return float(bits_per_dim(terms.sum(0) + log_density(z0), z0))

    assert gap(fraction) == pytest.approx(0, abs=0.005)
    assert gap(None) > 0.3


def test_bins_have_the_probability_of_their_width() -> None:
    """For a fine grid log(probability / width) is the density."""
    z0, sigmas, width = MU + C * normal(4, 3, 1, 1), KarrasSchedule(5, low=0.1).sigmas, torch.tensor([1e-6, 2e-6, 3e-6]).view(3, 1, 1)
    far = torch.full_like(width, 1e3)
    bins = Bins(width, -far, far)
    terms = [variational_bound(oracle, z0, sigmas, lambda: normal(4, 3, 1, 1, seed=9), b)[0] for b in (None, bins)]
    torch.testing.assert_close(terms[1] + float(width.double().log().sum()), terms[0], atol=1e-3, rtol=0)


def test_the_bins_of_a_whole_range_have_probability_1() -> None:
    """The outermost ones are open; whatever D is, as long as it does not depend on z0."""
    sigmas, values = torch.tensor([0.7, 2.0], dtype=torch.float64), torch.arange(-3.0, 4.0, dtype=torch.float64)
    bins = Bins(*(torch.tensor(a).view(1, 1, 1) for a in (1.0, -3.0, 3.0)))
    grid = values.view(-1, 1, 1, 1)
    start = variational_bound(lambda x, sigma: 0 * x + 2.2, grid, sigmas, lambda: 0 * grid, bins)[0]
    assert float(torch.exp(-start).sum()) == pytest.approx(1, abs=1e-9)


def test_likelihoods_from_the_command_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model of classes, and of one in pixels whose D, untrained, is 0: 8-bit images of which it knows nothing."""
    latent = ["likelihood", str(trained / "diffusion" / "model"), "--images=digits", "--device=cpu"]
    assert main([*latent, "--n=3", "--steps=20", "--ode-steps=4", "--out", str(tmp_path / "latent.json")]) == 0
    assert "3 images of digits, latents, 20 noise levels" in capsys.readouterr().out
    found = json.loads((tmp_path / "latent.json").read_text())
    assert found["bits/dim, bound"] == pytest.approx(sum(term["bits"] for term in found["terms"]) + found["prior"])
    assert math.isfinite(found["bits/dim, ODE"])
    model = LatentDiffusion(Pixels(), UNet(3, 8, (1,), 1, ()), Unconditional(), LDMSchedule(100), "x0")
    model.latents.measure(torch.tensor([0.1, 0.0, -0.1]), torch.tensor([0.5, 0.4, 0.3]), 10, (32, 32))
    card = {"stage": "DiffusionStage", "classes": [], "size": 32, "sampling": SamplingConfig().described()}
    model_folder.save(model, tmp_path / "pixels", card)
    command = ["likelihood", str(tmp_path / "pixels"), "--images=digits", "--n=2", "--device=cpu"]
    assert main([*command, "--ode-steps=50", "--out", str(tmp_path / "pixels.json")]) == 0
    assert "2 images of digits, 8-bit images, 100 noise levels" in capsys.readouterr().out
    found = json.loads((tmp_path / "pixels.json").read_text())
    x = to_float(torch.stack([DigitImages(32).pixels(i) for i in (0, len(DigitImages(32)) - 1)]))
    z = (x - torch.tensor([0.1, 0.0, -0.1]).view(3, 1, 1)) / torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    sigmas = LDMSchedule(100).sigmas
    weights = sum(0.5 * float(low**-2 - high**-2) for low, high in pairwise(sigmas))
    assert sum(term["bits"] for term in found["terms"][1:]) == pytest.approx(weights * float(z.square().mean()) / math.log(2), rel=1e-4)
    model = LatentDiffusion(Pixels(), UNet(3, 8, (1,), 1, (), learn_variance=True), Unconditional(), LDMSchedule(100), "x0")
    model.latents.measure(torch.tensor([0.1, 0.0, -0.1]), torch.tensor([0.5, 0.4, 0.3]), 10, (32, 32))
    model_folder.save(model, tmp_path / "learned", card)
    learned = ["likelihood", str(tmp_path / "learned"), "--images=digits", "--n=2", "--device=cpu"]
    assert main([*learned, "--out", str(tmp_path / "learned.json")]) == 0
    found, middle = json.loads((tmp_path / "learned.json").read_text()), torch.zeros((), dtype=torch.float64)
    nats = sum(step_kl(z.double() ** 2, high, low, step_variance(high, low, middle)).mean() for low, high in pairwise(sigmas.double()))
    assert sum(term["bits"] for term in found["terms"][1:]) == pytest.approx(float(nats) / math.log(2), rel=1e-4)
    assert main([*command, "--n=0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ldm likelihood: --n is 0; allowed is 1 or more"
