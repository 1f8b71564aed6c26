"""Every part by its short name, found by walking the rooms: there is no list to keep up."""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ldm.errors import UserError, nearest

# Rooms whose modules hold parts that a config or an option may name.  Those of the second line import Lightning.
LIGHT = ("autoencoder", "conditioning", "degradations", "diffusion", "metrics", "nn", "sampling")
ROOMS = (*LIGHT, "data", "stages", "callbacks")

# Class paths of earlier versions, which model folders, pictures and configs of users still name.
MOVED_MODULES = {
    "ldm.stages.model": "ldm.latents.model",
    "ldm.stages.clips": "ldm.latents.clips",
    "ldm.diffusion.tasks": "ldm.sampling.tasks",
    "ldm.conditioning.together": "ldm.conditioning.composite",
}
MOVED = {"ldm.callbacks.show.wandb_logger": "ldm.callbacks.loggers.WandbLog"}
RENAMED = {"Together": "CompositeConditioner", "Smaller": "Downscale", "Blurred": "GaussianBlur", "Grey": "Grayscale"}

# Arguments of earlier versions, by class: their name today; None: they have no meaning any more.
RENAMED_ARGUMENTS: dict[str, dict[str, str | None]] = {"BSR": {"shrinks": "downscale"}, "Restore": {"scale": None}}

Part = TypeVar("Part")


def current_path(class_path: str) -> str:
    """The class path of today for one of an earlier version."""
    if class_path in MOVED:
        return MOVED[class_path]
    module, _, name = class_path.rpartition(".")
    moved = MOVED_MODULES.get(module, module)
    return f"{moved}.{RENAMED.get(name, name) if moved.startswith('ldm') or not moved else name}".lstrip(".")


def current_arguments(class_path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class in today's names."""
    today = RENAMED_ARGUMENTS.get(class_path.rpartition(".")[2], {})
    return {str(key): value for name, value in arguments.items() if (key := today.get(name, name)) is not None}


def load(rooms: Iterable[str] = ROOMS) -> None:
    """Import all modules of these rooms, which makes their classes known by their short names."""
    for room in rooms:
        module = importlib.import_module(f"ldm.{room}")
        for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}."):
            importlib.import_module(info.name)


def parts(base: type[Part], rooms: Iterable[str] = LIGHT) -> dict[str, type[Part]]:
    """Concrete subclasses of `base`, itself included, by their short names."""
    load(rooms)
    found = {
        cls.__name__: cls
        for cls in (base, *_below(base))
        if not inspect.isabstract(cls) and cls.__module__.startswith("ldm.") and cls.__name__[0] != "_"
    }
    return dict(sorted(found.items()))


def find(base: type[Part], name: str, what: str, rooms: Iterable[str] = LIGHT) -> type[Part]:
    """The part of this short name; what: the option that it was given to, for the UserError where there is none."""
    known = parts(base, rooms)
    by_lower = {key.lower(): cls for key, cls in known.items()}
    wanted = RENAMED.get(name.rpartition(".")[2], name.rpartition(".")[2])
    if wanted.lower() not in by_lower:
        raise UserError(f"{what} is {name!r}; allowed are {nearest(name, known, 40)}")
    return by_lower[wanted.lower()]


def resolve(
    spec: Mapping[str, Any], base: Any, what: str, rooms: Iterable[str] = LIGHT, bounds: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, Any]:
    """A part's {class_path, init_args} with full class paths, for model_folder.build; short names of classes are understood.

    A UserError where it describes no `base`, or has arguments of other types than the class declares.  what: the option or place of it.
    bounds: least and greatest value of arguments by name.
    """
    arguments = spec.get("init_args") or {}
    cls = find(base, current_path(str(spec.get("class_path", ""))), what, rooms)
    hints = {name: hint for name, hint in get_type_hints(cls.__init__).items() if name != "return"}  # type: ignore[misc]
    if not isinstance(arguments, Mapping):
        raise UserError(f"{what} has the arguments {arguments!r}; give them by name: {', '.join(hints)}")
    arguments = current_arguments(cls.__name__, arguments)
    resolved = dict(arguments)
    for name, value in arguments.items():
        low, high = (bounds or {}).get(name, (-math.inf, math.inf))
        if name not in hints:
            raise UserError(f"{what}.{name} is unknown: {cls.__name__} takes {nearest(str(name), hints) or 'nothing'}")
        if isinstance(value, Mapping) and "class_path" in value:
            resolved[name] = resolve(value, _class_in(hints[name]), f"{what}.{name}", rooms, bounds)
        elif not fits(value, hints[name]):
            raise UserError(f"{what}.{name} is {value!r}; {cls.__name__} takes {_described(hints[name])}")
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise UserError(f"{what}.{name} is {value!r}; allowed is {low:g} to {high:g}")
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": resolved}


def fits(value: Any, hint: Any) -> bool:
    """True where plain data are of a declared type: numbers, text, None, choices, lists of these."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(value, (list, tuple)):
        return inspect.isclass(origin) and issubclass(list, origin) | (origin is tuple) and all(fits(v, arguments[0]) for v in value)
    if value is None or isinstance(value, (bool, str)):
        return hint is type(value)
    if isinstance(value, int):
        return hint in (int, float)
    return isinstance(value, float) and hint is float and not math.isnan(value)


def _class_in(hint: Any) -> Any:
    """The class of a part in a declared type such as `Guidance | None`."""
    return next(
        (one for one in (hint, *get_args(hint)) if inspect.isclass(one) and one not in (type(None), int, float, str, bool)), type(None)
    )


def _described(hint: Any) -> str:
    """A declared type in words."""
    words = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", type(None): "null"}
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    several = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join(words.get(one, getattr(one, "__name__", str(one))) for one in several)


def _below(cls: type) -> Iterator[type]:
    below: type
    for below in cls.__subclasses__():
        yield below
        yield from _below(below)
