"""Where configs are: the folder `configs` of a clone, or of the installed package."""

from pathlib import Path
from typing import Any

import yaml

from ldm.errors import UserError, nearest

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
    """The file that -c NAME means; a UserError where there is none, or none in YAML."""
    path = Path(name) if Path(name).exists() else CONFIGS / name.removeprefix("configs/")
    if not path.is_file():
        known = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
        raise UserError(f"there is no config file {name!r}; the package has {nearest(name, known, 60)}")
    read_yaml(path)
    return path


def read_yaml(path: Path) -> Any:
    """The content of a YAML file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error


def read_config(name: str) -> dict[str, Any]:
    """The options in a config file."""
    content = read_yaml(find_config(name))
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no options: give lines such as `steps: 50`")
    return content
