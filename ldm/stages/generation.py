"""The single way in which pictures are made, and the table of contents of the paper:

noise -> schedule.prior -> sampler(guidance(denoiser, cond, null)) -> latents.to_images
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ldm import model_folder
from ldm.diffusion.guidance import CFG
from ldm.diffusion.samplers import DPMSolverPP2M
from ldm.diffusion.schedule import Spacing
from ldm.diffusion.variance import LearnedNoise
from ldm.interfaces import Batch, Guidance, Sampler
from ldm.stages.model import LatentDiffusion

LANES = 8  # images per network call, the last call padded: arithmetic of another batch size rounds differently


@dataclass(frozen=True)
class Request:
    """One picture: everything random in it comes from (seed, index)."""

    index: int
    seed: int = 0
    condition: str | int | None = None
    negative: str | int | None = None  # what guidance leads away from; None: from no condition

    def noise(self, shape: Sequence[int]) -> Callable[[], Tensor]:
        """Standard normal draws of this picture, one after the other."""
        generator = np.random.default_rng([self.seed, self.index])
        return lambda: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class Recipe:
    """How pictures are sampled."""

    sampler: Sampler = field(default_factory=DPMSolverPP2M)
    guidance: Guidance = field(default_factory=CFG)
    steps: int = 25
    spacing: Spacing = "trailing"

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> "Recipe":
        """The one that a model's card has."""
        return cls(**model_folder.build(card["recipe"]))


@torch.inference_mode(False)  # a guidance may need gradients
@torch.no_grad()
def generate(
    model: LatentDiffusion, requests: Sequence[Request], recipe: Recipe, classes: Sequence[str] = (), lanes: int = LANES,
    progress: Callable[[], Any] = lambda: None,
) -> Tensor:  # fmt: skip
    """(N,3,H,W) in [-1,1]; the bits of picture i do not depend on which others are made with it.  progress() after each step."""
    model.latents.require_measured()
    pictures = []
    for start in range(0, len(requests), lanes):
        some = list(requests[start : start + lanes])
        padded = some + some[-1:] * (lanes - len(some))
        pictures.append(_generate(model, padded, recipe, list(classes), progress)[: len(some)])
    return torch.cat(pictures)


def _generate(model: LatentDiffusion, requests: list[Request], recipe: Recipe, classes: list[str], progress: Callable[[], Any]) -> Tensor:
    latents, denoiser, device = model.latents, model.denoiser, model.latents.shift.device
    shape = (latents.autoencoder.channels, *latents.size.tolist())
    draws = [request.noise(shape) for request in requests]

    def noise() -> Tensor:
        return torch.stack([draw() for draw in draws]).to(device)

    def batch(wanted: list[str | int | None]) -> Batch:
        asked = [model.conditioner.request(condition, classes) for condition in wanted]
        return {key: torch.tensor([entry[key] for entry in asked], device=device) for key in asked[0]}

    asked, negatives = batch([request.condition for request in requests]), [request.negative for request in requests]
    negative = batch(negatives) if any(wanted is not None for wanted in negatives) else None
    sigmas = denoiser.schedule.steps(recipe.steps, recipe.spacing)
    z = denoiser.schedule.prior(noise(), sigmas[0])
    learned = LearnedNoise(denoiser, sigmas, noise) if denoiser.network.learn_variance else None
    denoise = model.guided(asked, recipe.guidance, negative, learned.predict if learned else None)
    for state in recipe.sampler.steps(denoise, z, sigmas, learned.noise if learned else noise):
        z = state
        progress()
    return latents.to_images(z).clamp(-1, 1)


class Generation(L.LightningModule):
    """`generate` for a Trainer: predict_step takes positions in `requests` and returns those requests and their images."""

    def __init__(
        self, model: LatentDiffusion, requests: Sequence[Request], recipe: Recipe, classes: Sequence[str], lanes: int,
        progress: Callable[[], Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.requests, self.recipe, self.classes = model, requests, recipe, classes
        self.lanes, self.progress = lanes, progress

    def predict_step(self, batch: list[int], batch_idx: int) -> tuple[list[Request], Tensor]:
        requests = [self.requests[position] for position in batch]
        return requests, generate(self.model, requests, self.recipe, self.classes, self.lanes, self.progress)
