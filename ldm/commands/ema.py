"""ema: a model with an average of its weights of any length, made after training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import model_folder
from ldm.callbacks.power_ema import reconstruct, stored
from ldm.commands.evaluate import features_of
from ldm.console.options import DEVICE, Option, number, numbers, parse, path, switch, whole
from ldm.console.shorten import IMAGES, limit
from ldm.data.images import Images, Subset, open_images
from ldm.errors import UserError
from ldm.interfaces import Autoencoder, Features
from ldm.metrics.features import MobileNetV2, Reference
from ldm.ranges import to_float, to_uint8
from ldm.sampling.like import samples_like
from ldm.sampling.model import Model, device_of
from ldm.sampling.pipeline import CHUNK_SIZE
from ldm.sampling.request import SamplingConfig

LENGTHS = [0.03, 0.05, 0.07, 0.1, 0.14]

OPTIONS = [
    Option("--run", "folder of one stage of a run, with `model` and `averages` in it", path, None, "FOLDER", required=True),
    Option("--out", "model folder to write", path, None, "FOLDER", required=True),
    Option("--std", "relative length of the average (0.05: short, 0.15: long); default: the best of the candidates", number, None, "S"),
    Option("--step", "of the training at which it ends; default: the last; an early one gives a weaker model", whole(0), None, "N"),
    Option("--candidates", "lengths to choose from", numbers, LENGTHS, "S,S,..."),
    Option("--reference", "images to choose by (FD): a folder, `emoji`, `digits`; stage 1 reconstructs them", path, None, "SET"),
    Option("--n", "how many of them; default: 256", whole(2), 256, "N"),
    Option("--features", "in which they are compared; default: MobileNetV2", base=Features, rooms=("metrics",)),
    Option("--overwrite", "replace a model that is there", switch, False),
    DEVICE,
]  # fmt: skip


def ema(
    run: str, out: str, std: float | None = None, step: int | None = None, candidates: Sequence[float] = tuple(LENGTHS),
    reference: str | None = None, n: int = 256, features: Features | None = None, overwrite: bool = False, device: str = "auto",
) -> int:  # fmt: skip
    """Make a model folder with an average of another length, of what a run with -c trainer/power-ema.yaml stored."""
    place = device_of(device)
    n = IMAGES if limit() is not None else n
    if (std is None) == (reference is None):
        raise UserError("give either --std, or --reference to choose the best of the candidates by")
    model_folder.require_free(Path(out), overwrite)
    loaded, averages = model_folder.load(Path(run) / "model"), Path(run) / "averages"
    known = sorted({number for _, number, _ in stored(averages)})
    step = known[-1] if step is None else step
    if step not in known:
        raise UserError(f"step is {step}; stored are {', '.join(map(str, known))}")
    if reference is not None:
        network = (features or MobileNetV2()).to(place)
        images = open_images(reference, int(loaded.card["size"]))
        chosen = torch.linspace(0, len(images) - 1, min(n, len(images))).long().tolist()
        wanted = Reference(network, features_of(network, Subset(images, chosen), 64, place), place)
        results = {}
        for length, weights in zip(candidates, reconstruct(averages, list(candidates), step), strict=True):
            fill(loaded.model, weights)
            results[length] = wanted.distance(pictures(loaded, images, chosen, place))
            print(f"length {length:<6} FD-{network.name} {results[length]:.4g}", flush=True)
        std = min(results, key=results.__getitem__)
    assert std is not None
    fill(loaded.model, *reconstruct(averages, [std], step))
    model_folder.save(loaded.model.cpu(), out, {**loaded.card, "average": std, "steps": step})
    print(f"the average of length {std} is in {out}")
    return 0


def fill(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    model_folder.load_weights(model, {**state, **{name: tensor.to(state[name]) for name, tensor in weights.items()}}, "averages")


@torch.no_grad()
def pictures(loaded: model_folder.Loaded, images: Images, chosen: list[int], device: torch.device) -> Tensor:
    """uint8 (N,3,H,W): reconstructions of the chosen images, or as many samples."""
    model: Any = loaded.model.to(device).eval()
    found = []
    if isinstance(model, Autoencoder):
        for index in tqdm(chosen, desc="Reconstructing", unit="img"):
            x = to_float(images.pixels(index)[None].to(device))
            found.append(model.decode(model.encode(x).mode()))
        return to_uint8(torch.cat(found)).cpu()
    config = SamplingConfig.of(loaded.card)
    with tqdm(total=len(chosen), desc="Sampling", unit="img") as bar:
        share = CHUNK_SIZE / config.num_steps
        return samples_like(Model(loaded, str(device)), images, chosen, config, lambda: bar.update(share))


def main(command: str, arguments: list[str]) -> int:
    return ema(**parse(command, "An average of the weights of any length, after training.", OPTIONS, arguments, {"--num": "--n"}))
