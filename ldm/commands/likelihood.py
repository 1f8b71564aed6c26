"""likelihood: how probable a model thinks images are, in bits per dimension."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.conditioning.values import batch_of
from ldm.console.options import DEVICE, Option, parse, path, warn, whole
from ldm.console.shorten import at_most
from ldm.data.images import open_images
from ldm.data.report import told
from ldm.diffusion.guidance import CFG
from ldm.diffusion.likelihood import bits_per_dim
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.latents.likelihood import bound, density
from ldm.ranges import to_float
from ldm.sampling.model import load

BINS = 10  # rows of the table that are shown

OPTIONS = [
    Option("model", "model folder, run, checkpoint or the name of a shipped model: emoji", path),
    Option("--images", "folder of images, `emoji` or `digits`; held-out ones, if any", path, None, "SET", required=True),
    Option("--n", "how many of them, evenly chosen; default: 32", whole(1), 32, "N"),
    Option("--steps", "noise levels of the bound; default: 1000, or all of the schedule's", whole(2), 1000, "N"),
    Option("--ode-steps", "of the ODE (Heun, two calls and their gradients each); default: 0, none", whole(0), 0, "N"),
    Option("--batch-size", "images per network call; default: 32", whole(1), 32, "N"),
    Option("--seed", "of the noise; default: 0", whole(0), 0, "N"),
    Option("--out", "file (.json) for all terms", path, None, "FILE"),
    DEVICE,
]  # fmt: skip


def likelihood(
    model: str, images: str, n: int = 32, steps: int = 1000, ode_steps: int = 0, batch_size: int = 32, seed: int = 0,
    out: str | None = None, device: str = "auto",
) -> int:  # fmt: skip
    """The variational bound of images in bits per dimension, by noise level, and the density by the probability-flow ODE.

    The bound is that of the posterior's variances, or of the network's own where it has learned them.  Of a model in pixels these are bits
    of 8-bit images; of a latent model they are those of the images' normalised latents, a density, which can be below 0 and compares
    models of the same first stage only.  Classes are the images' own where the model knows them.
    """
    ready = load(model, device)
    loaded, network, place = ready.loaded, ready.network, ready.device
    latents, schedule = network.latents, network.denoiser.schedule
    n, steps, ode_steps = (at_most(value) for value in (n, steps, ode_steps))
    latents.require_measured()
    if network.conditioner.image is not None:
        raise UserError("this model makes pictures from images: a likelihood is computed of models of classes, texts or nothing")
    source = open_images(images, int(loaded.card["size"]))
    for sentence in told(source):
        warn(sentence)
    chosen = torch.linspace(0, len(source) - 1, min(n, len(source))).round().long().tolist()
    levels, places = (
        schedule.steps(min(count, len(schedule.sigmas)))[:-1].flip(0).to(place) if count else None for count in (steps, ode_steps)
    )
    assert levels is not None
    generator, bounds, densities = torch.Generator().manual_seed(seed), [], []
    for start in tqdm(range(0, len(chosen), batch_size), desc="Measuring", unit="batch"):
        part = chosen[start : start + batch_size]
        z0 = latents.to_latents(to_float(torch.stack([source.pixels(i) for i in part])).to(place))
        batch = batch_of(network.conditioner.inputs, [ready.condition_of(source.records[i]) for i in part], ready.classes, place)

        def noise(like: Tensor = z0) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        with torch.no_grad():
            bounds.append(bound(network, batch, z0, levels, noise).cpu())
        if places is not None:
            densities.append(density(network.guided(batch, CFG(1.0)), z0, places, noise, latents.bins).cpu())
    terms = bits_per_dim(torch.cat(bounds, dim=1), z0)
    results: dict[str, Any] = {"bits/dim, bound": float(terms.sum())}
    if densities:
        results["bits/dim, ODE"] = float(bits_per_dim(-torch.cat(densities), z0))
    facts = {"n": len(chosen), "levels": len(levels), "of": "latents" if latents.bins is None else "8-bit images"}
    if out:
        table = [{"sigma": float(s), "bits": float(b)} for s, b in zip(levels, terms[:-1], strict=True)]
        write_atomically(Path(out), (json.dumps({**results, **facts, "prior": float(terms[-1]), "terms": table}, indent=1) + "\n").encode())
    _show(levels.cpu(), terms)
    print("\n".join(f"{name:<22} {value:.4f}" for name, value in results.items()))
    print(f"{facts['n']} images of {images}, {facts['of']}, {facts['levels']} noise levels")
    return 0


def _show(levels: Tensor, terms: Tensor) -> None:
    """Sums of L_0, of about equal numbers of steps, and of L_T."""
    print(f"{'noise levels':<22} bits/dim")
    print(f"{f'data, {levels[0]:.3g}':<22} {float(terms[0]):.4f}")
    for part in torch.arange(1, len(levels)).chunk(BINS):
        print(f"{f'{levels[part[0] - 1]:.3g} to {levels[part[-1]]:.3g}':<22} {float(terms[part].sum()):.4f}")
    print(f"{f'prior, {levels[-1]:.3g}':<22} {float(terms[-1]):.4f}")


def main(command: str, arguments: list[str]) -> int:
    return likelihood(
        **parse(command, "How probable a model thinks images are, in bits per dimension.", OPTIONS, arguments, {"--num": "--n"})
    )
