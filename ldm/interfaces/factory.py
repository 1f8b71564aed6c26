"""Parts that are built once the numbers are known which follow from other parts and from the data."""

import inspect
from functools import partial
from typing import Any, Protocol, TypeVar

from ldm.errors import UserError

Part = TypeVar("Part")
Part_co = TypeVar("Part_co", covariant=True)


class Factory(Protocol[Part_co]):
    """A class, or functools.partial of one, whose instance is made later.  A protocol with a plain __call__: jsonargparse makes
    partials for it of what a config says."""

    def __call__(self) -> Part_co: ...


def built(part: Factory[Part] | Part, **known: Any) -> Part:
    """A part itself, or what its factory makes with those of the arguments `known` that it takes and was not given.

    The same arguments reach the factories among a factory's own arguments.
    """
    if isinstance(part, type):
        part = partial(part)
    if not isinstance(part, partial):
        return part  # type: ignore[return-value]
    takes = inspect.signature(_class_of(part).__init__).parameters  # type: ignore[misc]
    given = {name: _inside(value, known) for name, value in part.keywords.items() if value is not None or name not in known}
    return part.func(*part.args, **{**{name: value for name, value in known.items() if name in takes}, **given})  # type: ignore[no-any-return]


def _inside(value: Any, known: dict[str, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_inside(one, known) for one in value]
    return built(value, **known) if isinstance(value, (partial, type)) else value


def _class_of(part: "partial[Any]") -> type:
    """The class of what a factory makes (jsonargparse's partials call a function with the class)."""
    return next(one for one in (part.func, *reversed(part.args)) if isinstance(one, type))


def argument(part: Any, name: str, default: Any = None) -> Any:
    """What a factory was given, or what a part has, under a name."""
    found = part.keywords.get(name) if isinstance(part, partial) else getattr(part, name, None)
    return default if found is None else found


def required(value: Part | None, name: str) -> Part:
    """The value of an argument that only a factory may leave open."""
    if value is None:
        raise UserError(f"{name} is missing: nothing here says what it is, so give it")
    return value
