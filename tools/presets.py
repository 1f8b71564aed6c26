"""What the presets cost: parameters, arithmetic and memory of a training step, and what a GPU should make of that.

    python tools/presets.py [--out FILE]      # about a minute; needs no GPU and no memory: tensors without values (FakeTensorMode)

FLOPs are those of a training step (forward, backward; twice the multiply-adds of convolutions, linear layers and attention) for an image
of 256 px, of stage 1 without losses' networks and discriminator, of stage 2 from cached latents.  Memory of an image: what autograd keeps
under bf16 autocast.  Fixed memory: fp32 weights, gradients, AdamW's two moments and the average, 20 bytes a parameter, and in stage 2
nothing else.  The largest batch fills 90 % of the memory.  Images per second: a share (MFU) of the dense bf16 FLOP/s of the data sheet.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldm import registry
from ldm.callbacks.tracking import PEAKS
from ldm.console.configs import find_config
from ldm.interfaces import Autoencoder, Bottleneck, Cond, Network

SIDE = 256
PRESETS = {  # config: the first stage whose latents it works on, their channels and side
    "autoencoder/kl-f8.yaml": None,
    "autoencoder/kl-f16.yaml": None,
    "autoencoder/vq-f4.yaml": None,
    "diffusion/unet-f4.yaml": (3, 64),
    "diffusion/unet-f8.yaml": (4, 32),
    "diffusion/dit-f8.yaml": (4, 32),
    "diffusion/unet-f8-large.yaml": (4, 32),
    "diffusion/dit-xl-f8.yaml": (4, 32),
}
CARDS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
USED, PER_PARAMETER = 0.9, 20
CARD = "H100"
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Cost:
    """Of a preset; FLOPs and bytes of one image."""

    parameters: int
    flops: float
    activations: float

    def batch(self, memory: float) -> int:
        """The largest on a card."""
        return max(0, int((USED * memory - PER_PARAMETER * self.parameters) // self.activations))

    def rate(self, mfu: float) -> float:
        """Images per second on CARD."""
        return mfu * PEAKS[CARD] / self.flops


def settings(config: str) -> dict[str, Any]:
    """`model.init_args` of a config and of those that it builds on."""
    found: dict[str, Any] = {}
    for path in find_config(config):
        found = over(found, yaml.safe_load(path.read_text()))
    return found["model"]["init_args"]


def over(below: Any, above: Any) -> Any:
    """`above` over `below`; another class takes no arguments over."""
    if not (isinstance(below, dict) and isinstance(above, dict)) or above.get("class_path") not in (None, below.get("class_path")):
        return above
    return {**below, **{key: over(below.get(key), value) for key, value in above.items()}}


def part(base: Any, spec: dict[str, Any], **more: Any) -> Any:
    """A part by its class and arguments."""
    return registry.find(base, spec["class_path"], "preset")(**spec.get("init_args", {}), **more)


def first_stage(config: str, batch: int = 1) -> tuple[nn.Module, Loss]:
    """The autoencoder and a step's loss for a batch of images."""
    spec = settings(config)["autoencoder"]
    bottleneck = part(Bottleneck, spec["init_args"].pop("bottleneck"))
    model: Autoencoder = part(Autoencoder, spec, bottleneck=bottleneck).train()
    x = torch.randn(batch, 3, SIDE, SIDE)
    return model, lambda: (model(x).x.float() - x).abs().mean()


def second_stage(config: str, channels: int, side: int, batch: int = 1) -> tuple[nn.Module, Loss]:
    """The network and a step's loss for a batch of images, told their classes."""
    network: Network = part(Network, settings(config)["network"], in_channels=channels, vector_dim=512).train()
    x, t, cond = torch.randn(batch, channels, side, side), torch.zeros(batch), Cond(torch.randn(batch, 512))
    return network, lambda: (network(x, t, cond).float() - x).square().mean()


def cost(make: Callable[[int], tuple[nn.Module, Loss]]) -> Cost:
    """By tensors that have shapes and types, but no values; make: the module and a step's loss of a batch.  What autograd keeps of two
    images less what it keeps of one is an image's: the weights in bf16 are kept once."""
    with FakeTensorMode():
        (module, flops, one), (_, _, two) = (_step(*make(batch)) for batch in (1, 2))
        return Cost(sum(parameter.numel() for parameter in module.parameters()), flops, two - one)


def _step(module: nn.Module, loss: Loss) -> tuple[nn.Module, float, float]:
    """FLOPs of a training step, and bytes that autograd keeps for its backward pass."""
    kept = dict[int, Tensor]()  # by storage

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
    return module, float(counter.get_total_flops()), float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def preset(config: str, batch: int) -> tuple[nn.Module, Loss]:
    """A preset's network, and a step's loss of a batch."""
    latents = PRESETS[config]
    return first_stage(config, batch) if latents is None else second_stage(config, *latents, batch)


def costs() -> dict[str, Cost]:
    """Of all presets."""
    return {config: cost(partial(preset, config)) for config in PRESETS}


def table(found: dict[str, Cost]) -> str:
    """In Markdown."""
    head = ["config", "parameters", "GFLOPs / image", "MB / image", "fixed GB", *(f"batch, {card}" for card in CARDS)]
    head += [f"img/s, {CARD}, 30 %", "50 %"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for config, one in found.items():
        figures = [f"{one.parameters / 1e6:.0f}M", f"{one.flops / 1e9:,.0f}", f"{one.activations / 1e6:,.0f}"]
        figures += [f"{PER_PARAMETER * one.parameters / 1e9:.1f}", *(f"{one.batch(memory):,}" for memory in CARDS.values())]
        rows.append([f"`{config}`", *figures, *(f"{one.rate(mfu):,.0f}" for mfu in (0.3, 0.5))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file (.json) for the figures")
    chosen = parser.parse_args()
    results = costs()
    if chosen.out:
        chosen.out.write_text(json.dumps({name: asdict(one) for name, one in results.items()}, indent=1))
    print(table(results))
