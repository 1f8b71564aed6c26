"""ema: a model with an average of its weights of any length, made after training."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

import ldm.metrics.features
from ldm import model_folder
from ldm.callbacks.power_ema import reconstruct, stored
from ldm.commands.configs import PARSER, plain_errors
from ldm.commands.evaluate import measure, open_images
from ldm.commands.wishes import said_of
from ldm.data.datasets import Images
from ldm.interfaces import Autoencoder, Features
from ldm.metrics.distances import Statistics, frechet_distance
from ldm.ranges import to_float, to_uint8
from ldm.stages.generation import Recipe, Request, generate

LENGTHS = [0.03, 0.05, 0.07, 0.1, 0.14]


def ema(
    run: str,
    out: str,
    std: float | None = None,
    step: int | None = None,
    candidates: list[float] = LENGTHS,
    reference: str | None = None,
    num: int = 256,
    features: Features | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> int:
    """Make a model folder with an average of another length, of what a run with -c trainer/power-ema.yaml stored.

    Args:
        run: folder of one stage of a run, with `model` and `averages` in it
        out: model folder to write
        std: relative length of the average (0.05: short, 0.15: long); default: that of the candidates with the least Fréchet distance
        step: of the training at which it ends, one that was stored; default: the last.  An early one is a weaker model for autoguidance
        candidates: lengths to choose from
        reference: images to choose by, held-out ones or all: a folder, `emoji` or `digits`; stage 1 reconstructs them, stage 2 makes as
            many pictures of their classes or texts
        num: how many of them
        features: in which they are compared; default: MobileNetV2
        device: to choose on
    """
    if (std is None) == (reference is None):
        raise ValueError("give either --std, or --reference to choose the best of the candidates by")
    loaded, averages = model_folder.load(Path(run) / "model"), Path(run) / "averages"
    known = sorted({number for _, number, _ in stored(averages)})
    step = known[-1] if step is None else step
    if step not in known:
        raise ValueError(f"step is {step}; stored are {', '.join(map(str, known))}")
    if reference is not None:
        network = (features or ldm.metrics.features.MobileNetV2()).to(device)
        images = open_images(reference, int(loaded.card["size"]))
        chosen = torch.linspace(0, len(images) - 1, min(num, len(images))).long().tolist()
        wanted = Statistics.of(measure(network, Chosen(images, chosen), 64, device))
        results = {}
        for length, weights in zip(candidates, reconstruct(averages, candidates, step), strict=True):
            fill(loaded.model, weights)
            made = torch.cat([network(part.to(device)).cpu() for part in pictures(loaded, images, chosen, device).split(64)])
            results[length] = float(frechet_distance(Statistics.of(made), wanted))
            print(f"length {length:<6} FD-{network.name} {results[length]:.4g}", flush=True)
        std = min(results, key=results.__getitem__)
    assert std is not None
    fill(loaded.model, *reconstruct(averages, [std], step))
    model_folder.save(loaded.model.cpu(), out, {**loaded.card, "average": std, "steps": step})
    print(f"the average of length {std} is in {out}")
    return 0


class Chosen(Images):
    """Some of the images."""

    def __init__(self, images: Images, indices: list[int]) -> None:
        self.images, self.size, self.records = images, images.size, [images.records[i] for i in indices]
        self.indices = indices

    def pixels(self, index: int) -> Tensor:
        return self.images.pixels(self.indices[index])


def fill(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    model_folder.load_weights(model, {**state, **{name: tensor.to(state[name]) for name, tensor in weights.items()}}, "averages")


@torch.no_grad()
def pictures(loaded: model_folder.Loaded, images: Images, chosen: list[int], device: str) -> Tensor:
    """uint8 (N,3,H,W): reconstructions of the chosen images, or as many samples."""
    model: Any = loaded.model.to(device).eval()
    found = []
    if isinstance(model, Autoencoder):
        for index in tqdm(chosen, desc="Reconstructing", unit="img"):
            x = to_float(images.pixels(index)[None].to(device))
            found.append(model.decode(model.encode(x).mode()))
        return to_uint8(torch.cat(found)).cpu()
    requests = [Request(i, 0, said_of(loaded, images.records[index])) for i, index in enumerate(chosen)]
    recipe = Recipe.of(loaded.card)
    with tqdm(total=len(chosen) * recipe.num_steps, desc="Sampling", unit_scale=1 / recipe.num_steps, unit="img") as bar:
        return to_uint8(generate(model, requests, recipe, loaded.card["classes"], progress=lambda: bar.update(8))).cpu()


def main(command: str, arguments: list[str]) -> int:
    parser = ArgumentParser(prog=f"ldm {command}", description="An average of the weights of any length, after training.", **PARSER)
    parser.add_function_arguments(ema)
    with plain_errors():
        return ema(**vars(parser.instantiate_classes(parser.parse_args(arguments))))
