"""What the commands on Lightning's command line share: how it is parsed, and how it says what is wrong."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Number
from pathlib import Path
from traceback import walk_tb
from typing import Any

from jsonargparse import ArgumentError
from jsonargparse.typing import register_type
from omegaconf.errors import OmegaConfBaseException

from ldm.console.configs import PACKAGE
from ldm.errors import UserError

# of the arguments of torchvision's transforms
register_type(Number, float, float, (ValueError, TypeError), type_check=lambda value, kind: isinstance(value, (int, float)))
PARSER: dict[str, Any] = {"parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False}
# How jsonargparse begins the lines that say where a message comes from, not what is wrong.
FRAMES = ("Given value", "Subtypes:", "Errors:", "Does not validate", "Problem with given class_path", "Expected a <class 'NoneType'>")

# Warnings of libraries about things that are as they should be here.
EXPECTED_WARNINGS = (
    "does not have many workers",
    "Checkpoint directory",
    "smaller than the logging interval",
    "LightningCLI's args parameter",
    "resuming from a checkpoint that ended before the epoch ended",
    "isinstance.treespec, LeafSpec",
    "You have overridden `on_before_batch_transfer`",  # which takes batches of plain loaders, too
    "in eval mode at the start of training",  # the frozen first stage
    "The dirpath has changed from",  # of a run that was copied or moved; best.ckpt keeps its own score
    "It is recommended to use `self.log\\('val/",  # what is logged there is a metric's, which all ranks share
)


def quiet() -> None:
    """Leave out what Lightning says of its other products and of devices that are not there."""
    for warning in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{warning}.*")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)


def of_worker(message: str) -> str:
    """The sentence of an error of a loader's process, which torch puts at the end of that process's traceback."""
    found = re.search(r"^Caught \w+ in DataLoader worker process .*^[\w.]*UserError: (.*)\Z", message, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else message


def sentence(error: Exception) -> str:
    """What is wrong in a message of jsonargparse, which nests it in frames of type names: the setting, and what is wrong with it."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    keys = [match.group(1) for line in lines if (match := re.search(r'Parser key "([^"]+)"', line))]
    said = [re.sub(r'^Parser key "[^"]+": ?', "", line) for line in lines if not line.startswith(FRAMES)]
    text = "; ".join(dict.fromkeys(part for part in said if part and not part.startswith(FRAMES)))
    return f"{'.'.join(dict.fromkeys(keys))}: {text}" if keys else text


def raised_by_a_part(error: BaseException | None) -> Exception | None:
    """The exception of one of our parts that jsonargparse has wrapped while it built them."""
    while error is not None:
        files = [Path(frame.f_code.co_filename) for frame, _ in walk_tb(error.__traceback__)]
        if isinstance(error, Exception) and files and PACKAGE in files[-1].parents:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Mistakes in the command line or in a config as a UserError; a fault of a part stays what it is."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {error}") from error
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        if (own := raised_by_a_part(error)) is not None and own is not error:
            raise own from None
        if "Parser key" in str(error) or "Does not validate" in str(error) or isinstance(error, ArgumentError):
            hint = " (see --help)" if isinstance(error, ArgumentError) else ""
            raise UserError(sentence(error) + hint) from error
        raise
