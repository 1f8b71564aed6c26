"""Where configs are: the folder `configs` of a clone, or of the installed package."""

import atexit
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

from ldm.errors import UserError, nearest
from ldm.files import read_yaml
from ldm.paths import at_home
from ldm.registry import current_arguments, current_path

PACKAGE = Path(__file__).parent.parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"  # installed, or a clone

CPU = "trainer/cpu.yaml"
ROOMS = ("trainer", "data", "autoencoder", "diffusion", "classifier", "losses", "objective", "task", "finetune", "evaluation", "sampling")
# where they come; others are additions, in the order in which they are given
RANKS = {"trainer": 0, "data": 1, "autoencoder": 2, "diffusion": 2, "classifier": 2}
NUM_CLASSES = "--model.conditioner.num_classes"
OLD_OPTIONS = {"--model.drop": "--model.cond_drop_prob"}  # on Lightning's command line


def find_configs(arguments: list[str]) -> list[str]:
    """The command line with the files after -c, --config and --config= as paths, each after those that it builds on.

    A name is a file here or one of the package's.  The package's files come in the order trainer, data, stage, additions, whatever order
    they are given in; a trainer's file builds on trainer/cpu.yaml, which also stands where no file says how a run is kept.  Options are in
    today's names.
    """
    names, rest = list[str](), list[str]()
    for argument in arguments:
        if rest and rest[-1] in ("-c", "--config"):
            rest.pop()
            names.append(argument)
        elif argument.startswith("--config="):
            names.append(argument.partition("=")[2])
        elif rest and rest[-1] in PATHS:
            rest.append(PATHS[rest[-1]](argument))
        elif argument.startswith(tuple(f"{name}=" for name in PATHS)):
            name, _, value = argument.partition("=")
            rest.append(f"{name}={PATHS[name](value)}")
        else:
            rest.append(_todays_option(argument))
    files = [file for name in _ordered(names) for file in find_config(name)]
    return _without_number_of_classes([*(part for file in files for part in ("-c", str(file))), *rest])


def _ordered(names: list[str]) -> list[str]:
    """The package's files in their order, in the places where files of the package stood, after trainer/cpu.yaml where that is needed."""
    rooms = [_room(name) for name in names]
    places = [i for i, room in enumerate(rooms) if room is not None]
    ordered = list(names)
    given = [_path_of(name) for name in names]
    for place, i in zip(places, sorted(places, key=lambda i: (RANKS.get(str(rooms[i]), 3), given[i] != CONFIGS / CPU)), strict=True):
        ordered[place] = names[i]
    if not names or CONFIGS / CPU in given or any(_keeps_runs(path) for path in given):
        return ordered
    print(f"ldm: with {CPU}, on which {'the other files of trainer/ build' if 'trainer' in rooms else 'every run builds'}", file=sys.stderr)
    return [CPU, *ordered]


def _room(name: str) -> str | None:
    """The folder of a file of the package; None: a file of the user."""
    path = _path_of(name)
    return path.parent.name if path.parent.parent == CONFIGS and path.parent.name in ROOMS else None


def _keeps_runs(path: Path) -> bool:
    """Whether a file says itself what is written of a run."""
    trainer = content.get("trainer") if isinstance(content := read_yaml(path), dict) else None
    return isinstance(trainer, dict) and "callbacks" in trainer


def _without_number_of_classes(arguments: list[str]) -> list[str]:
    """Without the option that earlier versions needed where today the conditioner itself follows from the data."""
    at = [i for i, one in enumerate(arguments) if one.startswith(NUM_CLASSES)]
    if not at or any(one.partition("=")[0] == "--model.conditioner" for one in arguments):
        return arguments
    files = [read_yaml(Path(path)) for flag, path in pairwise(arguments) if flag == "-c"]
    if any("conditioner" in (((file or {}).get("model") or {}).get("init_args") or {}) for file in files):
        return arguments
    print(f"ldm: {NUM_CLASSES} follows from the data, as the conditioner does: leave it out", file=sys.stderr)
    return arguments[: at[0]] + arguments[at[0] + 1 + ("=" not in arguments[at[0]]) :]


def _plain_path(path: str) -> str:
    """The same folder in one spelling, as other settings begin with it."""
    return _as_text(str(Path(at_home(path))))


def _as_text(path: str) -> str:
    """A path that YAML reads as the text that it is: ./1e3, ./null, ./#x; UserError where there is no such spelling."""
    if any(part in path for part in (": ", " #", "${")) or path.endswith(":"):
        raise UserError(f"{path!r} has ': ', ' #' or '${{' in it, which settings cannot hold: rename it, or give a link to it")
    try:
        same = yaml.safe_load(path) == path
    except yaml.YAMLError:
        same = False
    return path if (same and path[0] != "~") or not path else f"./{path}"


# options whose values are paths: how they are spelt for YAML
PATHS: dict[str, Callable[[str], str]] = {"--run": _plain_path, "--data.path": lambda path: _as_text(at_home(path))}


def _todays_option(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if name not in OLD_OPTIONS:
        return argument
    print(f"ldm: {name} is the old spelling: write {OLD_OPTIONS[name]}", file=sys.stderr)
    return f"{OLD_OPTIONS[name]}{equals}{value}"


def find_config(name: str) -> list[Path]:
    """The file that -c NAME means, after the ones that its `base` names; copies where they are in names of earlier versions.

    A UserError where there is none, or none in YAML.
    """
    path = _path_of(name)
    content = read_yaml(path)
    today = _in_todays_names(content, str(path))
    if not isinstance(today, dict):
        return [path]
    if "run" in today:
        if not isinstance(today["run"], str):
            raise UserError(f"run is {today['run']!r} in {path}; give the name of a folder, in quotes where it is a number")
        today["run"] = _plain_path(today["run"])
    below = find_config(str(base)) if (base := today.pop("base", None)) is not None else []
    if today == content:
        return [*below, path]
    with NamedTemporaryFile("w", suffix=".yaml", delete=False, encoding="utf-8") as file:
        yaml.safe_dump(today, file, sort_keys=False)
    atexit.register(os.unlink, file.name)
    return [*below, Path(file.name)]


def _path_of(name: str) -> Path:
    path = Path(name) if Path(name).exists() else CONFIGS / name.removeprefix("configs/")
    if not path.is_file():
        known = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*.yaml"))
        raise UserError(f"there is no config file {name!r}; the package has {nearest(name, known, 60)}")
    return path


def _in_todays_names(value: Any, file: str) -> Any:
    """The content of a config with the class names of this version; says which are old."""
    if isinstance(value, list):
        return [_in_todays_names(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _in_todays_names(item, file) for key, item in value.items()}
    if isinstance(value.get("model"), dict) and "drop" in (found["model"].get("init_args") or {}):
        found["model"]["init_args"]["cond_drop_prob"] = found["model"]["init_args"].pop("drop")
        print(f"ldm: {file} has the old name drop: write cond_drop_prob", file=sys.stderr)
    if isinstance(name := found.get("class_path"), str) and (today := current_path(name)) != name:
        print(f"ldm: {file} has the old name {name}: write {today}", file=sys.stderr)
        found["class_path"] = today
    if isinstance(name, str) and (arguments := found.get("init_args")) and (fitting := current_arguments(name, arguments)) != arguments:
        print(f"ldm: {file} has old arguments of {name}: they are now {', '.join(fitting)}", file=sys.stderr)
        found["init_args"] = fitting
    return found


def listed() -> list[tuple[str, str]]:
    """The package's configs with what their first lines say of them."""
    found = []
    for path in sorted(CONFIGS.glob("*/*.yaml"), key=lambda path: (ROOMS.index(path.parent.name), path.name)):
        about = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        said = " ".join(line for line in about if not line.startswith("ldm fit"))
        found.append((path.relative_to(CONFIGS).as_posix(), said.split(".  ")[0].split(". ")[0].rstrip(".")))
    return found


def read_config(name: str) -> dict[str, Any]:
    """The options in a config file."""
    path = _path_of(name)
    content = _in_todays_names(read_yaml(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no options: give lines such as `steps: 50`")
    return content
