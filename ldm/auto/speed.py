"""How fast this machine trains: a few steps of the real networks, timed."""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.auto.plan import FIRST_BATCH, LATENT_CHANNELS, SECOND_BATCH, Machine, Shape, Speed
from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.autoencoder.perceptual import Lite0
from ldm.devices import cores
from ldm.interfaces import Cond
from ldm.nn.pretrained import has_lite0
from ldm.nn.unet import UNet

LEAST_SECONDS, LEAST_STEPS = 2.0, 3  # that are timed, after one that warms up
OVERHEAD = 0.004  # seconds of a step in which the trainer, the loader and the averages work


def machine() -> Machine:
    """This one."""
    perceptual = has_lite0()
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return Machine("cuda", torch.cuda.device_count(), cores(), memory, perceptual)
    return Machine("cpu", 1, cores(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), perceptual)


def measure(where: Machine, shape: Shape, least: float = LEAST_SECONDS) -> Speed:
    """Seconds of a step of each stage and of a network call for one picture; least: how many seconds to time steps."""
    device = torch.device(where.device)
    with torch.random.fork_rng(devices=[]):
        autoencoder = ConvAutoencoder(KL(LATENT_CHANNELS, 1e-3), 96, shape.multipliers, 1, (), 4, shape.channels).to(device)
        x = torch.randn(FIRST_BATCH, shape.channels, shape.size, shape.size, device=device)
        distance = Lite0().to(device) if shape.perceptual else None

        def first_loss() -> Tensor:
            reconstruction = autoencoder(x).x
            loss = (reconstruction - x).square().mean()
            return loss if distance is None else loss + distance(x, reconstruction.clamp(-1, 1)).mean()

        first = _seconds(autoencoder, first_loss, device, least)
        network = UNet(LATENT_CHANNELS, shape.width, (1, 2, 2), 1, (1, 2), vector_dim=64).to(device)
        z = torch.randn(SECOND_BATCH, LATENT_CHANNELS, shape.side, shape.side, device=device)
        t, cond = torch.full((SECOND_BATCH,), 500.0, device=device), Cond(torch.randn(SECOND_BATCH, 64, device=device))
        second = _seconds(network, lambda: network(z, t, cond).square().mean(), device, least)
    return Speed(first + OVERHEAD, second + OVERHEAD, second / 3 / SECOND_BATCH)


def _seconds(module: nn.Module, loss: Callable[[], Tensor], device: torch.device, least: float) -> float:
    """Of a training step: forward, backward, AdamW.  The time that a quarter of the steps stayed below: others may use the machine for a
    moment, and what training really takes corrects the plan (plan.after_first)."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    times = list[float]()
    while len(times) < LEAST_STEPS or sum(times) < least:
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 4]
