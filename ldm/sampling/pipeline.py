"""The single way in which pictures are made, and the table of contents of the paper:

noise -> schedule.prior -> sampler(task(guidance(denoiser, cond, null))) -> latents.to_images
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from math import gcd
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.values import batch_of
from ldm.devices import full, send
from ldm.diffusion.variance import LearnedNoise
from ldm.errors import UserError
from ldm.interfaces import Batch, ClassInput, Condition, ConditioningImage, Denoise, Input, Noise, Task, TaskInput
from ldm.latents.model import LatentDiffusion
from ldm.sampling.request import InputImage, Mix, SampleRequest, SamplingConfig
from ldm.sampling.wrappers import mixture, windows

CHUNK_SIZE = 8  # pictures per network call on a GPU, the last call padded: arithmetic of another batch size rounds differently
SMALL = 32 * 32  # positions of a picture's latents up to which several threads make a picture hardly sooner than one

Result = TypeVar("Result")


@torch.inference_mode(False)  # a task or a guidance may need gradients
@torch.no_grad()
def generate(
    model: LatentDiffusion, requests: Sequence[SampleRequest], config: SamplingConfig, classes: Sequence[str] = (),
    chunk_size: int = CHUNK_SIZE, on_step: Callable[[], Any] = lambda: None, on_denoised: Callable[[Tensor], Any] = lambda z0: None,
) -> Tensor:  # fmt: skip
    """Pictures (N,3,H,W) in [-1,1] of requests of one size; the bits of picture i do not depend on which others are made with it
    (measured on CPUs of Intel and AMD; on the latter not for chunks of 2 and 3, whose matrix products round by the place in a batch).

    on_step() after each step of a chunk, on_denoised(D) after each evaluation, (chunk_size,C,h,w), the last ones repeated.
    """
    model.latents.require_measured()
    made = []
    for some in chunks(requests, chunk_size):
        padded = some + some[-1:] * (chunk_size - len(some))
        made.append(_Chunk(model, padded, config, classes).generate(on_step, on_denoised)[: len(some)])
    return torch.cat(made)


def require_finite(requests: Sequence[SampleRequest], pictures: Tensor) -> None:
    """A UserError for the first of the pictures (N,3,H,W) that has values which are no numbers: rounded they would be black."""
    for request, finite in zip(requests, pictures.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            raise UserError(
                f"picture {request.index} is not finite, nothing was written for it: lower --guidance, use --precision 32-true, "
                "or, if that does not help, train the model again"
            )


def default_chunk_size(device: torch.device) -> int:
    """One picture per network call on a CPU, which gains nothing from more; CHUNK_SIZE elsewhere."""
    return 1 if device.type == "cpu" else CHUNK_SIZE


def each_chunk(
    model: LatentDiffusion, requests: Sequence[SampleRequest], chunk_size: int, make: Callable[[list[SampleRequest]], Result]
) -> Iterator[Result]:
    """make(chunk) for all chunks, in order.

    On a CPU small pictures are made side by side, each by one thread: as fast as one after the other by all threads, and their bits do
    not depend on how many threads there are.
    """
    latents, frames = model.latents, model.denoiser.network.frames
    height, width = latents.shape_of(None)
    alone = chunk_size == 1 and latents.shift.device.type == "cpu"
    if not (alone and height * width * frames <= SMALL):
        yield from map(make, chunks(requests, chunk_size))
        return
    threads, waiting = torch.get_num_threads(), deque[Future[Result]]()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for some in chunks(requests, 1):
                    waiting.append(pool.submit(make, some))
                    if len(waiting) > threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:  # also where the caller wants no more: what is in work ends, what waits does not begin
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def chunks(requests: Sequence[SampleRequest], chunk_size: int) -> Iterator[list[SampleRequest]]:
    """At most `chunk_size` successive requests whose images are of one size, and which all have a condition or none: guidance makes a call
    of twice the batch only for the former, and rounds differently in it."""

    def kind(request: SampleRequest) -> tuple[object, ...]:
        return bool(request.condition or request.negative), None if request.image is None else request.image.pixels.shape

    for _, group in groupby(requests, kind):
        while some := list(islice(group, chunk_size)):
            yield some


class _Chunk:
    """A few pictures of one size that go through the network together."""

    def __init__(self, model: LatentDiffusion, requests: list[SampleRequest], config: SamplingConfig, classes: Sequence[str]) -> None:
        self.model, self.requests, self.config, self.classes = model, requests, config, classes
        self.device, self.task = model.latents.shift.device, config.task or Task()
        self.multiple = model.latents.autoencoder.factor * model.denoiser.network.multiple  # px of which a picture's sides are multiples
        self.conditioning_image: ConditioningImage | None = None
        self.given: TaskInput | None = None
        height, width = (side * model.latents.autoencoder.factor for side in model.latents.shape_of(None))
        self.size = config.size or (height, width)  # px
        if self.task.needs_image or model.conditioner.image is not None:
            self._read_images()
        self.shape = model.latents.shape_of(self.size, model.denoiser.network.multiple)

    def generate(self, on_step: Callable[[], Any], on_denoised: Callable[[Tensor], Any]) -> Tensor:
        """Algorithm 2 of arXiv:2006.11239 with any sampler: noise, then step by step what D(x, sigma) says, then pixels."""
        schedule, latents = self.model.denoiser.schedule, self.model.latents
        sigmas = schedule.steps(self.config.steps, self.config.spacing)
        noise = self._noise()
        denoise, sampler_noise = self._denoiser(sigmas, noise)
        z, sigmas = self.task.start(self.given, noise, schedule, sigmas)  # type: ignore[arg-type]
        denoise = self.task.wrap(denoise, self.given)  # type: ignore[arg-type]

        def watched(x: Tensor, sigma: Tensor) -> Tensor:
            on_denoised(z0 := denoise(x, sigma))
            return z0

        for state in self.config.sampler.steps(watched, z, sigmas, sampler_noise):
            z = state
            on_step()
        pictures = cropped(full(latents.to_images(z)).clamp(-1, 1), self.size)
        return self.task.finish(pictures, self.given)  # type: ignore[arg-type]

    def _noise(self) -> Noise:
        """Each picture's own noise, (B,C,h,w) per draw."""
        shape = (self.model.latents.autoencoder.channels, *self.shape)
        draws = [request.noise.draws(shape) for request in self.requests]
        return lambda: send(torch.stack([draw() for draw in draws]), self.device)

    def _denoiser(self, sigmas: Tensor, noise: Noise) -> tuple[Denoise, Noise]:
        """D for what the pictures are to show, and the noise of the sampler's steps."""
        config, network, window = self.config, self.model.denoiser.network, self.model.latents.shape_of(None)
        larger = any(side > self.task.whole * trained for side, trained in zip(self.shape, window, strict=True))
        windowed = config.windows and larger and not network.concat_channels
        learns = network.learn_variance and config.sampler.ancestral and not windowed
        learned = LearnedNoise(self.model.denoiser, sigmas, noise)
        negatives = [request.negative for request in self.requests]
        negative = None if all(each is None for each in negatives) else self._batch([each or {} for each in negatives])

        def guided(conditions: list[Condition]) -> Denoise:
            batch, predict = self._batch(conditions), learned.predict if learns else None
            told = any(conditions) or self.conditioning_image is not None
            make = partial(self.model.guided, batch, config.guidance, config.companion, negative, predict, told)
            return windows(make, window) if windowed else make()

        mixes = [request.condition if isinstance(request.condition, Mix) else Mix(request.condition, {}, 0) for request in self.requests]
        denoise = guided([mix.a for mix in mixes])
        if any(isinstance(request.condition, Mix) for request in self.requests):
            weight = send(torch.tensor([mix.weight for mix in mixes]), self.device)
            denoise = mixture(denoise, guided([mix.b for mix in mixes]), weight)
        return denoise, learned.noise if learns else noise

    def _batch(self, conditions: Sequence[Condition]) -> Batch:
        """What the conditioner encodes."""
        batch = batch_of(inputs_of(self.model, self.config, self.classes), conditions, self.classes, self.device)
        return batch if self.conditioning_image is None else {**batch, "conditioning_image": self.conditioning_image}

    def _read_images(self) -> None:
        """The images of the requests, for a task and for a model that takes images, padded to what the network can take."""
        images = [request.image for request in self.requests if request.image is not None]
        if len(images) < len(self.requests):
            raise UserError("this task or model works on an image: give --image FILE")
        y = torch.stack([each.pixels for each in images]).to(self.device)
        factor = 1 if self.task.needs_image or not self.model.conditioner.image else self.model.conditioner.image.downscale
        masks = [each.pixels.new_ones(1, *(factor * n for n in y.shape[2:])) if each.mask is None else each.mask for each in images]
        image, mask = self.task.canvas(y, torch.stack(masks).to(self.device))
        self.size = (mask.shape[2], mask.shape[3])
        padded_mask, ratio = padded_to(mask, self.multiple), mask.shape[3] // image.shape[3]
        padded = padded_to(image, self.multiple // gcd(self.multiple, ratio))
        if self.model.conditioner.image is not None:
            self.conditioning_image = ConditioningImage(padded, padded_mask)
        if self.task.needs_image:
            self.given = self._given(images, y, image, mask, self.model.latents.to_latents(padded))

    def _given(self, images: list[InputImage], y: Tensor, image: Tensor, mask: Tensor, z0: Tensor) -> TaskInput:
        """What the task works on; y: as given, image and mask: at the size of the picture, z0 (B,C,h,w): latents of the padded image."""
        latents = self.model.latents
        latent_mask = F.max_pool2d(padded_to(mask, self.multiple), latents.autoencoder.factor)
        seconds = [padded_to(each.second[None], self.multiple) for each in images if each.second is not None]
        second_latents = latents.to_latents(torch.cat(seconds).to(self.device)) if seconds else None
        weight = torch.tensor([each.weight for each in images])  # on the CPU: numbers, not values
        source = self.model.conditional(self._batch([each.shows for each in images]))

        def decode(z: Tensor) -> Tensor:
            return cropped(latents.decode(z), self.size)

        def encode(x: Tensor) -> Tensor:
            return latents.to_latents(padded_to(x, self.multiple))

        return TaskInput(y, image, mask, z0, latent_mask, source, decode, encode, second_latents, weight)


def inputs_of(model: LatentDiffusion, config: SamplingConfig, classes: Sequence[str]) -> Mapping[str, Input]:
    """What a picture may be asked to show: the conditioner's inputs, and a class where the guidance's classifier tells classes."""
    if config.guidance.needs_labels and not model.conditioner.num_classes:
        return {**model.conditioner.inputs, "class": ClassInput(len(classes))}
    return model.conditioner.inputs


def padded_to(x: Tensor, multiple: int) -> Tensor:
    """x (B,C,H,W) with its last row and column repeated until both sides are multiples of `multiple`."""
    height, width = (-side % multiple for side in x.shape[2:])
    return F.pad(x, (0, width, 0, height), mode="replicate") if height or width else x


def cropped(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Inverse of `padded_to`: the first rows and columns of x (B,C,H,W)."""
    return x[..., : size[0], : size[1]]
