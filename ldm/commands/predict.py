"""ldm predict: pictures from a trained model, on as many devices as a Trainer has."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader
from tqdm import tqdm

import ldm.diffusion.guidance
import ldm.diffusion.multistep
import ldm.diffusion.samplers  # noqa: F401  makes short class names known
from ldm import __version__, model_folder
from ldm.callbacks.writer import PictureWriter, path_of, settings_in
from ldm.commands.configs import PARSER, find_configs, plain_errors, quiet
from ldm.data.transforms import as_image, grid, read_pixels
from ldm.diffusion.schedule import Spacing
from ldm.interfaces import Guidance, Sampler
from ldm.model_folder import Loaded, write_atomically
from ldm.stages.generation import LANES, Generation, Recipe, Request
from ldm.stages.model import LatentDiffusion


def conditions(names: Sequence[str], wanted: Sequence[str], num: int, per_class: int) -> list[str | None]:
    """One class per picture.  A wanted name that is the first part of several ("a" of "a/x", "a/y") stands for them in turn."""
    groups = [[name for name in names if name.startswith(f"{w}/")] or [w] for w in wanted] if wanted else [[name] for name in names]
    if not groups:
        return [None] * num
    if per_class:
        return [group[i % len(group)] for group in groups for i in range(per_class)]
    if not wanted:
        return [names[i * len(names) // num] for i in range(num)]
    return [groups[i % len(groups)][i // len(groups) % len(groups[i % len(groups)])] for i in range(num)]


def predict(
    trainer: dict[str, Any],
    model: str,
    out: str = "samples",
    num: int = 16,
    first: int = 0,
    classes: list[str | int] | str | None = None,
    per_class: int = 0,
    unconditional: bool = False,
    negative: str | int | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    steps: int | None = None,
    spacing: Spacing = "trailing",
    batch_size: int = 64,
    lanes: int = LANES,
    columns: int = 0,
    overwrite: bool = False,
    trusted: list[str] | None = None,
) -> int:
    """Sample pictures from a trained model.

    Args:
        trainer: arguments of lightning.Trainer (accelerator, devices, strategy, num_nodes, precision, ...)
        model: model folder, checkpoint (.ckpt, its averaged weights) or the name of a shipped model: emoji
        out: folder for <index>.png, grid.png and manifest.jsonl; pictures that are there already are kept
        num: number of pictures
        first: index of the first picture
        classes: class names, first parts of them, or numbers, separated by commas and taken in turn; default: all, evenly spread
        per_class: this many pictures of each class one after the other, instead of num
        unconditional: leave the condition out
        negative: class that guidance leads away from; default: no class
        seed: picture i depends on (seed, i) and its settings alone
        sampler: Ancestral (eta 0: DDIM, 1: DDPM), Heun or DPMSolverPP2M; default: the model's
        guidance: CFG with its scale; default: the model's
        steps: sampling steps; default: the model's
        spacing: which noise levels they visit
        batch_size: pictures per batch and device; no influence on them
        lanes: pictures per network call; more is faster on a GPU and changes the pictures' last bits
        columns: pictures per row of grid.png; default: per_class, or a square
        overwrite: make pictures anew that other settings made
        trusted: packages beside ldm whose classes the model may name
    """
    if min(num, batch_size, lanes) < 1 or per_class < 0:
        raise ValueError(
            f"num is {num}, batch_size {batch_size}, lanes {lanes}, per_class {per_class}: the first three are at least 1, the last 0"
        )
    loaded = model_folder.load(model, trusted or ())
    if not isinstance(loaded.model, LatentDiffusion):
        raise ValueError(
            f"{model!r} holds a {type(loaded.model).__name__}, which makes no pictures: `predict` needs a model of stage 2 (DiffusionStage)"
        )
    names = loaded.card["classes"]
    recipe = Recipe.of(loaded.card)
    given: dict[str, Any] = {"sampler": sampler, "guidance": guidance, "steps": steps, "spacing": spacing}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    conditional = loaded.model.conditioner.num_classes and not unconditional
    asked = [str(c).strip() for c in (classes.split(",") if isinstance(classes, str) else classes or [])]
    wanted: Sequence[str | None] = conditions(names, asked, num, per_class) if conditional or asked else [None] * num
    requests = [Request(first + i, seed, condition, negative) for i, condition in enumerate(wanted)]
    for condition in {*wanted, negative}:
        loaded.model.conditioner.request(condition, names)  # says now what is wrong with it
    loaded.model.denoiser.schedule.steps(recipe.steps, spacing)
    folder = Path(out)
    pending = _pending(requests, folder, recipe, loaded, overwrite)
    writer = PictureWriter(folder, lambda request: settings(request, recipe, loaded))
    runner = L.Trainer(**{**trainer, "callbacks": [writer, *(trainer["callbacks"] or [])]})
    if pending:
        _run(runner, loaded, recipe, pending, batch_size, lanes)
    if runner.is_global_zero:
        _finish(requests, folder, columns or per_class or round(len(requests) ** 0.5))
        print(
            f"{len(pending)} pictures made, {len(requests) - len(pending)} were there: {folder / 'grid.png'}, {folder / 'manifest.jsonl'}"
        )
    return 0


def settings(request: Request, recipe: Recipe, loaded: Loaded) -> dict[str, Any]:
    """Everything that decides a picture, as stored in the PNG and in the manifest."""
    return {"index": request.index, "seed": request.seed, "class": request.condition, "negative": request.negative,
            **model_folder.describe(vars(recipe)),
            "model_sha256": loaded.sha256, "ldm": __version__}  # fmt: skip


def _pending(requests: list[Request], folder: Path, recipe: Recipe, loaded: Loaded, overwrite: bool) -> list[Request]:
    """The requests whose picture is not there; pictures of other settings are only replaced on demand."""
    folder.mkdir(parents=True, exist_ok=True)
    pending = []
    for request in requests:
        path = path_of(folder, request.index)
        found = settings_in(path)
        if path.exists() and found != settings(request, recipe, loaded) and not overwrite:
            raise ValueError(f"{path} was made with other settings: choose another --out, or give --overwrite true")
        if found != settings(request, recipe, loaded):
            pending.append(request)
    return pending


def _run(trainer: L.Trainer, loaded: Loaded, recipe: Recipe, pending: list[Request], batch_size: int, lanes: int) -> None:
    padded = sum(-(-min(batch_size, len(pending) - start) // lanes) * lanes for start in range(0, len(pending), batch_size))
    total, per_image = -(-padded // trainer.world_size) * recipe.steps, 1 / recipe.steps
    with tqdm(total=total, desc="Sampling", unit="img", unit_scale=per_image, disable=not trainer.is_global_zero) as bar:
        generation = Generation(loaded.model, pending, recipe, loaded.card["classes"], lanes, lambda: bar.update(lanes))
        positions: Any = range(len(pending))
        trainer.predict(generation, DataLoader(positions, batch_size=batch_size, collate_fn=list), return_predictions=False)
    trainer.strategy.barrier("all pictures written")


def _finish(requests: list[Request], folder: Path, columns: int) -> None:
    """Grid and manifest, from the pictures themselves."""
    paths = [path_of(folder, request.index) for request in requests]
    as_image(grid(torch.stack([read_pixels(path) for path in paths]), columns)).save(folder / "grid.png")
    lines = [json.dumps({"file": path.name, **(settings_in(path) or {})}) + "\n" for path in paths]
    write_atomically(folder / "manifest.jsonl", "".join(lines).encode())


def main(command: str, arguments: list[str]) -> int:
    quiet()
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "callbacks": []}
    parser = LightningArgumentParser(prog="ldm predict", description="Sample pictures from a trained model.", **PARSER)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with options; can be repeated")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in silent.items()})
    parser.add_function_arguments(predict, skip={"trainer"})
    with plain_errors():
        objects = parser.instantiate_classes(parser.parse_args(find_configs(arguments)))
    return predict(vars(objects.pop("trainer")), **{name: value for name, value in vars(objects).items() if name != "config"})
