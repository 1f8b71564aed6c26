"""What classes take, read from their sources without importing them: a command line is checked before torch is loaded."""

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.console.configs import PACKAGE
from ldm.errors import nearest
from ldm.registry import LIGHT

WORDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "None": "null", "list": "a list"}
EMPTY = {"ABC", "Protocol", "Generic", "Module", "LightningModule", "LightningDataModule", "Callback", "Enum"}  # bases that take nothing
LISTS = ("list", "List", "Sequence", "tuple", "Iterable")
ROOMS = (
    "interfaces",
    "stages",
    "data",
    "callbacks",
    *LIGHT,
)  # with parts that a config may name; of two classes of one name the first counts


@dataclass(frozen=True)
class Argument:
    """An argument of a class: its declared type as an expression, and the text of its default (None: it has to be given)."""

    name: str
    type: ast.expr | None
    default: str | None


@dataclass
class Class:
    """A class of the sources: what its own __init__ takes; passes_on: its **options go to the class that it builds on."""

    name: str
    bases: tuple[str, ...]
    own: dict[str, Argument] = field(default_factory=dict)
    abstract: set[str] = field(default_factory=set)  # methods
    concrete: set[str] = field(default_factory=set)
    has_init: bool = False
    passes_on: bool = False


class Sources:
    """All classes of the package and of Lightning's Trainer by their short names, and names of types such as Crop."""

    def __init__(self) -> None:
        self.classes, self.types = dict[str, Class](), dict[str, ast.expr]()
        self._parts = dict[str, list[str]]()
        self.outside = dict[str, list[str]]()  # Lightning's own callbacks and loggers
        for room in ROOMS:
            for path in [*sorted((PACKAGE / room).glob("*.py")), *PACKAGE.glob(f"{room}.py")]:
                self._read(path)
        lightning = find_spec("lightning")
        if lightning is not None and lightning.submodule_search_locations:  # a namespace of one folder
            folder = Path(lightning.submodule_search_locations[0]) / "pytorch"
            self._read(folder / "trainer" / "trainer.py")
            self.outside = {name: _exported(folder / f"{name}s" / "__init__.py") for name in ("callback", "logger")}

    def _read(self, path: Path) -> None:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                self.classes.setdefault(node.name, _class(node))
            elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp)):
                self.types.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})

    def bases(self, name: str) -> Iterator[Class]:
        """The class and those that it builds on, nearest first."""
        if (found := self.classes.get(name)) is not None:
            yield found
            for base in found.bases:
                yield from self.bases(base)

    def arguments(self, name: str) -> tuple[dict[str, Argument], bool]:
        """What a class takes by name, and whether that is all of it."""
        found, complete = dict[str, Argument](), False
        for one in self.bases(name):
            found = {**one.own, **found}
            if one.has_init and not one.passes_on:
                complete = True
                break
        return found, complete or self._outside(name) <= EMPTY

    def _outside(self, name: str) -> set[str]:
        """What a class builds on that is not in the sources."""
        return {base for one in self.bases(name) for base in one.bases if base not in self.classes}

    def parts(self, base: str) -> list[str]:
        """The classes that can stand where a `base` is wanted."""
        if base not in self._parts:
            self._parts[base] = self._found_parts(base)
        return self._parts[base]

    def _found_parts(self, base: str) -> list[str]:
        below = (name for name in self.classes if any(base in (one.name, *one.bases) for one in self.bases(name)))
        outside = [base] if any(base in names for names in self.outside.values()) else []
        return sorted([*(name for name in below if not self._is_abstract(name) and name[0] != "_"), *outside])

    def _is_abstract(self, name: str) -> bool:
        done = set[str]()
        for one in self.bases(name):
            if one.abstract - done and self._outside(name) <= EMPTY:
                return True
            done |= one.concrete
        is_base = not self.classes[name].has_init and any(name in one.bases for one in self.classes.values())
        return "Protocol" in self.classes[name].bases or is_base

    # --- declared types

    def _alternatives(self, hint: ast.expr | None) -> Iterator[ast.expr]:
        """The types of a union, names of types resolved."""
        if isinstance(hint, ast.BinOp):
            yield from self._alternatives(hint.left)
            yield from self._alternatives(hint.right)
        elif isinstance(hint, ast.Name) and hint.id in self.types and hint.id not in self.classes:
            yield from self._alternatives(self.types[hint.id])
        elif isinstance(hint, ast.Subscript) and _head(hint) in ("Optional", "Union"):
            inner = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
            for one in inner:
                yield from self._alternatives(one)
            if _head(hint) == "Optional":
                yield ast.Constant(None)
        elif isinstance(hint, ast.Constant) and isinstance(hint.value, str):
            yield from self._alternatives(ast.parse(hint.value, mode="eval").body)
        elif hint is not None:
            yield hint

    def bases_in(self, hint: ast.expr | None) -> list[str]:
        """The classes of ours among a type's alternatives, in a list or a Factory as well."""
        found = []
        for one in self._alternatives(hint):
            if isinstance(one, ast.Subscript) and _head(one) in ("Factory", *LISTS):
                found += self.bases_in(one.slice if not isinstance(one.slice, ast.Tuple) else one.slice.elts[0])
            elif isinstance(one, (ast.Name, ast.Attribute)) and _head(one) in self.classes:
                found.append(_head(one))
        return list(dict.fromkeys(found))

    def fits(self, value: Any, hint: ast.expr | None, plain: bool = False) -> bool:
        """plain: as itself, not as the name of a class."""
        return hint is None or any(self._is(value, one, plain) for one in self._alternatives(hint))

    def _is(self, value: Any, hint: ast.expr, plain: bool) -> bool:
        head = _head(hint)
        if isinstance(hint, ast.Constant):
            return value is None
        if head == "Literal":
            return value in [one.value for one in _items(hint) if isinstance(one, ast.Constant)]
        if head in ("int", "float", "bool", "str"):
            return _is_plain(value, head)
        if head in LISTS:
            inner = [one for one in _items(hint) if not isinstance(one, ast.Constant)]
            return isinstance(value, (list, tuple)) and all(self.fits(one, inner[0] if inner else None) for one in value)
        if head in self.classes or head in ("Factory", "dict", "Mapping"):
            return isinstance(value, Mapping) or (not plain and isinstance(value, str) and head not in ("dict", "Mapping"))
        return not plain

    def described(self, hint: ast.expr | None, value: Any = "") -> str:
        """A declared type in words, what is like the value first."""
        found = []
        for one in self._alternatives(hint):
            head = _head(one)
            if head == "Literal":
                found.append(nearest(str(value), [str(each.value) for each in _items(one) if isinstance(each, ast.Constant)]))
            elif head in LISTS and not self.bases_in(one):
                inner = _items(one)
                found.append(f"a list of {self.described(inner[0], value).removeprefix('a ')}s" if inner else "a list")
            elif bases := self.bases_in(one):
                found += [name for base in bases for name in self.parts(base)]
            else:
                found.append(WORDS.get(head or "None", "null" if isinstance(one, ast.Constant) else head))
        return " or ".join(dict.fromkeys(found))


@cache
def sources() -> Sources:
    return Sources()


def _exported(path: Path) -> list[str]:
    """The names in __all__."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List) and getattr(node.targets[0], "id", "") == "__all__":
            return [one.value for one in node.value.elts if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return []


def _class(node: ast.ClassDef) -> Class:
    found = Class(node.name, tuple(name for name in map(_head, node.bases) if name != node.name))
    if any(_head(one.func if isinstance(one, ast.Call) else one) == "dataclass" for one in node.decorator_list):
        found.has_init = found.passes_on = True
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found.own[line.target.id] = Argument(line.target.id, line.annotation, ast.unparse(line.value) if line.value else None)
    for method in node.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        is_abstract = any(_head(one) == "abstractmethod" for one in method.decorator_list)
        (found.abstract if is_abstract else found.concrete).add(method.name)
        if method.name == "__init__":
            found.has_init, found.passes_on = True, method.args.kwarg is not None
            found.own = _arguments(method.args)
    return found


def _arguments(args: ast.arguments) -> dict[str, Argument]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return {
        one.arg: Argument(one.arg, one.annotation, None if default is None else ast.unparse(default))
        for one, default in pairs
        if one.arg != "self"
    }


def as_number(value: Any) -> float | None:
    """A number, or text of one, such as 1e-3, which YAML takes for text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    words = isinstance(value, str) and math.isinf(number)  # infinity is .inf in YAML
    return None if words or math.isnan(number) else number


def _is_plain(value: Any, kind: str) -> bool:
    if kind == "str":
        return value is not None and not isinstance(value, (list, Mapping))
    if kind == "bool":
        return isinstance(value, bool)
    number = as_number(value)
    if number is None or (kind == "int" and isinstance(value, float)):
        return False
    return kind == "float" or not isinstance(value, str) or value.lstrip("+-").isdecimal()


def _head(hint: ast.expr) -> str:
    """The name of a type, without what is in its brackets."""
    hint = hint.value if isinstance(hint, ast.Subscript) else hint
    return hint.attr if isinstance(hint, ast.Attribute) else hint.id if isinstance(hint, ast.Name) else ""


def _items(hint: ast.expr) -> list[ast.expr]:
    if not isinstance(hint, ast.Subscript):
        return []
    return list(hint.slice.elts) if isinstance(hint.slice, ast.Tuple) else [hint.slice]
