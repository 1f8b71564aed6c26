"""How probable a latent diffusion model thinks latents are: diffusion/likelihood.py for a whole model."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.guidance import CFG
from ldm.diffusion.likelihood import Bins, log_likelihood, variational_bound
from ldm.diffusion.variance import LearnedNoise
from ldm.interfaces import Batch, Denoise, Noise
from ldm.latents.model import LatentDiffusion


def bound(model: LatentDiffusion, batch: Batch, z0: Tensor, levels: Tensor, noise: Noise) -> Tensor:
    """Terms (T+1,B) of the variational bound of latents z0, with the variances that the network has learned, if it has."""
    learned = LearnedNoise(model.denoiser, levels, noise)
    denoise = model.guided(batch, CFG(1.0), predict=learned.predict)
    fraction = (lambda: learned.fraction) if model.denoiser.network.learn_variance else None
    return variational_bound(denoise, z0, levels, noise, model.latents.bins, fraction)


def density(denoise: Denoise, z0: Tensor, places: Tensor, noise: Callable[[], Tensor], bins: Bins | None) -> Tensor:
    """log p(z0) (B,) by the ODE, or the logarithm of the probability of its bin: then z0 gets uniform noise within that."""
    if bins is None:
        return log_likelihood(denoise, z0, places, lambda: noise().sign())
    uniform = torch.special.ndtr(noise()) - 0.5
    found = log_likelihood(denoise, z0 + bins.width * uniform, places, lambda: noise().sign())
    return found + float(bins.width.double().log().expand_as(z0[0]).sum())
