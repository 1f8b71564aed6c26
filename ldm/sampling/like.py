"""Samples of what the images of a set show, to compare both."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.data.images import Images
from ldm.devices import computing, sampling_precision
from ldm.ranges import to_uint8
from ldm.sampling.model import Model
from ldm.sampling.pipeline import generate
from ldm.sampling.request import SampleRequest, SamplingConfig, SeedNoise


@torch.no_grad()
def samples_like(
    model: Model, images: Images, indices: Sequence[int], config: SamplingConfig, on_step: Callable[[], Any] = lambda: None
) -> Tensor:  # fmt: skip
    """uint8 (N,C,H,W): a sample of the condition of each of these images, each of a noise of its own.  on_step: after each step."""
    requests = [SampleRequest(i, SeedNoise(0, i), model.condition_of(images.records[index])) for i, index in enumerate(indices)]
    with computing(model.device, sampling_precision(model.device)):
        return to_uint8(generate(model.network, requests, config.resolved(model.network.latents), model.classes, on_step=on_step)).cpu()
