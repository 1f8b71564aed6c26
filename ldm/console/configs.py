"""Where configs are: the folder `configs` of a clone, or of the installed package."""

import atexit
import os
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

from ldm.errors import UserError, nearest
from ldm.registry import current_arguments, current_path

_PACKAGE = Path(__file__).parent.parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"  # installed, or a clone


def find_configs(arguments: list[str]) -> list[str]:
    """The command line with the files after -c, --config and --config= as paths; a name is a file here or one of the package's."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in ("-c", "--config"):
            found.append(str(find_config(argument)))
        elif argument.startswith("--config="):
            found += ["--config", str(find_config(argument.partition("=")[2]))]
        else:
            found.append(argument)
    return found


def find_config(name: str) -> Path:
    """The file that -c NAME means, or a copy of it in today's names; a UserError where there is none, or none in YAML."""
    path = _path_of(name)
    content = read_yaml(path)
    today = _in_todays_names(content, str(path))
    if today == content:
        return path
    with NamedTemporaryFile("w", suffix=".yaml", delete=False, encoding="utf-8") as file:
        yaml.safe_dump(today, file, sort_keys=False)
    atexit.register(os.unlink, file.name)
    return Path(file.name)


def _path_of(name: str) -> Path:
    path = Path(name) if Path(name).exists() else CONFIGS / name.removeprefix("configs/")
    if not path.is_file():
        known = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
        raise UserError(f"there is no config file {name!r}; the package has {nearest(name, known, 60)}")
    return path


def _in_todays_names(value: Any, file: str) -> Any:
    """The content of a config with the class names of this version; says which are old."""
    if isinstance(value, list):
        return [_in_todays_names(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _in_todays_names(item, file) for key, item in value.items()}
    if isinstance(name := found.get("class_path"), str) and (today := current_path(name)) != name:
        print(f"ldm: {file} has the old name {name}: write {today}", file=sys.stderr)
        found["class_path"] = today
    if isinstance(name, str) and (arguments := found.get("init_args")) and (fitting := current_arguments(name, arguments)) != arguments:
        print(f"ldm: {file} has old arguments of {name}: they are now {', '.join(fitting)}", file=sys.stderr)
        found["init_args"] = fitting
    return found


def read_yaml(path: Path) -> Any:
    """The content of a YAML file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error


def read_config(name: str) -> dict[str, Any]:
    """The options in a config file."""
    path = _path_of(name)
    content = _in_todays_names(read_yaml(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no options: give lines such as `steps: 50`")
    return content
