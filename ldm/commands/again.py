"""ldm again: a picture once more, from the settings that it carries."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from ldm import model_folder
from ldm.callbacks.writer import settings_in
from ldm.commands.configs import PARSER, plain_errors, quiet
from ldm.commands.predict import SILENT, Ways, load, make
from ldm.commands.sources import read_sources
from ldm.stages.generation import LANES, Recipe, Request


def again(
    picture: str,
    model: str,
    image: str | None = None,
    mask: str | None = None,
    towards: str | None = None,
    out: str = "again",
    device: Literal["cpu", "gpu"] = "gpu" if torch.cuda.is_available() else "cpu",
) -> int:
    """Make a picture of `ldm sample` or `ldm predict` once more; on the same kind of device it has the same pixels.

    Args:
        picture: PNG file that they wrote
        model: the model that made it: folder, checkpoint or name of a shipped model
        image: the image that it was made from, if any
        mask: and the mask
        towards: and the second image
        out: folder for the picture
        device: cpu, gpu
    """
    stored = settings_in(Path(picture))
    if stored is None:
        raise ValueError(f"{picture!r} carries no settings of ldm: give a PNG file as `ldm sample` or `ldm predict` wrote it")
    loaded = load(model)
    if loaded.sha256 != stored["model_sha256"]:
        hashes = [digest[:12] for digest in (stored["model_sha256"], loaded.sha256)]
        raise ValueError(f"{picture!r} was made by another model: its sha256 begins with {hashes[0]}, that of {model!r} with {hashes[1]}")
    recipe = Recipe(**model_folder.build({field.name: stored[field.name] for field in fields(Recipe)}))
    source = None
    if "image" in stored:
        if image is None:
            raise ValueError(f"{picture!r} was made from the image {stored['image']}: give it with --image")
        names = ("image_sha256", "frame", "mask_sha256", "towards_sha256")
        for source in read_sources(loaded, recipe, image, mask, stored["shows"], towards):
            wrong = [name for name in names if source.facts.get(name) != stored.get(name)]
            if not wrong or wrong[0] not in names[:2]:
                break
        if wrong:
            what = "image" if wrong[0] == "frame" else wrong[0].removesuffix("_sha256")
            raise ValueError(f"{picture!r} was made with another file as {what}, or with none: give that")
    found: dict[str, Any] = {"condition": stored["class"], "negative": stored["negative"], "source": source}
    found |= {"towards": stored.get("towards_seed"), "mixed": stored.get("mixed"), "share": stored.get("share", 0.0)}
    request = Request(stored["index"], stored["seed"], **found)
    trainer = {**SILENT, "accelerator": device, "devices": 1, "precision": stored.get("precision", "32-true")}
    kept = {"watermark": stored["watermark"], "tile": stored.get("tile", 0), "lanes": stored.get("lanes", LANES)}
    return make(trainer, loaded, [request], recipe, Path(out), Ways(overwrite=True, **kept))


def main(command: str, arguments: list[str]) -> int:
    quiet()
    parser = ArgumentParser(prog=f"ldm {command}", description="A picture once more, from the settings that it carries.", **PARSER)
    parser.add_function_arguments(again, as_positional=True)
    with plain_errors():
        return again(**vars(parser.parse_args(arguments)))
