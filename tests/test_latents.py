"""Latent spaces and whole models (ldm/latents): what has to match, what stays frozen, that measured latents are normal."""

import pytest
import torch
from conftest import normal, randomise
from toys import autoencoder, latent_diffusion

from ldm.autoencoder.bottleneck import KL
from ldm.conditioning.label import Unconditional
from ldm.diffusion.schedule import LDMSchedule
from ldm.latents.model import LatentDiffusion
from ldm.latents.space import LatentSpace
from ldm.nn.unet import UNet
from ldm.sampling.pipeline import generate
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise


def test_channels_have_to_match() -> None:
    for first, second in ((2, 3), (4, 1)):
        parts = (autoencoder(bottleneck=KL(first)), UNet(second, 4, (1,), 1, ()), Unconditional(), LDMSchedule(5))
        with pytest.raises(ValueError, match=rf"takes {second} latent channels, the first stage makes {first}: leave .*in_channels out"):
            LatentDiffusion(*parts)
    LatentDiffusion(autoencoder(bottleneck=KL(3)), UNet(3, 4, (1,), 1, ()), Unconditional(), LDMSchedule(5))


def test_the_first_stage_stays_frozen() -> None:
    model = latent_diffusion()
    for _ in range(2):
        model.train()
        assert model.denoiser.network.training
        assert model.conditioner.training
        assert not any(module.training for module in model.latents.modules())
    model.latents.train(True)
    assert not any(module.training for module in model.latents.modules())
    assert not any(p.requires_grad for p in model.latents.parameters())
    assert all(p.requires_grad for part in (model.denoiser, model.conditioner) for p in part.parameters())
    x = normal(1, 3, 16, 16).requires_grad_()
    z = model.latents.to_latents(x)
    assert not z.requires_grad
    assert not model.latents.to_images(z.requires_grad_()).requires_grad
    assert not model.latents.moments(x).requires_grad


def test_there_and_back_is_the_decoded_mode() -> None:
    space = LatentSpace(randomise(autoencoder()).double()).double()
    x, noise = normal(3, 3, 16, 8).double(), normal(3, 2, 8, 4, seed=1).double()
    plain = space.autoencoder.decode(space.autoencoder.encode(x).mode())
    torch.testing.assert_close(space.to_images(space.to_latents(x)), plain, rtol=1e-12, atol=1e-12)
    space.measure(torch.tensor([0.3, -20.0]), torch.tensor([0.01, 5.0]), 3, (8, 4))
    torch.testing.assert_close(space.to_images(space.to_latents(x)), plain, rtol=1e-9, atol=1e-9)
    posterior = space.autoencoder.encode(x)
    assert torch.equal(space.to_latents(posterior), space.to_latents(x))
    sampled = space.to_images(space.to_latents(x, noise))
    torch.testing.assert_close(sampled, space.autoencoder.decode(posterior.sample(noise)), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sampled, plain)
    assert torch.equal(space.moments(x), space.autoencoder.moments(x))


def test_measured_latents_have_mean_zero_and_deviation_one() -> None:
    space = LatentSpace(randomise(autoencoder()).double()).double()
    x = 3 * normal(20, 3, 8, 8).double()
    raw = space.autoencoder.encode(x).mode().detach()
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3), unbiased=False)
    assert not torch.allclose(mean, torch.zeros(2).double(), atol=1e-2)
    space.measure(mean, std, 20, (4, 4))
    z = space.to_latents(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(z.std((0, 2, 3), unbiased=False), torch.ones(2).double(), rtol=0, atol=1e-10)
    assert (int(space.count), space.size.tolist()) == (20, [4, 4])


def test_nothing_starts_before_the_latents_are_measured() -> None:
    model = LatentDiffusion(autoencoder(), UNet(2, 4, (1,), 1, ()), Unconditional(), LDMSchedule(5))
    assert not model.latents.measured
    with pytest.raises(ValueError, match=r"no latent statistics.*ldm fit"):
        model.latents.require_measured()
    with pytest.raises(ValueError, match="no latent statistics"):
        generate(model, [SampleRequest(0, SeedNoise())], SamplingConfig(steps=1))
    good = (torch.zeros(2), torch.ones(2), 1)
    for bad in ({0: torch.tensor([0.0, torch.nan])}, {1: torch.tensor([1.0, 0.0])}, {1: torch.tensor([torch.nan, 1.0])}, {2: 0}):
        mean, std, number = (bad.get(i, value) for i, value in enumerate(good))
        with pytest.raises(ValueError, match="train it again"):
            model.latents.measure(mean, std, number, (8, 8))
        assert not model.latents.measured
    model.latents.measure(*good, (8, 8))
    model.latents.require_measured()
    assert generate(model, [SampleRequest(0, SeedNoise())], SamplingConfig(steps=1)).shape == (1, 3, 16, 16)
