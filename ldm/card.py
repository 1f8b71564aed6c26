"""The card of a model: facts beside its weights, which come from anywhere and are checked once, where they are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.ranges import ValueRange

MAX_SIDE, MAX_STEPS, MAX_TRAINED = 65536, 100_000, 10**12  # more than anybody needs, and still an end


def checked(card: Any, where: Path) -> dict[str, Any]:
    """The card, whose fields have the types and ranges that ldm relies on; fields that it does not know stay as they are.

    UserError names the file, the field and what is allowed.
    """
    if not isinstance(card, Mapping) or not all(isinstance(name, str) for name in card):
        raise UserError(f"the card in {where} is {_shown(card)}; it must be facts by name")
    for name, (fits, allowed) in FIELDS.items():
        if name in card and not fits(card[name]):
            raise UserError(f"the card in {where} has {name} {_shown(card[name])}; allowed is {allowed}")
    ValueRange.of(card)
    if card.get("stage") == "DiffusionStage" and (missing := [name for name in ("classes", "size") if name not in card]):
        raise UserError(f"the card in {where} lacks {missing[0]}, which is {FIELDS[missing[0]][1]}")
    return dict(card)


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


_side = _whole(1, MAX_SIDE)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _window(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] < value[1])


def _buckets(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 and all(map(_side, one)) for one in value)


def _sampling(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(part), Mapping) for part in ("sampler", "guidance")):
        return False
    steps = value.get("steps")
    if isinstance(steps, list):
        return 1 <= len(steps) <= MAX_STEPS and all(map(_number, steps))
    return _whole(1, MAX_STEPS)(steps)


# what ldm reads of a card: whether a value fits, and what is allowed
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stage": (lambda value: isinstance(value, str), "a name"),
    "classes": (_names, "a list of names"),
    "size": (_side, f"a whole number of px from 1 to {MAX_SIDE}"),
    "steps": (_whole(0, MAX_TRAINED), "a whole number from 0"),
    "window": (_window, "null, or two numbers, the smaller first"),
    "buckets": (_buckets, "a list of heights and widths in px"),
    "cond_drop_prob": (lambda value: _number(value) and 0 <= value <= 1, "0 to 1"),
    "sampling": (_sampling, f"a sampler, a guidance and 1 to {MAX_STEPS} steps"),
    "recipe": (_sampling, f"a sampler, a guidance and 1 to {MAX_STEPS} steps"),
}


def _shown(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
