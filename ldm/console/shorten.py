"""LDM_SHORTEN=2: every command does at most so many steps and pictures, on a CPU, with a few images.  For tests of documented commands.

It only shortens: everything else is what was asked for.
"""

import os
from typing import Any

IMAGES = 16  # of each split, and of a set that is measured


def limit() -> int | None:
    """How many steps and pictures at most; None: as many as were asked for."""
    text = os.environ.get("LDM_SHORTEN", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


def at_most(value: Any) -> Any:
    """A number of steps, pictures or images, shortened; lists of steps keep their first and last ones."""
    short = limit()
    if short is None or value is None:
        return value
    if isinstance(value, list):
        return value if len(value) <= short else [*value[: short - 1], value[-1]]
    return min(value, short)


def training_options() -> list[str]:
    """Options of `fit` and its like that come after all others."""
    short = limit()
    if short is None:
        return []
    steps = [f"--trainer.max_steps={short}", f"--trainer.val_check_interval={short}", "--trainer.limit_val_batches=1"]
    return [
        *steps,
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.num_nodes=1",
        "--trainer.precision=32-true",
        "--data.batch_size=2",
    ]
