"""ldm predict: pictures from a trained model, on as many devices as a Trainer has."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ActionConfigFile
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import ldm.diffusion.guidance
import ldm.diffusion.multistep
import ldm.diffusion.samplers
import ldm.diffusion.tasks  # noqa: F401  makes short class names known
from ldm import __version__, model_folder
from ldm.autoencoder.tiling import Tiled
from ldm.callbacks.writer import PictureWriter, path_of, settings_in
from ldm.commands.configs import PARSER, find_configs, plain_errors, quiet
from ldm.commands.wishes import Wish
from ldm.data.transforms import as_image, grid, read_pixels
from ldm.data.watermark import SMALLEST
from ldm.diffusion.schedule import Spacing
from ldm.frames import strip
from ldm.interfaces import Guidance, Sampler, Task
from ldm.model_folder import Loaded, write_atomically
from ldm.ranges import to_uint8
from ldm.stages.generation import LANES, Generation, Recipe, Request, entry_of
from ldm.stages.model import LatentDiffusion

SILENT: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "callbacks": []}


def predict(
    trainer: dict[str, Any],
    model: str,
    out: str = "samples",
    num: int | None = None,
    first: int = 0,
    prompt: str | list[str] | None = None,
    classes: list[str | int] | str | None = None,
    per_class: int = 0,
    unconditional: bool = False,
    negative: str | int | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    steps: int | list[float] | None = None,
    spacing: Spacing | None = None,
    task: Task | None = None,
    image: str | None = None,
    mask: str | None = None,
    towards: str | None = None,
    shows: str | int | None = None,
    between: int | None = None,
    mix: str | None = None,
    size: tuple[int, int] | None = None,
    windows: bool = False,
    batch_size: int = 64,
    lanes: int = LANES,
    columns: int = 0,
    frames: int = 0,
    watermark: bool = False,
    tile: int = 0,
    overwrite: bool = False,
    preview: bool = False,
    trusted: list[str] | None = None,
) -> int:
    """Sample pictures from a trained model.

    Args:
        trainer: arguments of lightning.Trainer (accelerator, devices, strategy, num_nodes, precision, ...)
        model: model folder, checkpoint (.ckpt, its averaged weights) or the name of a shipped model: emoji
        out: folder for <index>.png, grid.png and manifest.jsonl; pictures that are there already are kept
        num: number of pictures; default: 16, of a film one for each frame
        first: index of the first picture
        prompt: what the pictures show, in words, or numbers such as 'age=30, dose=1'; several are taken in turn
        classes: class names, first parts of them, or numbers, separated by commas and taken in turn; default: all, evenly spread, but no
            condition where an image is given
        per_class: this many pictures of each class one after the other, instead of num
        unconditional: leave the condition out
        negative: class that guidance leads away from; default: no class
        seed: picture i depends on (seed, i) and its settings alone
        sampler: Ancestral (eta 0: DDIM, 1: DDPM), DPMSolverPP2M, UniPC, Heun, ... (`--sampler.help CLASS`); default: the model's
        guidance: CFG with its scale, APG, ClassifierGuidance, ...; default: the model's
        steps: how many sampling steps, or a list of decreasing steps of the schedule; default: the model's
        spacing: which noise levels they visit; default: the model's
        task: what to do with an image: ImageToImage, Inpaint, Outpaint, RemoveNoise, Edit, Between, Style, Restore
        image: file that the task works on; a film (a folder of images, GIF, WebP, MP4) is done frame by frame with the same noise
        mask: image of the same shape, white where the picture is to be made anew
        towards: another image; with the task Between the pictures go from one to the other
        shows: class of what the image shows, for Edit
        between: another seed: the pictures go from one seed's noise to the other's
        mix: another class or prompt: the pictures go from one to the other
        size: height and width in px, if not the training's
        windows: make pictures larger than the training's of overlapping windows (MultiDiffusion)
        batch_size: pictures per batch and device; no influence on them
        lanes: pictures, or frames of clips, per network call; more is faster on a GPU and changes the pictures' last bits
        columns: pictures per row of grid.png; default: per_class, or a square
        frames: also write <index>.gif and <index>-steps.png, so many images of how each picture comes about
        watermark: hide a watermark in the pictures, which `ldm watermark check` finds
        tile: encode and decode large images in tiles of so many px, which overlap by a quarter: little memory
        overwrite: make pictures anew that other settings made
        preview: write preview.png after every step: the pictures in work as the model sees them
        trusted: packages beside ldm whose classes the model may name
    """
    for name, value, least in (("num", num, 1), ("batch_size", batch_size, 1), ("lanes", lanes, 1), ("per_class", per_class, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; allowed is {least} or more")
    loaded = load(model, trusted or ())
    given: dict[str, Any] = {"sampler": sampler, "guidance": guidance, "steps": steps, "spacing": spacing, "task": task, "size": size}
    given = {key: value for key, value in given.items() if value is not None}
    recipe = replace(Recipe.of(loaded.card), windows=windows, **given)
    asked = [str(c).strip() for c in (classes.split(",") if isinstance(classes, str) else classes or [])]
    wish = Wish(
        num, seed, first, [prompt] if isinstance(prompt, str) else prompt or [], [] if unconditional else asked or None, per_class,
        negative, image, mask, shows, towards, between, mix,
    )  # fmt: skip
    ways = Ways(batch_size, lanes, columns or per_class, overwrite, frames, watermark, tile, preview)
    return make(trainer, loaded, wish.requests(loaded, recipe, 16), recipe, Path(out), ways)


def load(model: str, trusted: Sequence[str] = ()) -> Loaded:
    loaded = model_folder.load(model, trusted)
    if not isinstance(loaded.model, LatentDiffusion):
        raise ValueError(
            f"{model!r} holds a {type(loaded.model).__name__}, which makes no pictures: `predict` needs a model of stage 2 (DiffusionStage)"
        )
    return loaded


@dataclass(frozen=True)
class Ways:
    """How pictures are made and stored, without a change to what they show (lanes: its last bits; tile: hardly)."""

    batch_size: int = 64
    lanes: int = LANES
    columns: int = 0
    overwrite: bool = False
    frames: int = 0
    watermark: bool = False
    tile: int = 0
    preview: bool = False


def make(trainer: dict[str, Any], loaded: Loaded, requests: list[Request], recipe: Recipe, folder: Path, ways: Ways) -> int:
    """The pictures that are not in the folder yet, then grid and manifest of all."""
    if ways.frames < 0:
        raise ValueError(f"frames is {ways.frames}; allowed is 0 (none) or more")
    for condition in {condition for request in requests for condition in (request.condition, request.negative, request.mixed)}:
        entry_of(loaded.model, recipe.guidance, condition, loaded.card["classes"])  # says now what is wrong with it
    loaded.model.denoiser.schedule.steps(recipe.steps, recipe.spacing)
    loaded.model.latents.shape_of(recipe.size)
    height, width = recipe.size or (loaded.card["size"], loaded.card["size"])
    watermark = ways.watermark and min(height, width) >= SMALLEST
    if ways.watermark and not watermark:
        print(f"pictures of {width}x{height} px are too small for a watermark: they get none")
    extra: dict[str, Any] = {"watermark": watermark}
    if ways.tile:
        factor, latents = loaded.model.latents.autoencoder.factor, loaded.model.latents
        latents.autoencoder = Tiled(latents.autoencoder, ways.tile, max(1, ways.tile // 4 // factor) * factor)
        extra["tile"] = ways.tile
    if ways.lanes != LANES:
        extra["lanes"] = ways.lanes
    if (precision := str(trainer.get("precision") or "32-true")) not in ("32", "32-true"):
        extra["precision"] = precision
    told = {request.index: {**settings(request, recipe, loaded), **extra} for request in requests}
    pending = _pending(requests, folder, told, ways.overwrite)
    writer = PictureWriter(folder, lambda request: told[request.index], watermark)
    try:
        runner = L.Trainer(**{**trainer, "callbacks": [writer, *(trainer["callbacks"] or [])]})
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    if pending:
        _run(runner, loaded, recipe, pending, ways, folder)
    if runner.is_global_zero:
        _finish(requests, folder, ways.columns)
        print(
            f"{len(pending)} pictures made, {len(requests) - len(pending)} were there: {folder / 'grid.png'}, {folder / 'manifest.jsonl'}"
        )
    return 0


def settings(request: Request, recipe: Recipe, loaded: Loaded) -> dict[str, Any]:
    """Everything that decides what a picture shows, as stored in the PNG and in the manifest."""
    asked: dict[str, Any] = {"index": request.index, "seed": request.seed, "class": request.condition, "negative": request.negative}
    if request.towards is not None:
        asked |= {"towards_seed": request.towards}
    if request.mixed is not None:
        asked |= {"mixed": request.mixed}
    if request.share:
        asked |= {"share": request.share}
    if request.source is not None:
        asked |= {**request.source.facts, "shows": request.source.shows}
    return {**asked, **model_folder.describe(vars(recipe)), "model_sha256": loaded.sha256, "ldm": __version__}


def _pending(requests: list[Request], folder: Path, told: Mapping[int, Any], overwrite: bool) -> list[Request]:
    """The requests whose picture is not there; pictures of other settings than those of `told` are only replaced on demand."""
    folder.mkdir(parents=True, exist_ok=True)
    pending = []
    for request in requests:
        path = path_of(folder, request.index)
        same = settings_in(path) == told[request.index]
        if path.exists() and not same and not overwrite:
            raise ValueError(f"{path} was made with other settings: choose another --out, or give --overwrite true")
        if not same:
            pending.append(request)
    return pending


def _run(trainer: L.Trainer, loaded: Loaded, recipe: Recipe, pending: list[Request], ways: Ways, folder: Path) -> None:
    frames = loaded.model.denoiser.network.frames
    batch_size, lanes = ways.batch_size, max(1, ways.lanes // frames)

    def preview(images: Tensor) -> None:
        data = io.BytesIO()
        as_image(grid(to_uint8(strip(images, frames)), 1 if frames > 1 else 4)).save(data, format="PNG")
        write_atomically(folder / "preview.png", data.getvalue())

    shown = preview if ways.preview and trainer.is_global_zero else None
    padded = sum(-(-min(batch_size, len(pending) - start) // lanes) * lanes for start in range(0, len(pending), batch_size))
    total, per_image = -(-padded // trainer.world_size) * recipe.num_steps, 1 / recipe.num_steps
    with tqdm(total=total, desc="Sampling", unit="img", unit_scale=per_image, disable=not trainer.is_global_zero) as bar:
        generation = Generation(loaded.model, pending, recipe, loaded.card["classes"], lanes, lambda: bar.update(lanes), ways.frames, shown)
        positions: Any = range(len(pending))
        trainer.predict(generation, DataLoader(positions, batch_size=batch_size, collate_fn=list), return_predictions=False)
    trainer.strategy.barrier("all pictures written")


def _finish(requests: list[Request], folder: Path, columns: int) -> None:
    """Grid, about square without `columns`, and manifest, from the pictures themselves."""
    paths = [path_of(folder, request.index) for request in requests]
    pictures = torch.stack([read_pixels(path) for path in paths])
    columns = columns or max(1, round((len(paths) * pictures.shape[2] / pictures.shape[3]) ** 0.5))
    as_image(grid(pictures, columns)).save(folder / "grid.png")
    lines = [json.dumps({"file": path.name, **(settings_in(path) or {})}) + "\n" for path in paths]
    write_atomically(folder / "manifest.jsonl", "".join(lines).encode())


def main(command: str, arguments: list[str]) -> int:
    quiet()
    parser = LightningArgumentParser(prog="ldm predict", description="Sample pictures from a trained model.", **PARSER)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with options; can be repeated")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in SILENT.items()})
    parser.add_function_arguments(predict, skip={"trainer"})
    with plain_errors():
        objects = parser.instantiate_classes(parser.parse_args(find_configs(arguments)))
    return predict(vars(objects.pop("trainer")), **{name: value for name, value in vars(objects).items() if name != "config"})
