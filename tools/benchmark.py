"""Our networks against diffusers' of the same shape, in one process: python tools/benchmark.py [--quick] [--json FILE]

Needs `pip install ldm[bench]`.  After a warm-up every round measures ours, theirs, ours, a second copy of ours, or these backwards:
the first pair gives the time ratio, the second the noise, i.e. the ratio that this machine shows between equals.  A measurement is as
many steps as make it last 0.2 s, the same number for all.  Ratios are ours / theirs: below 1, ours is better.  fp32 leaves CUDA's TF32
convolutions on.

  time         median (min..max) over the pairs of the ratio within a pair
  GFLOP        of one step's convolutions, matrix products and, on CUDA, attention (FlopCounterMode), recomputed ones included
  % of peak    FLOP per second of the fastest measurement over those of the fastest 3x3 convolution, forward + backward
  activations  bytes allocated during forward and still allocated at its end.  Live memory, not a count of saved tensors: ours
               recomputes, and what torch.utils.checkpoint keeps lives in closures that saved-tensor hooks miss
  peak         most bytes allocated at a moment of one step over those before it (weights and Adam's moments; no gradients)

Memory is the caching allocator's count on CUDA, on the CPU the running sum of the profiler's allocation events, which miss oneDNN's
private scratch.  `check_memory` holds the measure to cases computed by hand each time the tool runs.
"""

import argparse
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder.adversary import PatchDiscriminator, PatchGAN
from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.autoencoder.perceptual import Lite0
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import Ancestral
from ldm.diffusion.schedule import LDMSchedule
from ldm.interfaces import Cond
from ldm.nn.unet import UNet

MARK, HEAD = "end of forward", 64  # name in the trace; channels per attention head


@dataclass(frozen=True)
class Part:
    """One side of a comparison.  A step is `forward`, to the loss or the sample, then `finish`: backward and optimizer, if any."""

    module: nn.Module
    forward: Callable[[], Tensor]
    finish: Callable[[Tensor], None] = lambda result: None

    def step(self) -> None:
        self.finish(self.forward())


class Cases:
    """What is compared: name -> (ours, theirs), both yet to be built."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.bf16, self.compile = torch.device(args.device), args.precision == "bf16", args.compile
        multipliers = (1, 2) if args.quick else (1, 2, 2)
        self.unet = {"channels": 32 if args.quick else 96, "multipliers": multipliers, "num_blocks": 1, "attention_levels": (1,)}
        self.coder = {"channels": 32, "multipliers": (1, 2)} if args.quick else {"channels": 64, "multipliers": (1, 2, 4)}
        side, batch, lanes, images, pixels, self.steps = (8, 2, 2, 1, 16, 2) if args.quick else (16, 32, 8, 4, 64, 10)
        self.images = images
        self.kl_f8 = {"channels": 32 if args.quick else 128, "multipliers": (1, 2, 4, 4), "num_blocks": 1 if args.quick else 2}
        shapes = (batch, 4, side, side), (lanes, 4, side, side), (lanes, 4, 2 * side, 2 * side), (images, 3, pixels, pixels)
        x, self.prior, wide, image = (torch.randn(shape, device=self.device) for shape in shapes)
        self.pairs = {
            "unet train": (lambda: self.our_unet(x), lambda: self.their_unet(x)),
            "autoencoder train": (lambda: self.our_autoencoder(image), lambda: self.their_autoencoder(image)),
            **{f"kl-f8, all losses, {side} px": (partial(self.our_kl_f8, side), partial(self.their_kl_f8, side)) for side in args.sides},
            "sampling": (self.our_sampling, self.their_sampling),
            "our stem, patch 2 / 1": (lambda: self.our_unet(wide, patch=2), lambda: self.our_unet(wide)),
        }

    def part(self, module: nn.Module, compute: Callable[[], Tensor], train: bool = True) -> Part:
        optimizer = torch.optim.AdamW(module.to(self.device).train(train).parameters(), lr=1e-4, fused=True)

        def forward() -> Tensor:
            with torch.set_grad_enabled(train), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return compute()

        def finish(result: Tensor) -> None:
            if train:
                result.backward()
                optimizer.step()
                optimizer.zero_grad()

        return Part(module, forward, finish)

    def compiled(self, function: Any) -> Any:
        return torch.compile(function) if self.compile else function

    def diffusers_unet(self) -> UNet2DModel:
        """`self.unet` in diffusers' words."""
        multipliers, attended = self.unet["multipliers"], self.unet["attention_levels"]
        down = ["AttnDownBlock2D" if level in attended else "DownBlock2D" for level in range(len(multipliers))]
        return UNet2DModel(
            in_channels=4, out_channels=4, down_block_types=down, up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            block_out_channels=[self.unet["channels"] * m for m in multipliers], layers_per_block=self.unet["num_blocks"],
            attention_head_dim=HEAD, attn_norm_num_groups=32, norm_eps=1e-5, resnet_time_scale_shift="scale_shift",
        )  # fmt: skip

    def our_unet(self, x: Tensor, patch: int = 1) -> Part:
        unet, t = UNet(4, **self.unet, head_channels=HEAD, patch=patch), torch.arange(len(x), device=self.device).float()
        return self.part(unet, self.compiled(lambda: F.mse_loss(unet(x, t, Cond()).float(), x)))

    def their_unet(self, x: Tensor) -> Part:
        unet, t = self.diffusers_unet(), torch.arange(len(x), device=self.device)
        return self.part(unet, self.compiled(lambda: F.mse_loss(unet(x, t).sample.float(), x)))

    def our_autoencoder(self, x: Tensor) -> Part:
        coder = ConvAutoencoder(KL(4), **self.coder, num_blocks=2)

        def loss() -> Tensor:
            reconstruction, latent = coder(x)
            return F.mse_loss(reconstruction.float(), x) + latent.penalty.mean()

        return self.part(coder, self.compiled(loss))

    def their_autoencoder(self, x: Tensor) -> Part:
        widths = [self.coder["channels"] * m for m in self.coder["multipliers"]]
        down, up = ["DownEncoderBlock2D"] * len(widths), ["UpDecoderBlock2D"] * len(widths)
        coder = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2)

        def loss() -> Tensor:
            posterior = coder.encode(x).latent_dist
            return F.mse_loss(coder.decode(posterior.sample()).sample.float(), x) + 1e-6 * posterior.kl().mean()

        return self.part(coder, self.compiled(loss))

    def stage_1(self, coder: nn.Module, last_layer: Tensor, x: Tensor, run: Callable[[], tuple[Tensor, Tensor]]) -> Part:
        """A training step with L1, KL, perceptual and adaptive adversarial loss, the same code for both autoencoders."""
        perceptual, adversary = Lite0().to(self.device), PatchGAN(PatchDiscriminator()).to(self.device)

        def loss() -> Tensor:
            reconstruction, penalty = run()
            with torch.autocast(self.device.type, enabled=False):
                reconstruction = reconstruction.float()
                error = F.l1_loss(reconstruction, x) + perceptual(x, reconstruction).mean()
                fooled = adversary.generator_loss(reconstruction)
                scale = adversary.scale(error, fooled, last_layer, x.numel())
                return error + penalty + adversary.weight * scale * fooled + adversary.discriminator_loss(x, reconstruction)[0]

        return self.part(nn.ModuleList([coder, adversary]), loss)

    def our_kl_f8(self, side: int) -> Part:
        x, coder = self.pictures(side), ConvAutoencoder(KL(), **self.kl_f8).to(self.device)
        if self.compile:
            coder.compile()  # all but the last convolution, at which the adaptive weight is taken
        return self.stage_1(coder, coder.last_layer, x, lambda: ((out := coder(x)).x, out.latent.penalty.mean()))

    def their_kl_f8(self, side: int) -> Part:
        x, widths = self.pictures(side), [self.kl_f8["channels"] * m for m in self.kl_f8["multipliers"]]
        down, up = ["DownEncoderBlock2D"] * len(widths), ["UpDecoderBlock2D"] * len(widths)
        sizes = {"block_out_channels": widths, "layers_per_block": self.kl_f8["num_blocks"], "latent_channels": 4}
        coder = AutoencoderKL(down_block_types=down, up_block_types=up, **sizes).to(self.device)
        head, coder.decoder.conv_out = coder.decoder.conv_out, nn.Identity()  # not compiled either

        def features() -> tuple[Tensor, Tensor]:
            posterior = coder.encode(x).latent_dist
            return coder.decode(posterior.sample()).sample, 1e-6 * posterior.kl().mean() / x[0].numel()

        body = self.compiled(features)

        def run() -> tuple[Tensor, Tensor]:
            found, penalty = body()
            return head(found), penalty

        return self.stage_1(nn.ModuleList([coder, head]), head.weight, x, run)

    def pictures(self, side: int) -> Tensor:
        return torch.randn(max(1, self.images * 64**2 // side**2), 3, side, side, device=self.device).tanh()

    def our_sampling(self) -> Part:
        unet, schedule = UNet(4, **self.unet, head_channels=HEAD), LDMSchedule()
        denoiser, sigmas = Denoiser(self.compiled(unet), schedule), schedule.steps(self.steps)

        def draw() -> Tensor:
            noise = schedule.prior(self.prior, sigmas[0])
            return Ancestral(0.0).sample(lambda x, sigma: denoiser.predict(x, sigma, Cond()), noise, sigmas, lambda: noise)

        return self.part(unet, draw, train=False)

    def their_sampling(self) -> Part:
        unet, betas, spacing = self.diffusers_unet(), LDMSchedule(), {"timestep_spacing": "trailing", "clip_sample": False}
        scheduler = DDIMScheduler(beta_start=betas.start, beta_end=betas.end, beta_schedule="scaled_linear", **spacing)
        network = self.compiled(unet)
        scheduler.set_timesteps(self.steps, device=self.device)

        def draw() -> Tensor:
            x = self.prior
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t).sample, t, x).prev_sample
            return x

        return self.part(unet, draw, train=False)


def seconds(step: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Wall time of one step, over `repeats` of them."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - start) / repeats


def memory(part: Part, device: torch.device) -> tuple[int, int]:
    """(activations, peak) in bytes of one step after a first one."""
    part.step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        result = part.forward()
        kept = torch.cuda.memory_allocated() - rest
        part.finish(result)
        return kept, torch.cuda.max_memory_allocated() - rest
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = part.forward()
        with record_function(MARK):
            pass
        part.finish(result)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    live = kept = peak = 0
    for event in sorted((e for e in events if e.get("name") in ("[memory]", MARK)), key=lambda e: e["ts"]):
        live += event["args"].get("Bytes", 0)
        peak, kept = max(peak, live), live if event["name"] == MARK else kept
    return kept, peak


def check_memory(device: torch.device) -> None:
    """The two-layer case keeps h, silu(h) and y, or, when y is recomputed from h, only h and y (the mean of y^2 keeps y)."""
    first, tail = nn.Linear(64, 128, device=device), nn.Sequential(nn.SiLU(), nn.Linear(128, 64, device=device))
    x, recompute = torch.ones(256, 64, device=device), {"use_reentrant": False, "preserve_rng_state": False}
    plain = Part(first, lambda: tail(first(x)).square().mean())
    again = Part(first, lambda: checkpoint(tail, first(x), **recompute).square().mean())
    total = Part(first, lambda: torch.ones_like(x) + torch.ones_like(x))  # at its peak two terms and their sum
    found = [memory(plain, device)[0], memory(again, device)[0], *memory(total, device)]
    expected = [4 * len(x) * floats for floats in (128 + 128 + 64, 128 + 64, 64, 3 * 64)]
    if any(abs(a - b) > 2048 for a, b in zip(found, expected, strict=True)):  # scalars, and CUDA's rounding
        raise AssertionError(f"the memory measure gives {found} bytes where {expected} were computed by hand")


def conv_peak(cases: Cases, quick: bool) -> float:
    """Best FLOP/s, forward + backward, of 3x3 convolutions such as these networks have."""
    best, shapes = 0.0, [(8, 64, 16)] if quick else [(32, 96, 16), (32, 192, 8), (4, 64, 64), (4, 128, 32), (4, 256, 16)]
    for batch, channels, side in shapes:
        images = batch * (64 if cases.device.type == "cuda" else 1)  # a GPU needs more of them to reach its peak
        for layout in (torch.contiguous_format, torch.channels_last):
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            x = torch.randn(images, channels, side, side, device=cases.device).to(memory_format=layout).requires_grad_()
            inputs, gradient = [x, *conv.parameters()], torch.randn_like(x, dtype=torch.bfloat16 if cases.bf16 else None)
            part = cases.part(conv, lambda conv=conv, x=x: conv(x))
            step = lambda p=part, i=inputs, g=gradient: torch.autograd.grad(p.forward(), i, g)  # noqa: E731
            fastest = min(seconds(step, cases.device, 1 if quick else 3) for _ in range(5))
            best = max(best, 3 * 2 * 9 * channels**2 * x[:, 0].numel() / fastest)
    return best


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def measure(cases: Cases, name: str, pairs: int, quick: bool) -> dict[str, Any]:
    (make_ours, make_theirs), device = cases.pairs[name], cases.device
    torch.compiler.reset()  # the sizes of the case before would make this one's dynamic
    ours, theirs, again = make_ours(), make_theirs(), make_ours()
    figures: dict[str, Any] = {"parameters": [], "flop": [], "activations": [], "peak": []}
    for part in (ours, theirs):
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            part.step()
        kept, peak = memory(part, device)
        values = sum(p.numel() for p in part.module.parameters()), counter.get_total_flops(), kept if part.module.training else None, peak
        for key, value in zip(figures, values, strict=True):
            figures[key].append(value)
    for _ in range(2):
        warm = max(seconds(part.step, device) for part in (ours, theirs, again))
    repeats = 1 if quick else math.ceil(0.2 / warm)
    parts = (ours, theirs, ours, again)
    rounds = [[seconds(part.step, device, repeats) for part in parts[::way]][::way] for way in islice(cycle((1, -1)), pairs)]
    figures["ratio"], figures["noise"] = spread([r[0] / r[1] for r in rounds]), spread([r[2] / r[3] for r in rounds])
    figures["seconds"] = [statistics.median(r[side] for r in rounds) for side in (0, 1)]
    figures["fastest"] = [min(r[side] for r in rounds) for side in (0, 1)]
    return figures


def table(results: dict[str, dict[str, Any]]) -> str:
    def both(values: list[Any], unit: float, ratio: bool = True) -> str:
        if None in values:
            return "-"
        return f"{values[0] / unit:.2f} / {values[1] / unit:.2f}" + (f" = {values[0] / values[1]:.3f}" if ratio else "")

    def band(s: dict[str, float]) -> str:
        return f"{s['median']:.3f} ({s['min']:.3f}..{s['max']:.3f})"

    rows = [["ours / theirs", *results]]
    for label, cell in {
        "parameters, millions": lambda r: both(r["parameters"], 1e6),
        "GFLOP per step": lambda r: both(r["flop"], 1e9),
        "ms per step, median": lambda r: both(r["seconds"], 1e-3, ratio=False),
        "time, ours / theirs": lambda r: band(r["ratio"]),
        "noise, ours / ours": lambda r: band(r["noise"]),
        "% of convolution peak": lambda r: both(r["share"], 0.01, ratio=False),
        "activations, MiB": lambda r: both(r["activations"], 2**20),
        "peak over rest, MiB": lambda r: both(r["peak"], 2**20),
    }.items():
        rows.append([label, *map(cell, results.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides")
    parser.add_argument("--pairs", type=int, default=7, help="rounds of two pairs each")
    parser.add_argument("--sides", type=int, nargs="+", help="px of the KL-f8 case with all losses; as many pixels as 4 images of 64")
    parser.add_argument("--threads", type=int, help="of the CPU; PyTorch's choice, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 pairs: a test of this tool, not a measurement")
    parser.add_argument("--only", help="part of the name of the cases to run: unet, autoencoder, kl-f8, sampling, stem")
    parser.add_argument("--json", type=Path, help="write all figures here (seconds, bytes, FLOP)")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.threads = 2, args.threads or 1
    args.sides = args.sides or ([32] if args.quick else [64])
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    gc.freeze()  # spares the collections before memory measures the search through all that was imported
    cases, results = Cases(args), {}
    check_memory(cases.device)
    before = conv_peak(cases, args.quick)
    for name in [name for name in cases.pairs if (args.only or "") in name]:
        results[name] = measure(cases, name, args.pairs, args.quick)
    peak = max(before, conv_peak(cases, args.quick))
    for figures in results.values():
        figures["share"] = [flop / fastest / peak for flop, fastest in zip(figures["flop"], figures["fastest"], strict=True)]
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {args.device}, {args.precision}, {'compiled' if args.compile else 'eager'}, {threads} threads")
    print(f"fastest convolution: {peak / 1e9:.1f} GFLOP/s\n\n{table(results)}")
    if args.json:
        settings = vars(args) | {"torch": torch.__version__, "threads": threads, "conv_peak": peak, "json": str(args.json)}
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
