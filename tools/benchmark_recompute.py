"""What it costs that norm and activation are done again in backward: pairs of training steps with and without, as ratios of CPU time.

    OMP_NUM_THREADS=1 python tools/benchmark_recompute.py [--pairs 15] [--checkpoint]

overhead: a UNet of the depth of diffusion/unet-f8.yaml, so narrow that all time goes between operators.  emoji: the UNet of
diffusion/emoji.yaml at its batch.  --checkpoint: also torch.utils.checkpoint, which did the same until version 0.2.0.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldm.interfaces import Cond
from ldm.nn.blocks import NormActConv
from ldm.nn.unet import UNet

Forward = Callable[..., Tensor]
RECOMPUTED: Forward = NormActConv.forward


def kept(layer: NormActConv, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """All that autograd wants is kept."""
    return layer.conv(layer.activated(x, scale, shift))


def checkpointed(layer: NormActConv, *inputs: Any) -> Tensor:
    """With the hooks of torch.utils.checkpoint."""
    found: Tensor = checkpoint(lambda *a: kept(layer, *a), *inputs, use_reentrant=False, preserve_rng_state=False)
    return found


def step(network: UNet, x: Tensor, forward: Forward) -> float:
    """CPU seconds of forward and backward."""
    NormActConv.forward = forward  # type: ignore[method-assign]
    cond = Cond(torch.zeros(len(x), network.vector_dim))
    began = time.process_time()
    network(x, torch.zeros(len(x)), cond).square().mean().backward()
    network.zero_grad()
    return time.process_time() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--checkpoint", action="store_true")
    chosen = parser.parse_args()
    shape: dict[str, Any] = {"multipliers": (1, 2, 3, 4), "num_blocks": 2, "attention_levels": (1, 2, 3), "vector_dim": 8}
    cases = {
        "overhead": (UNet(4, channels=8, **shape), torch.randn(1, 4, 16, 16)),
        "emoji": (UNet(4, 60, (1, 2, 2), 1, (1, 2), vector_dim=64), torch.randn(16, 4, 16, 16)),
    }
    ways = {"recomputed": RECOMPUTED} | ({"torch.utils.checkpoint": checkpointed} if chosen.checkpoint else {})
    for name, (network, x) in cases.items():
        network.train()
        for way, forward in ways.items():
            step(network, x, forward), step(network, x, kept)
            pairs = [(step(network, x, forward), step(network, x, kept)) for _ in range(chosen.pairs)]
            ratios = sorted(a / b for a, b in pairs)
            quarter = len(ratios) // 4
            band = f"{ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}"
            took = 1000 * median(a for a, _ in pairs)
            print(f"{name}: {way} takes {median(ratios):.2f} of the time with all kept ({band}); {took:.1f} ms a step")
