"""Classes compared by name: a table with a row per class keeps the rows of those that both vocabularies have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.label import ClassLabel

SHOWN = 6  # names in a sentence


def tables(model: nn.Module) -> dict[str, bool]:
    """Names of a model's parameters with a row per class, and whether a last row stands for no class."""
    found = {f"{name}.embedding.weight": True for name, module in model.named_modules() if isinstance(module, ClassLabel)}
    heads = [(name, module) for name, module in model.named_modules() if hasattr(module, "class_head")]
    return found | {f"{name}.{module.class_head}.{part}": False for name, module in heads for part in ("weight", "bias")}


def by_name(table: Tensor, old: Sequence[str], new: Sequence[str], has_null: bool, fresh: Tensor | None = None) -> Tensor:
    """A table of the classes `new`, of one of the classes `old`; rows of others are `fresh`, None: the row of no class.

    table: (len(old), ...), with has_null one row more, which stays the last one.
    """
    rows, known = [], {name: row for row, name in enumerate(old)}
    other = fresh if fresh is not None else table[-1] if has_null else torch.zeros_like(table[0])
    for name in new:
        rows.append(table[known[name]] if name in known else other)
    return torch.stack([*rows, *table[-1:]] if has_null else rows)


def follow(checkpoint: Any, names: Mapping[str, bool], old: Sequence[str], new: Sequence[str]) -> None:
    """Change a checkpoint's tables, wherever in it they are, from the classes `old` to the classes `new`."""
    for key, value in list(checkpoint.items() if isinstance(checkpoint, dict) else enumerate(checkpoint)):
        name = str(key).removeprefix("model.")
        if isinstance(value, Tensor) and name in names:
            checkpoint[key] = by_name(value, old, new, names[name])
        elif isinstance(value, (dict, list)):
            follow(value, names, old, new)


def follow_moments(state: Mapping[int, dict[str, Any]], places: Mapping[int, bool], old: Sequence[str], new: Sequence[str]) -> None:
    """The same for an optimizer's running means; those of new classes are zeros.  places: of the tables among its parameters."""
    for place, has_null in places.items():
        for key, value in state.get(place, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                state[place][key] = by_name(value, old, new, has_null, torch.zeros_like(value[0]))


def sentence(old: Sequence[str], new: Sequence[str], has_null: bool) -> str:
    """Which classes are taken over, which begin anew, and which have no use."""
    taken, fresh, unused = [n for n in new if n in old], [n for n in new if n not in old], [n for n in old if n not in new]
    start = 'starting as "no class"' if has_null else "starting as zeros"
    return f"classes: {_some(taken)} taken over by name; {_some(fresh)} new, {start}; {_some(unused)} not used"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{more})" if names else "0"
