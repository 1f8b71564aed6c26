"""ldm inspect: what a path holds, before anything is trained on it."""

import json as json_
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

from ldm.console.options import Option, number, numbers, one_of, parse, path, switch, whole
from ldm.data.inspect import contact_sheet, inspect
from ldm.errors import UserError

OPTIONS = [
    Option("path", "folder, archive, table, arrays or list of images: whatever --data.path takes", path),
    Option("--size", "px for the commands that are shown; default: 64", whole(1), 64, "PX"),
    Option("--channels", "1 grey, 3 RGB, 4 RGBA; default: 3, or as many as arrays have", whole(1), None, "N"),
    Option("--window", "values of more than 8 bits and of floats that become black and white", numbers, None, "LOW,HIGH"),
    Option("--depth", "slices (default) or channels: what those of volumes are", one_of("slices", "channels"), "slices", "KIND"),
    Option("--val-fraction", "share that is held out where the layout has no split; default: 0.1", number, 0.1, "SHARE"),
    Option("--split-seed", "which; default: 0", whole(0), 0, "N"),
    Option("--encoder", "folder of a text encoder, whose tokens of the captions are counted", path, None, "FOLDER"),
    Option("--max-tokens", "more than so many are cut; default: 24", whole(1), 24, "N"),
    Option("--sheet", "file (.png) for a contact sheet", path, None, "FILE"),
    Option("--json", "print all facts as JSON", switch, False),
]


def report(
    path: str, size: int = 64, channels: int | None = None, window: list[float] | None = None, depth: str = "slices",
    val_fraction: float = 0.1, split_seed: int = 0, encoder: str | None = None, max_tokens: int = 24, sheet: str | None = None,
    json: bool = False,
) -> int:  # fmt: skip
    """Print what a path holds, and the commands to go on with; every image is decoded."""
    if window is not None and len(window) != 2:
        raise UserError(f"--window is {window}; give two values, such as 0,4095")
    if sheet is not None and not sheet.lower().endswith(".png"):
        raise UserError(f"--sheet is {sheet!r}; its name must end with .png")
    options: dict[str, Any] = {"channels": channels, "window": None if window is None else (window[0], window[1]), "depth": depth}
    facts = inspect(path, size, val_fraction, split_seed, tokens_of(encoder), max_tokens, **options)
    if sheet is not None:
        contact_sheet(path, **options).save(sheet)
    print(as_json(facts) if json else "\n".join([*lines(facts), "", *commands(facts, size, window, channels)]))
    return 0


def tokens_of(encoder: str | None) -> Callable[[str], int] | None:
    """Counts the tokens of a text."""
    if encoder is None:
        return None
    from ldm.conditioning.text import Text

    tokenizer = Text(encoder).tokenizer
    return lambda text: len(tokenizer(text)["input_ids"])


def as_json(facts: dict[str, Any]) -> str:
    """Facts for programs."""
    return json_.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)


def lines(facts: dict[str, Any]) -> list[str]:
    """Facts for people: the sentences that every run begins with, then a line for each kind."""
    found, sizes, texts, twice = list(facts["sentences"]), facts["sizes"], facts["texts"], facts["duplicates"]
    if sizes["width"]:
        kinds = ", ".join(f"{mode} {count:,}" for mode, count in facts["modes"].items())
        spread = " and ".join(
            f"{name} {x['least']:g} to {x['greatest']:g} px (median {x['median']:g})" for name, x in list(sizes.items())[:2]
        )
        aspect, values = sizes["aspect"], facts["values"]
        found.append(f"sizes: {spread}; width : height {aspect['least']:g} to {aspect['greatest']:g}")
        used = "" if facts["range_used"] is None else f" ({facts['range_used']:.0%} of their range)"
        span = f"{values['least']:g} to {values['greatest']:g}{used}"
        found.append(f"values: {kinds}; {span}; read as {facts['bits']} bits, {facts['channels']} channels")
    if texts["number"]:
        cut = f", {texts['cut']:,} of them are cut" if "cut" in texts else ""
        found.append(
            f"captions: {texts['number']:,} of {facts['captions']:,} images, {texts['least']:g} to {texts['greatest']:g} "
            f"{texts['counted']} (median {texts['median']:g}){cut}"
        )
    if twice["exact"] or twice["near"]:
        first = f"{twice['examples'][0][0]!r} and {twice['examples'][0][1]!r}"
        across = f"; {twice['across']:,} of them are both in training and held out" if twice["across"] else ""
        found.append(f"duplicates: {twice['exact']:,} equal files, {twice['near']:,} that look alike, such as {first}{across}")
    if facts["damaged"]:
        found.append(f"cannot be read: {len(facts['damaged']):,}, such as {next(iter(facts['damaged'].values()))}")
    return found


def commands(facts: dict[str, Any], size: int, window: list[float] | None, channels: int | None) -> list[str]:
    """The commands to go on with: the one that does all where nothing was chosen, both stages by hand, and pictures."""
    name = Path(facts["path"]).name.split(".")[0] or "mine"
    data = f"--data.path {quote(facts['path'])} --data.size {size}"
    if channels is not None:
        data += f" --data.channels {channels}"
    if window is not None:
        data += f" --data.window '[{window[0]:g},{window[1]:g}]'"
    run = quote(f"runs/{name}")
    plain = [] if channels is not None or window is not None else [f"ldm train {quote(facts['path'])}", "or by hand:"]
    return [
        *plain,
        f"ldm fit -c trainer/cpu.yaml -c data/folder.yaml -c autoencoder/emoji.yaml {data} --run {run}",
        f"ldm fit -c trainer/cpu.yaml -c data/folder.yaml -c diffusion/emoji.yaml {data} --run {run}",
        f"ldm sample {run} --n 16",
    ]


def main(command: str, arguments: list[str]) -> int:
    return report(**parse(command, "What a path holds: images, classes, captions, sizes, damage, duplicates.", OPTIONS, arguments))
