"""What every command's parser shares: where configs are, how it reads them, how it says what is wrong."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from omegaconf.errors import OmegaConfBaseException

_PACKAGE = Path(__file__).parent.parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"  # installed, or a clone
PARSER: dict[str, Any] = {"parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False}
FRAMES = ("Given value", "Subtypes:", "Errors:", "Does not validate", "Problem with given class_path", "Expected a <class 'NoneType'>")


# Warnings of libraries about things that are as they should be here.
NOISE = (
    "does not have many workers",
    "Checkpoint directory",
    "smaller than the logging interval",
    "LightningCLI's args parameter",
    "resuming from a checkpoint that ended before the epoch ended",
    "isinstance.treespec, LeafSpec",
    "in eval mode at the start of training",  # the frozen first stage
)


def quiet() -> None:
    """Leaves out what Lightning says of its other products and of devices that are not there."""
    for noise in NOISE:
        warnings.filterwarnings("ignore", f".*{noise}.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def find_configs(arguments: list[str]) -> list[str]:
    """-c data/digits.yaml: a file here, or one of those that come with the package."""
    found: list[str] = []
    for argument in arguments:
        found.append(_config(argument) if found and found[-1] in ("-c", "--config") else argument)
    return found


def _config(name: str) -> str:
    path = Path(name) if Path(name).exists() else CONFIGS / name.removeprefix("configs/")
    if not path.is_file():
        known = ", ".join(sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml")))
        raise ValueError(f"there is no config file {name!r}; the package has {known}")
    try:
        yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return str(path)


def sentence(error: Exception) -> str:
    """jsonargparse nests its messages in frames of type names; what is left is the setting and what is wrong with it."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    keys = [match.group(1) for line in lines if (match := re.search(r'Parser key "([^"]+)"', line))]
    said = [re.sub(r'^Parser key "[^"]+": ?', "", line) for line in lines if not line.startswith(FRAMES)]
    text = "; ".join(dict.fromkeys(part for part in said if part and not part.startswith(FRAMES)))
    return f"{'.'.join(dict.fromkeys(keys))}: {text}" if keys else text


@contextmanager
def plain_errors() -> Iterator[None]:
    """Mistakes in the command line or in a config as one sentence."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ValueError(f"the configuration cannot be resolved: {error}") from error
    except (ArgumentError, TypeError, ValueError) as error:
        if "Parser key" in str(error) or "Does not validate" in str(error) or isinstance(error, ArgumentError):
            hint = " (see --help)" if isinstance(error, ArgumentError) else ""
            raise ValueError(sentence(error) + hint) from error
        raise
