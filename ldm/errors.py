"""What goes wrong, told apart: the user's mistakes, which are one sentence, and ours, which are not."""

import re
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


# What libraries say, by a part of it or of the exception's name, and what that means here
LIBRARIES = (
    (
        r"OutOfMemoryError|CUDA out of memory",
        "the GPU's memory is used up: take a smaller --data.batch_size (of `ldm sample`: --chunk-size), --model.network.recompute true, or "
        "a smaller network",
    ),
    (
        r"MemoryError|can't allocate memory|not enough memory|Cannot allocate memory",
        "the machine's memory is used up: take a smaller --data.batch_size, fewer --data.num_workers, or --data.cache_on disk",
    ),
    (
        r"insufficient shared memory|unable to (open|write to) shared memory",
        "shared memory is used up: docker run --shm-size 8g, or --ipc=host",
    ),
    (
        r"DataLoader worker .*(exited unexpectedly|killed by signal)",
        "a process that reads the data was ended from outside, mostly because memory ran out: take fewer --data.num_workers",
    ),
    (r"Too many open files", "too many files are open: raise the limit (ulimit -n 65536), or take fewer --data.num_workers"),
    (
        r"(gloo|NCCL|nccl|DistBackendError|TCPStore).*(peer|closed|reset|abort|timeout|Timeout|timed out|refused|remote)",
        "the connection to another process of this run broke: it has ended, and said why; the last checkpoint is good for --ckpt_path last",
    ),
    (
        r"Could not determine home directory",
        "a path that begins with ~NAME means the home folder of a user NAME, whom this machine does not know: write ./~NAME for a folder",
    ),
    (
        r"Early stopping conditioned on metric",
        "EarlyStopping has a monitor that no validation measures: val/loss, val/psnr and others of logs/metrics.csv are",
    ),
    (r"no kernel image is available|CUDA driver version is insufficient", "this build of torch does not fit this GPU or its driver"),
)


def of_library(error: BaseException) -> str | None:
    """What an exception of a library means, in a sentence; None: nothing that is known."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    found = next((meaning for part, meaning in LIBRARIES if re.search(part, said)), None)
    return found and f"{found} ({said[:160]})"


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
