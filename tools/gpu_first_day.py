"""The first hour on a GPU: is what it computes right, how fast is it, and where is the time lost?

    python tools/gpu_first_day.py --out runs/first-day [--tiny] [--device cuda] [--presets NAME ...] [--no-compile]

1. Outputs of the emoji model, and losses and gradients of a training step of both stages, equal those of the CPU: in fp32 within 1e-3, in
   bf16 within 0.05 of their root mean square; sampled pictures differ by PSNR.
2. Step times of the presets (tools/presets.py) at a batch that fits: as they are, compiled, compiled with channels_last, with everything
   kept for backward; share of the GPU's peak (MFU) and memory.
3. Images per second of encoding, sampling, decoding.
4. Where diffusers is installed: tools/benchmark.py on this device.

Writes results.json and table.md.  A check that fails makes the exit status 1.  --tiny: toy sizes, for a CPU.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmark_recompute import kept
from presets import CARDS, PER_PARAMETER, PRESETS, USED, Loss, cost, preset
from torch import Tensor, nn

import ldm
from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.callbacks.tracking import PEAKS
from ldm.devices import computing, sampling_precision
from ldm.interfaces import Cond
from ldm.nn.blocks import NormActConv
from ldm.nn.unet import UNet

LIMITS = {"32-true": 1e-3, "bf16-mixed": 0.05}  # of the root mean square
LEAST_PSNR = {"32-true": 40.0, "bf16-mixed": 20.0}  # dB between sampled pictures: 25 steps carry rounding on
SECONDS = 3.0  # that each timing takes


def relative(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, over that of b."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-12))


def outputs(model: Any, x: Tensor, z: Tensor, precision: str) -> dict[str, Tensor]:
    """What the parts of a model make, and a loss and its gradient of each stage."""
    device = x.device
    network, autoencoder = model.denoiser.network.train(), model.latents.autoencoder
    t, cond = torch.full((len(z),), 500.0, device=device), Cond(torch.ones(len(z), network.vector_dim, device=device))
    with computing(device, precision):
        moments = autoencoder.moments(x)
        decoded = autoencoder.decode(z)
        predicted = network(z, t, cond)
        loss = (predicted.float() - z).square().mean()
    (gradient,) = torch.autograd.grad(loss, [next(network.parameters())])
    with computing(device, precision):
        error = (autoencoder.requires_grad_(True).decode(z).float() - x).abs().mean()
    (by_decoder,) = torch.autograd.grad(error, [autoencoder.last_layer])
    found = {"moments": moments, "decoded": decoded, "network": predicted, "loss": loss, "gradient": gradient}
    return {**found, "stage 1 loss": error, "stage 1 gradient": by_decoder}


def correctness(device: torch.device, steps: int) -> dict[str, Any]:
    """Differences from the CPU by precision and part, and whether they are small."""
    results: dict[str, Any] = {}
    loaded = ldm.load("emoji", "cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    z = torch.randn(4, 4, 16, 16, generator=generator)
    reference = outputs(copy.deepcopy(loaded.network), x, z, "32-true")
    pictures = loaded.sample(n=2, steps=steps, precision="32-true", progress=False).tensor
    for precision, most in LIMITS.items():
        there = copy.deepcopy(loaded.network).to(device)
        made = outputs(there, x.to(device), z.to(device), precision)
        found = {name: relative(made[name], reference[name]) for name in reference}
        moved = ldm.load("emoji", str(device))
        error = (moved.sample(n=2, steps=steps, precision=precision, progress=False).tensor - pictures).square().mean()
        psnr = float(10 * torch.log10(1 / error.clamp(min=1e-12)))
        right = max(found.values()) <= most and psnr >= LEAST_PSNR[precision]
        results[precision] = {"differences": found, "sampled PSNR": psnr, "right": right}
    return results


def seconds(step: Callable[[], Any], device: torch.device, least: float) -> float:
    """The median of single runs, after two that warm up."""
    for _ in range(2):
        step()
    times, ends = list[float](), time.perf_counter() + least
    while len(times) < 3 or time.perf_counter() < ends:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def training_step(module: nn.Module, loss: Loss, device: torch.device) -> Callable[[], None]:
    """Forward, backward, AdamW in bf16."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with computing(device, "bf16-mixed"):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def tiny(latents: Any, batch: int) -> tuple[nn.Module, Loss]:
    """Toys in the place of presets."""
    if latents is None:
        model, x = ConvAutoencoder(KL(4), channels=16, multipliers=(1, 2)), torch.randn(batch, 3, 32, 32)
        return model, lambda: (model(x).x.float() - x).abs().mean()
    network = UNet(4, channels=16, multipliers=(1, 2), num_blocks=1, attention_levels=(1,), vector_dim=8)
    z, t, cond = torch.randn(batch, 4, 8, 8), torch.zeros(batch), Cond(torch.zeros(batch, 8))
    return network, lambda: network(z, t, cond).float().square().mean()


def on_device(config: str, device: torch.device, small: bool, batch: int) -> tuple[nn.Module, Loss]:
    """A preset's network and a step's loss of a batch, on a device."""
    with device:
        return tiny(PRESETS[config], batch) if small else preset(config, batch)


def speeds(device: torch.device, config: str, small: bool, compiles: bool, least: float) -> dict[str, Any]:
    """Step times of a preset by variant."""
    costs = cost(lambda batch: on_device(config, torch.device("cpu"), small, batch))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else CARDS["24 GB"]
    batch = 2 if small else max(1, min(256, int((0.6 * USED * memory - PER_PARAMETER * costs.parameters) // costs.activations)))
    peak = next((value for part, value in PEAKS.items() if device.type == "cuda" and part in torch.cuda.get_device_name(device)), None)
    variants = {"as it is": {}, "all kept": {"kept": True}}
    variants |= {"compiled": {"compile": True}, "compiled, channels_last": {"compile": True, "last": True}} if compiles else {}
    results: dict[str, Any] = {"batch": batch, "parameters": costs.parameters, "GFLOPs": costs.flops / 1e9}
    for name, options in variants.items():
        try:
            module, loss = on_device(config, device, small, batch)
            if options.get("last"):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if options.get("compile"):
                torch._dynamo.reset()
                module.compile()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with patch.object(NormActConv, "forward", kept) if options.get("kept") else nullcontext():
                took = seconds(training_step(module, loss, device), device, least)
        except torch.OutOfMemoryError:
            results[name] = {"error": "out of memory"}
            continue
        found: dict[str, Any] = {"seconds": took, "images per second": batch / took}
        if peak is not None:
            found |= {"MFU": costs.flops * batch / took / peak, "GB": torch.cuda.max_memory_allocated() / 1e9}
        results[name] = found
        del module, loss
    return results


def rates(device: torch.device, least: float) -> dict[str, float]:
    """Images per second of the emoji model: encoding, decoding, sampling with 25 steps and guidance."""
    model, results = ldm.load("emoji", str(device)), {}
    count = 64 if device.type == "cuda" else 4
    x, z = torch.zeros(count, 3, 64, 64, device=device), torch.zeros(count, 4, 16, 16, device=device)
    with torch.no_grad(), computing(device, sampling_precision(device)):
        results["encode"] = count / seconds(lambda: model.network.latents.moments(x), device, least)
        results["decode"] = count / seconds(lambda: model.network.latents.to_images(z), device, least)
    label = model.classes[0]
    results["sample"] = count / seconds(
        lambda: model.sample(n=count, classes=label, chunk_size=count, progress=False), device, least
    )  # fmt: skip
    return results


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    rows = [["preset", "batch", "variant", "img/s", "MFU", "GB"], ["---", "---:", "---", "---:", "---:", "---:"]]
    for config, found in results["presets"].items():
        for name, one in found.items():
            if isinstance(one, dict):
                share, memory = one.get("MFU"), one.get("GB")
                shown = [f"{one['images per second']:,.1f}" if "seconds" in one else one["error"]]
                shown += [f"{share:.0%}" if share else "", f"{memory:.1f}" if memory else ""]
                rows.append([f"`{config}`", str(found["batch"]), name, *shown])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for precision, one in results["correct"].items():
        worst = max(one["differences"], key=one["differences"].get)
        differs = f"{one['differences'][worst]:.2g} of the root mean square ({worst})"
        verdict = "right" if one["right"] else "WRONG"
        lines.append(f"\n{precision}: {verdict}; at most {differs} from the CPU; sampled pictures {one['sampled PSNR']:.1f} dB")
    return "\n".join([*lines, "", *(f"{name}: {rate:,.1f} img/s" for name, rate in results["rates"].items())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-compile", dest="compiles", action="store_false")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    chosen = parser.parse_args()
    device, least = torch.device(chosen.device), 0.0 if chosen.tiny else SECONDS
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "ldm": ldm.__version__, "presets": {}}
    results["correct"] = correctness(device, 2 if chosen.tiny else 25)
    results["rates"] = rates(device, least)
    for config in chosen.presets:
        results["presets"][config] = speeds(device, config, chosen.tiny, chosen.compiles, least)
        (chosen.out / "results.json").write_text(json.dumps(results, indent=1))
    if find_spec("diffusers") is not None and not chosen.tiny:
        benchmark = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "--device", str(device)]
        results["diffusers"] = subprocess.run(benchmark, capture_output=True, text=True).stdout
    (chosen.out / "results.json").write_text(json.dumps(results, indent=1))
    (chosen.out / "table.md").write_text(table(results) + "\n")
    print(table(results))
    sys.exit(0 if all(one["right"] for one in results["correct"].values()) else 1)
