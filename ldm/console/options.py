"""A command's options as one table: parsing, help, configs, old spellings, and the nearest name for a wrong one."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml

from ldm import model_folder, registry
from ldm.console.configs import read_config
from ldm.errors import UserError, nearest
from ldm.paths import at_home

WIDTH = 118  # columns of a help page


@dataclass(frozen=True)
class Option:
    """One option of a command; without help it is one that earlier versions had.

    name: `--size`, or `model` for an argument without a name.  type: text -> value, a UserError where it is none; `switch`: it takes no
    value.  base: the kind of part that it names, whose arguments are given as `--sampler.eta 1`.
    """

    name: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    metavar: str | None = None
    group: str = "options"
    base: Any = None
    rooms: tuple[str, ...] = ("diffusion", "sampling")
    required: bool = False

    @property
    def key(self) -> str:
        """Its name as a Python argument."""
        return self.name.lstrip("-").replace("-", "_")


def switch(text: str) -> bool:
    """The type of an option without a value; `true` and `false`, which it took in earlier versions, are understood."""
    return text.lower() in ("true", "yes", "1")


def whole(least: int = 0, what: str = "a whole number") -> Callable[[str], int]:
    """The type of a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise UserError(f"{text!r}; give {what}") from error
        if value < least:
            raise UserError(f"{value}; allowed is {least} or more")
        return value

    return parse


def number(text: str) -> float:
    """The type of any number."""
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{text!r}; give a number") from error


def path(text: str) -> str:
    """The type of a file or folder; an empty one is mostly a shell variable that was not set."""
    if not text.strip():
        raise UserError("empty: was a shell variable not set?")
    return at_home(text)


def one_of(*allowed: str) -> Callable[[str], str]:
    """The type of a choice."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise UserError(f"{text!r}; allowed are {nearest(text, allowed)}")
        return text

    return parse


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, or one number for a square -> (height, width) in px; [HEIGHT, WIDTH] is the spelling of earlier versions."""
    if text.startswith("["):
        warn(f"--size {text} is the old spelling, height first: write WIDTHxHEIGHT")
        parts = text.strip("[]").split(",")[::-1]
    else:
        parts = text.lower().replace("×", "x").split("x")
    sides = [int(part) for part in parts if part.strip().isdecimal()]
    if len(sides) != len(parts) or len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"{text!r}; give WIDTHxHEIGHT in px, such as 128x64")
    return sides[-1], sides[0]


def square(text: str) -> int:
    """The side of a square in px, as one number or WIDTHxHEIGHT."""
    height, width = size(text)
    if height != width:
        raise UserError(f"{text!r}; both sets are compared as squares: give one number, such as {min(height, width)}")
    return height


def numbers(text: str) -> list[float]:
    """A list of numbers, with or without brackets."""
    return [number(part) for part in text.strip("[]() ").split(",")]


def words(text: str) -> list[str]:
    """Names separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def steps(text: str) -> int | list[float]:
    """How many steps, or which."""
    listed = numbers(text) if "," in text or text.startswith("[") else None
    return listed or whole(-(2**31), "a whole number, or a list of steps such as 999,500,100")(text)


def sides(text: str) -> list[int]:
    """px on the left, right, top and bottom."""
    found = [int(each) for each in numbers(text)]
    if len(found) != 4 or min(found) < 0:
        raise UserError(f"{found}; give 4 numbers of 0 or more: px on the left, right, top and bottom")
    return found


def number_or_name(text: str) -> float | str:
    """A number, or the name of a part."""
    try:
        return float(text)
    except ValueError:
        return text


def prompts(text: str) -> list[str]:
    """One prompt; [one, other] is the spelling of earlier versions for several."""
    return words(text[1:-1]) if text.startswith("[") and text.endswith("]") else [text]


def named_numbers(text: str) -> dict[str, float]:
    """'age=30, dose=1.5' by name."""
    found = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not name or not value:
            raise UserError(f"{part!r}; give NAME=NUMBER, separated by commas")
        found[name] = number(value)
    return found


def device(text: str) -> str:
    """auto, cpu, cuda (also cuda:1) or mps; `gpu` is the word of earlier versions."""
    if text == "gpu":
        warn("--device gpu is the old spelling: write --device cuda")
        return "cuda"
    if text.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"{text!r}; allowed are auto, cpu, cuda, mps")
    return text


DEVICE = Option("--device", "auto (a GPU if there is one), cpu, cuda, mps", device, "auto", group="machine")


def warn(sentence: str) -> None:
    """One line on stderr."""
    print(f"ldm: {sentence}", file=sys.stderr)


def parse(
    command: str, description: str, options: Sequence[Option], arguments: Sequence[str], old: Mapping[str, str] | None = None,
    example: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Values by the options' keys.  Files after -c come first, the command line wins; parts are built.

    old: spellings of earlier versions and today's, which still work with a warning, as `_` in the place of `-` does.
    """
    spellings = {name: next(option for option in options if option.name == today) for name, today in (old or {}).items()}
    plain, nested = _untangled(list(arguments), options, spellings)
    parser = _parser(command, description, options, example)
    found, unknown = parser.parse_known_args(plain)
    if unknown:
        _refuse(unknown[0], options)
    given = {key.removesuffix(" by name"): value for key, value in vars(found).items() if value is not None}
    values = {option.key: option.default for option in options}
    for file in given.pop("config", []):
        values |= _from_config(file, options, spellings)
    for option in options:
        if option.key in given:
            values[option.key] = _typed(option, given[option.key])
        if option.base is not None and (fields := nested.get(option.key)):
            values[option.key] = _with_fields(option, values[option.key], fields)
    built = {option.key: _built(option, values[option.key]) for option in options}
    for option in options:
        if built[option.key] is None and (option.required or not option.name.startswith("-")):
            raise UserError(f"{option.name} is missing: {option.help} (ldm {command} --help)")
    return built


def _typed(option: Option, text: Any) -> Any:
    """The value of an option's text."""
    if isinstance(text, bool):
        return text
    try:
        return option.type(text)
    except UserError as error:
        raise UserError(f"{option.name} is {error}") from error


def _from_config(file: str, options: Sequence[Option], old: Mapping[str, Option]) -> dict[str, Any]:
    """Values of a YAML file, whose keys are names of options."""
    by_key = {option.key: option for option in options} | {name.lstrip("-").replace("-", "_"): option for name, option in old.items()}
    values = {}
    for name, value in read_config(file).items():
        if str(name).replace("-", "_") not in by_key:
            raise UserError(f"{file} has {name!r}, which is no option here: allowed are {nearest(str(name), by_key)}")
        option = by_key[str(name).replace("-", "_")]
        plain = isinstance(value, (Mapping, bool)) or value is None
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        values[option.key] = value if plain else _typed(option, text)
    return values


def _with_fields(option: Option, value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A part's description with the arguments that were given as --NAME.ARGUMENT."""
    if value is None or isinstance(value, (int, float)):
        raise UserError(f"{option.name}.{next(iter(fields))} was given without {option.name} NAME: name the class")
    spec = dict(value) if isinstance(value, Mapping) else {"class_path": value}
    spec["init_args"] = {**spec.get("init_args", {}), **fields}
    return spec


def _built(option: Option, value: Any) -> Any:
    """The part that an option names, or its plain value."""
    if option.base is None or value is None or isinstance(value, (int, float)):
        return value
    spec = value if isinstance(value, Mapping) else {"class_path": value}
    return model_folder.build(registry.resolve(spec, option.base, option.name, (*option.rooms, "degradations")))


def _untangled(arguments: list[str], options: Sequence[Option], old: Mapping[str, Option]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The command line in today's spelling, with a warning for each old one, and arguments of parts by option."""
    by_name = {option.name: option for option in options}
    plain, nested, i = list[str](), dict[str, dict[str, Any]](), 0
    while i < len(arguments):
        name, sign, value = arguments[i].partition("=")
        i += 1
        base, _, field = name.lstrip("-").partition(".")
        if name.startswith("--") and field and name not in old and f"--{base}" in by_name and by_name[f"--{base}"].base:
            if not sign:
                value, i = (arguments[i] if i < len(arguments) else ""), i + 1
            _nest(nested.setdefault(base.replace("-", "_"), {}), field.split("."), yaml.safe_load(value))
            continue
        today = name if name in by_name else f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name
        if name in old:
            today = old[name].name
        option = by_name.get(today.replace("--no-", "--", 1)) if today not in by_name else by_name[today]
        if option is not None and today != name:
            warn(f"{name} is the old spelling: write {today}")
        if option is not None and option.type is switch and today == option.name:
            if not sign and i < len(arguments) and arguments[i].lower() in ("true", "false"):
                value, sign, i = arguments[i], "=", i + 1
            if sign:
                today, sign = (today if switch(value) else f"--no-{today[2:]}"), ""
                warn(f"{name} {value} is the old spelling: write {today}")
        plain.append(f"{today}={value}" if sign else today)
    return plain, nested


def _nest(target: dict[str, Any], path: list[str], value: Any) -> None:
    """Set --guidance.low (path ["low"]) or --sampler.sampler.eta (["sampler", "eta"]) in a part's arguments."""
    for name in path[:-1]:
        if name != "init_args":
            inner = target.setdefault(name, {})
            if not isinstance(inner, dict):
                inner = target[name] = {"class_path": inner}
            target = inner.setdefault("init_args", {})
    target[path[-1]] = value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.replace('argument ', '', 1)} ({self.prog} --help)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """An option and its help in one line where they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(
                option for option in action.option_strings if not option.startswith("--no-")
            ) or super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, '')}".rstrip()


def _parser(command: str, description: str, options: Sequence[Option], example: str) -> argparse.ArgumentParser:
    positional = " ".join(option.metavar or option.key.upper() for option in options if not option.name.startswith("-"))
    parser = _Parser(
        prog=f"ldm {command}", usage=" ".join(filter(None, ("ldm", command, positional, "[options]"))), description=description,
        epilog=textwrap.dedent(example), formatter_class=_Help, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for option in options:
        group = groups.get(option.group) or groups.setdefault(option.group, parser.add_argument_group(option.group))
        if option.type is switch:
            group.add_argument(option.name, help=option.help, default=None, action=argparse.BooleanOptionalAction)
        elif option.name.startswith("-"):
            metavar = option.metavar or option.key.upper().split("_")[-1]
            group.add_argument(option.name, help=option.help or argparse.SUPPRESS, metavar=metavar)
        else:
            group.add_argument(option.key, nargs="?", help=option.help, metavar=option.metavar or option.key.upper())
            parser.add_argument(f"--{option.key}", dest=f"{option.key} by name", help=argparse.SUPPRESS)
    last = groups[options[-1].group]
    last.add_argument(
        "-c", "--config", action="append", metavar="FILE", help="YAML file with options, here or in the package; can be repeated"
    )
    last.add_argument("-h", "--help", action="help", help="this page")
    return parser


def _refuse(argument: str, options: Sequence[Option]) -> NoReturn:
    name = argument.split("=")[0]
    if not name.startswith("-"):
        raise UserError(f"{argument!r} belongs to no option: put values right behind their option, and text with spaces in quotes")
    close = get_close_matches(name, [option.name for option in options if option.name.startswith("-")], n=3, cutoff=0.5)
    raise UserError(f"there is no option {name}" + (f": did you mean {' or '.join(close)}?" if close else " (see --help)"))
