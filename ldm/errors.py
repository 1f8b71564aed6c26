"""What goes wrong, told apart: the user's mistakes, which are one sentence, and ours, which are not."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

PACKAGES = {"pyarrow.parquet": "pyarrow", "pyarrow.ipc": "pyarrow", "pillow_heif": "pillow-heif"}  # by their module


class UserError(ValueError):
    """A mistake of the user: one sentence that says what was given, what is allowed and what to do.

    The only exception that the command line turns into a sentence; every other one is a fault of ldm and is reported as such (ldm/cli.py).
    A ValueError, so that programs which use ldm as a library may catch it as what it is.
    """


def nearest(given: str, allowed: Iterable[str], shown: int = 12) -> str:
    """The allowed names as a list in words, those that are like `given` first, at most `shown` of them."""
    names = list(dict.fromkeys(allowed))
    by_lower = {name.lower(): name for name in names}
    close = [by_lower[name] for name in get_close_matches(given.lower(), by_lower, n=3, cutoff=0.5)]
    ordered = [*close, *(name for name in names if name not in close)]
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more


def require_at_least(least: int, **values: int) -> None:
    """UserError for the first of these settings that is less."""
    for name, value in values.items():
        if value < least:
            raise UserError(f"{name} is {value}; allowed is {least} or more")


class Stopped(Exception):
    """A signal ended a command in good order; the message says what is there and how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number  # the exit status, as shells have it


def extra(module: str, name: str, what: str) -> Any:
    """A module of the extra `name` of this package; UserError where it is not installed.  what: `photo.heic`, say."""
    try:
        return import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module, module.split(".")[0])
        raise UserError(f"{what} needs the package {package}: pip install 'ldm[{name}]'") from error
