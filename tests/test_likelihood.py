"""Likelihoods of Gaussian data, whose entropy is known."""

import math

import pytest
import torch
from test_diffusion import MU, C, normal, oracle
from torch import Tensor

from ldm.diffusion.likelihood import bits_per_dim, log_likelihood, variational_bound
from ldm.diffusion.schedule import KarrasSchedule

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


def test_bins_have_the_probability_of_their_width() -> None:
    """For a fine grid log(probability / width) is the density."""
    z0, sigmas, width = MU + C * normal(4, 3, 1, 1), KarrasSchedule(5, low=0.1).sigmas, 1e-6
    terms = [variational_bound(oracle, z0, sigmas, lambda: normal(4, 3, 1, 1, seed=9), bin_width=w)[0] for w in (0.0, width)]
    torch.testing.assert_close(terms[1] + 3 * math.log(width), terms[0], atol=1e-3, rtol=0)
