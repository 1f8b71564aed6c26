"""The single way in which pictures are made, and the table of contents of the paper:

noise -> schedule.prior -> sampler(guidance(denoiser, cond, null)) -> latents.to_images
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ldm import model_folder
from ldm.diffusion.guidance import CFG
from ldm.diffusion.samplers import DPMSolverPP2M
from ldm.diffusion.schedule import Spacing
from ldm.diffusion.tasks import mixture, slerp, windows
from ldm.diffusion.variance import LearnedNoise
from ldm.interfaces import Batch, Denoise, Given, Guidance, Sampler, Seen, Task
from ldm.labels import label_of
from ldm.stages.latents import LatentSpace
from ldm.stages.model import LatentDiffusion

LANES = 8  # images per network call, the last call padded: arithmetic of another batch size rounds differently


class Source(NamedTuple):
    """An image that a task works on."""

    x: Tensor  # (3,H,W) in [-1,1]
    mask: Tensor | None  # (1,H,W), 1 where the picture is to be made anew; None: everywhere
    facts: dict[str, Any]  # what the picture's settings say of it
    shows: str | int | None = None  # its condition
    other: Tensor | None = None  # a second image (3,H,W)


@dataclass(frozen=True)
class Request:
    """One picture: everything random in it comes from (seed, index)."""

    index: int
    seed: int = 0
    condition: str | int | None = None
    negative: str | int | None = None  # what guidance leads away from; None: from no condition
    source: Source | None = field(default=None, compare=False)
    towards: int | None = None  # another seed, whose noise is mixed in
    mixed: str | int | None = None  # another condition, whose D is mixed in
    share: float = 0.0  # of the other seed, condition or image

    def noise(self, shape: Sequence[int]) -> Callable[[], Tensor]:
        """Standard normal draws of this picture, one after the other."""

        def draws(seed: int) -> Callable[[], Tensor]:
            generator = np.random.default_rng([seed, self.index if self.towards is None else 0])
            return lambda: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

        if self.towards is None:
            return draws(self.seed)
        one, other = draws(self.seed), draws(self.towards)
        return lambda: slerp(one(), other(), self.share)


@dataclass(frozen=True)
class Recipe:
    """How pictures are sampled.  size: height and width in px, of other pictures than those of the training; windows: such are made of
    overlapping windows of the training's size."""

    sampler: Sampler = field(default_factory=DPMSolverPP2M)
    guidance: Guidance = field(default_factory=CFG)
    steps: int | list[float] = 25  # how many, or which (as NoiseSchedule.steps)
    spacing: Spacing = "trailing"
    task: Task | None = None
    size: tuple[int, int] | None = None
    windows: bool = False

    @property
    def num_steps(self) -> int:
        return self.steps if isinstance(self.steps, int) else len(self.steps)

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> "Recipe":
        """The one that a model's card has."""
        return cls(**model_folder.build(card["recipe"]))


@torch.inference_mode(False)  # a guidance may need gradients
@torch.no_grad()
def generate(
    model: LatentDiffusion, requests: Sequence[Request], recipe: Recipe, classes: Sequence[str] = (), lanes: int = LANES,
    progress: Callable[[], Any] = lambda: None, watch: Callable[[Tensor], Any] = lambda z0: None,
) -> Tensor:  # fmt: skip
    """(N,3,H,W) in [-1,1]; the bits of picture i do not depend on which others are made with it.

    progress() after each step; watch(D) after each evaluation, for `lanes` pictures at a time, the last ones repeated.
    """
    model.latents.require_measured()
    pictures = []
    for start in range(0, len(requests), lanes):
        some = list(requests[start : start + lanes])
        padded = some + some[-1:] * (lanes - len(some))
        pictures.append(_generate(model, padded, recipe, list(classes), progress, watch)[: len(some)])
    return torch.cat(pictures)


def _generate(
    model: LatentDiffusion, requests: list[Request], recipe: Recipe, classes: list[str], progress: Callable[[], Any],
    watch: Callable[[Tensor], Any],
) -> Tensor:  # fmt: skip
    latents, denoiser, task = model.latents, model.denoiser, recipe.task
    device, seen, given = latents.shift.device, None, None
    share = torch.tensor([request.share for request in requests], device=device)
    if recipe.windows and model.conditioner.concat_channels:
        raise ValueError("a model that is given images makes larger pictures in one piece: leave windows out")

    def batch(wanted: Sequence[str | int | None]) -> Batch:
        found = batch_of(model, recipe.guidance, wanted, classes)
        return found if seen is None else {**found, "seen": seen}

    if task is not None or model.conditioner.shrinks:
        y, mask = (part.to(device) for part in _sources(requests))
        x, mask = (y, mask) if task is None else task.canvas(y, mask)
        seen = Seen(x, mask) if model.conditioner.shrinks else None
    if task is not None:
        plain = model.guiding(batch([request.source.shows for request in requests if request.source is not None]))
        given = Given(y, x, mask, latents.to_latents(x), plain, latents.decode, _others(requests, latents), share)
    shape = given.z0.shape[1:] if given else (latents.autoencoder.channels, *latents.shape_of(recipe.size))
    draws = [request.noise(shape) for request in requests]

    def noise() -> Tensor:
        return torch.stack([draw() for draw in draws]).to(device)

    sigmas = denoiser.schedule.steps(recipe.steps, recipe.spacing)
    learns = denoiser.network.learn_variance and recipe.sampler.ancestral and not recipe.windows
    learned = LearnedNoise(denoiser, sigmas, noise) if learns else None
    negatives = [request.negative for request in requests]
    negative = batch(negatives) if any(wanted is not None for wanted in negatives) else None
    predict = learned.predict if learned else None

    def guided(wanted: Sequence[str | int | None]) -> Denoise:
        return model.guided(batch(wanted), recipe.guidance, negative, predict)

    denoise = guided([request.condition for request in requests])
    if any(request.mixed is not None for request in requests):
        denoise = mixture(denoise, guided([request.mixed for request in requests]), share)
    if recipe.windows:
        denoise = windows(denoise, latents.shape_of(None))
    if task is not None and given is not None:
        denoise = task.wrap(denoise, given)
        z, sigmas = task.start(given, noise, denoiser.schedule, sigmas)
    else:
        z = denoiser.schedule.prior(noise(), sigmas[0])

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        z0 = denoise(x, sigma)
        watch(z0)
        return z0

    for state in recipe.sampler.steps(watched, z, sigmas, learned.noise if learned else noise):
        z = state
        progress()
    for _ in range(recipe.num_steps + 1 - len(sigmas)):  # a task may do fewer steps
        progress()
    pictures = latents.to_images(z).clamp(-1, 1)
    return pictures if task is None or given is None else task.finish(pictures, given)


def entry_of(model: LatentDiffusion, guidance: Guidance, wanted: str | int | None, classes: list[str]) -> Batch:
    """One picture's batch entries for what a user asks for; a classifier's guidance gives classes to a model without."""
    if guidance.classifies and not model.conditioner.num_classes:
        label = label_of(wanted, classes, len(classes)) if wanted is not None else -1
        return {**model.conditioner.request(None, classes), "label": label}
    return model.conditioner.request(wanted, classes)


def batch_of(model: LatentDiffusion, guidance: Guidance, wanted: Sequence[str | int | None], classes: list[str]) -> Batch:
    """What a conditioner encodes, for one picture of each of these conditions."""
    entries, device = [entry_of(model, guidance, condition, classes) for condition in wanted], model.latents.shift.device
    found: Batch = {key: [entry[key] for entry in entries] for key in entries[0]}
    return {key: torch.tensor(values, device=device) if isinstance(values[0], int) else values for key, values in found.items()}


def _sources(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Images (B,3,H,W) and masks (B,1,H,W)."""
    sources = [request.source for request in requests if request.source is not None]
    if len(sources) < len(requests):
        raise ValueError("this task or model works on an image: give --image FILE")
    masks = [torch.ones_like(source.x[:1]) if source.mask is None else source.mask for source in sources]
    return torch.stack([source.x for source in sources]), torch.stack(masks)


def _others(requests: Sequence[Request], latents: LatentSpace) -> Tensor | None:
    """Latents (B,C,h,w) of the second images, where there are any."""
    others = [request.source.other for request in requests if request.source is not None and request.source.other is not None]
    return latents.to_latents(torch.stack(others).to(latents.shift.device)) if others else None


class Generation(L.LightningModule):
    """`generate` for a Trainer: predict_step takes positions in `requests` and returns those requests, their images (N,3,H,W) and, where
    frames > 0, so many images (N,frames,3,H,W) of D on the way.  preview gets the images (lanes,3,H,W) of each D."""

    def __init__(
        self, model: LatentDiffusion, requests: Sequence[Request], recipe: Recipe, classes: Sequence[str], lanes: int,
        progress: Callable[[], Any], frames: int = 0, preview: Callable[[Tensor], Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.requests, self.recipe, self.classes = model, requests, recipe, classes
        self.lanes, self.progress, self.frames, self.preview = lanes, progress, frames, preview

    def predict_step(self, batch: list[int], batch_idx: int) -> tuple[list[Request], Tensor, Tensor | None]:
        requests = [self.requests[position] for position in batch]
        seen: list[Tensor] = []

        def watch(z0: Tensor) -> None:
            if self.frames:
                seen.append(z0)
            if self.preview is not None:
                self.preview(self.model.latents.to_images(z0).clamp(-1, 1))

        pictures = generate(self.model, requests, self.recipe, self.classes, self.lanes, self.progress, watch)
        if not seen:
            return requests, pictures, None
        calls = torch.stack(seen).unflatten(0, (-(-len(requests) // self.lanes), -1)).transpose(1, 2).flatten(0, 1)[: len(requests)]
        chosen = calls[:, torch.linspace(0, calls.shape[1] - 1, self.frames).round().long()]
        shown = [self.model.latents.to_images(z).clamp(-1, 1) for z in chosen]
        return requests, pictures, torch.stack(shown)
