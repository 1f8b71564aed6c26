"""Paths that a user gives, before anything there is opened."""

import os
import re
from itertools import product
from pathlib import Path

from ldm.errors import UserError


def at_home(path: str) -> str:
    """A path with the home folder that its `~` means; UserError where there is no such user."""
    if (found := os.path.expanduser(path)).startswith("~"):  # not of Path, which would drop a trailing /
        name = found.split("/")[0]
        raise UserError(f"{path!r} begins with the home folder of a user {name[1:]!r}, who is not known here: write ./{name} for a folder")
    return found


def existing(path: str) -> list[Path]:
    """The files and folders that a path means, in brace notation several; UserError where one is not there."""
    if re.match(r"[a-z0-9+]{2,}://", path, re.IGNORECASE):
        raise UserError(f"{path!r} is an address: download it first, and give the path of the files")
    paths = [Path(one).expanduser() for one in expanded(path)]
    missing = [one for one in paths if not one.exists()]
    if missing:
        of = f", the first of {path!r}" if len(paths) > 1 else ""
        hub = "; of a data set of the Hugging Face hub, download it first" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
        raise UserError(f"there is no file or folder {str(missing[0])!r}{of}: check the path{hub}")
    return paths


def expanded(path: str) -> list[str]:
    """The paths of brace notation: `{000..009}` counts, `{a,b}` lists; a path that is there stays as it is."""
    parts = re.split(r"\{([^{}]*)\}", path)
    if len(parts) == 1 or Path(path).expanduser().exists():
        return [path]
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(braces: str) -> list[str]:
    if numbered := re.fullmatch(r"(\d+)\.\.(\d+)", braces):
        return [f"{number:0{len(numbered[1])}d}" for number in range(int(numbered[1]), int(numbered[2]) + 1)]
    return braces.split(",")
