"""ldm sample: pictures from a trained model, from words instead of classes of samplers and tasks."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from ldm.callbacks.writer import frames_in, path_of
from ldm.commands.configs import PARSER, plain_errors, quiet
from ldm.commands.predict import SILENT, Ways, load, make
from ldm.commands.wishes import Wish
from ldm.data.films import VIDEO, milliseconds_of, write_film
from ldm.degradations import Blurred, Grey, Smaller
from ldm.diffusion.samplers import RePaint
from ldm.diffusion.tasks import Between, Edit, ImageToImage, Inpaint, Outpaint, RemoveNoise, Restore, Style
from ldm.interfaces import Task
from ldm.model_folder import Loaded
from ldm.stages.generation import Recipe

# option -> the task that it asks for, made of the option's value and of --strength where that was given
TASKS: dict[str, Callable[[Any, dict[str, float]], Task]] = {
    "image": lambda _, strength: ImageToImage(**strength),
    "mask": lambda _, strength: Inpaint(**strength),
    "outpaint": lambda sides, strength: Outpaint(strength.get("strength", 1.0), *sides),
    "edit": lambda _, strength: Edit(**strength),
    "upscale": lambda factor, _: Restore(Smaller(factor)),
    "deblur": lambda px, _: Restore(Blurred(px)),
    "colourise": lambda *_: Restore(Grey()),
    "denoise": lambda level, _: RemoveNoise(level),
    "style": lambda *_: Style(),
    "towards": lambda *_: Between(),
}
STRONG = ("image", "mask", "outpaint", "edit")


def sample(
    model: str,
    prompt: str | None = None,
    classes: str | None = None,
    negative: str | int | None = None,
    n: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    image: str | None = None,
    strength: float | None = None,
    mask: str | None = None,
    repaint: int = 1,
    outpaint: list[int] | None = None,
    edit: str | None = None,
    upscale: int | None = None,
    deblur: float | None = None,
    colourise: bool = False,
    denoise: float | None = None,
    style: bool = False,
    towards: str | None = None,
    mix: str | None = None,
    size: str | None = None,
    between: int | None = None,
    frames: int = 0,
    preview: bool = False,
    watermark: bool = True,
    tile: int = 0,
    out: str = "samples",
    overwrite: bool = False,
    device: Literal["cpu", "gpu"] = "gpu" if torch.cuda.is_available() else "cpu",
) -> int:
    """Sample pictures, or do something with an image: with --image alone, pictures like it.

    Args:
        model: model folder, checkpoint or the name of a shipped model: emoji
        prompt: what the pictures show, in words, or in numbers such as 'age=30, dose=1', for a model of these
        classes: class names or numbers, separated by commas and taken in turn (--class is the same); default: evenly
            spread, but no condition where an image is given
        negative: class that guidance leads away from
        n: number of pictures; default: 4, of a film one for each frame
        seed: picture i depends on (seed, i) and its settings alone
        steps: sampling steps; default: the model's
        guidance: scale of the model's guidance; 1 is none
        image: file to start from; a film (a folder of images, GIF, WebP, MP4) is done frame by frame with the same noise, so that
            nothing flickers, and becomes animation.webp or .mp4 as well
        strength: how much of the image is made anew, 0 (nothing) to 1 (all)
        mask: image of the same shape: only its white part is made anew
        repaint: do each step so many times, so that what is made anew agrees better with the rest (5 to 10)
        outpaint: px to add left, right, top and bottom of the image
        edit: class of what the image shows; it is turned into --class, keeping its composition
        upscale: make a picture so many times larger of which the image is a small version
        deblur: make the picture of which the image is a version with Gaussian blur of so many px
        colourise: make the picture of which the image is a grey version
        denoise: make the picture of which the image is a version with noise of so many standard deviations of latents
        style: new pictures in the colours of the image
        towards: another image: the n pictures go from one image to the other (best with --guidance 1)
        mix: another class or prompt: the n pictures go from one to the other
        size: WIDTHxHEIGHT in px, of other pictures than the training's; larger ones are made of overlapping windows (in one piece by models
            of images)
        between: another seed: the n pictures go from one seed's noise to the other's
        frames: also write <index>.gif and <index>-steps.png, so many images of how each picture comes about
        preview: write preview.png after every step: the pictures in work as the model sees them
        watermark: hide a watermark in the pictures, which `ldm watermark check` finds
        tile: encode and decode large images in tiles of so many px: little memory
        out: folder for <index>.png, grid.png and manifest.jsonl
        overwrite: make pictures anew that other settings made
        device: cpu, gpu
    """
    if n is not None and n < 1:
        raise ValueError(f"n is {n}; allowed is 1 or more")
    if outpaint is not None and (len(outpaint) != 4 or min(outpaint) < 0):
        raise ValueError(f"outpaint is {outpaint}; give 4 numbers of 0 or more: px on the left, right, top and bottom")
    loaded = load(model)
    options: dict[str, Any] = {"mask": mask, "outpaint": outpaint, "edit": edit, "upscale": upscale, "deblur": deblur, "denoise": denoise}
    options |= {"towards": towards, "colourise": colourise or None, "style": style or None}
    own = loaded.model.conditioner.shrinks > 0 and not loaded.model.conditioner.masks
    recipe = Recipe.of(loaded.card)
    if guidance is not None:
        recipe = replace(recipe, guidance=_scaled(recipe.guidance, guidance))
    if repaint != 1:
        if mask is None and outpaint is None:
            raise ValueError("--repaint means nothing without --mask or --outpaint: leave it out")
        recipe = replace(recipe, sampler=RePaint(times=repaint))
    windows = size is not None and not loaded.model.conditioner.concat_channels
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    recipe = replace(recipe, task=_task(options, image, strength, own), size=_size(size), windows=windows)
    _check_pixels(loaded, recipe, outpaint, upscale)
    asked = [part.strip() for part in (classes or "").split(",") if part.strip()]
    words = [prompt] if prompt else []
    wish = Wish(n, seed, 0, words, asked or None, 0, negative, image, mask, edit, towards, between, mix)
    requests = wish.requests(loaded, recipe, 4)
    trainer = {**SILENT, "accelerator": device, "devices": 1}
    ways = Ways(overwrite=overwrite, frames=frames, watermark=watermark, tile=tile, preview=preview)
    status = make(trainer, loaded, requests, recipe, Path(out), ways)
    if image is not None and len({str(request.source and request.source.facts) for request in requests}) > 1:
        pictures = [path_of(Path(out), request.index) for request in requests]
        film = [frame for path in pictures for frame in frames_in(path, loaded.model.denoiser.network.frames)]
        suffix = ".mp4" if Path(image).suffix.lower() in VIDEO else ".webp"
        write_film(film, Path(out) / f"animation{suffix}", milliseconds_of(Path(image)))
    return status


def _check_pixels(loaded: Loaded, recipe: Recipe, outpaint: list[int] | None, upscale: int | None) -> None:
    """In the words of the options, before the parts complain in theirs."""
    height, width = recipe.size or (loaded.card["size"], loaded.card["size"])
    factor = loaded.model.latents.autoencoder.factor
    if outpaint is not None and any(side % factor for side in outpaint):
        raise ValueError(f"outpaint is {outpaint}; each side must be a multiple of {factor} px, the factor of the model's autoencoder")
    if upscale is not None and upscale > 0 and (height % upscale or width % upscale):
        raise ValueError(
            f"upscale is {upscale}, which does not divide the {width}x{height} px of the picture: choose one that does, such as 2"
        )


def _task(options: dict[str, Any], image: str | None, strength: float | None, own: bool) -> Task | None:
    """What the options ask for; with an image alone, what the model was trained to make of images (own), or pictures like it."""
    asked = [name for name, value in options.items() if value is not None]
    if image is None:
        if asked or strength is not None:
            raise ValueError(f"--{asked[0] if asked else 'strength'} needs an image: give --image FILE")
        return None
    if own and not asked and strength is None:
        return None
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} were given together: choose one task")
    name = asked[0] if asked else "image"
    if strength is None:
        return TASKS[name](options.get(name), {})
    if name not in STRONG:
        raise ValueError(f"--strength means nothing to --{name}: leave it out")
    return TASKS[name](options.get(name), {"strength": strength})


def _scaled(guidance: Any, scale: float) -> Any:
    if "scale" not in {field.name for field in fields(guidance)}:
        raise ValueError(f"the model's guidance {type(guidance).__name__} has no scale: leave --guidance out")
    return replace(guidance, scale=scale)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size is {text!r}; give WIDTHxHEIGHT in px, such as 128x64")
    return int(height), int(width)


def main(command: str, arguments: list[str]) -> int:
    quiet()
    parser = ArgumentParser(prog="ldm sample", description="Sample pictures, or do something with an image.", **PARSER)
    parser.add_function_arguments(sample, as_positional=True)
    arguments = [part.replace("--class", "--classes", 1) if part.split("=")[0] == "--class" else part for part in arguments]
    with plain_errors():
        return sample(**vars(parser.instantiate_classes(parser.parse_args(arguments))))
