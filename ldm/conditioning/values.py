"""Conditions as users give them -> checked values -> the batch that a conditioner encodes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm.devices import send
from ldm.errors import UserError, nearest
from ldm.interfaces import Batch, ClassInput, Condition, Conditioner, Input, NumberInput, TextInput


def checked(inputs: Mapping[str, Input], condition: Mapping[str, Any], classes: Sequence[str]) -> dict[str, str | float]:
    """The condition with full class names and numbers as floats; a UserError for what the model does not take."""
    values: dict[str, str | float] = {}
    for name, value in condition.items():
        match inputs.get(name):
            case ClassInput(num_classes):
                label = label_of(value, classes, num_classes)
                values[name] = classes[label] if label < len(classes) else str(label)
            case TextInput():
                if value != "":  # the null is the empty text
                    values[name] = str(value)
            case NumberInput():
                values[name] = number(name, value)
            case _:
                raise UserError(f"this model takes no {name}, {value!r} was given: it takes {described(inputs)}")
    return values


def condition_of(conditioner: Conditioner, label: str | None, text: str, numbers: Mapping[str, float]) -> Condition:
    """What to ask a model for, to get what a sample of this class, text and numeric attributes shows; only what it takes."""
    found: dict[str, str | float] = {}
    for name, one in conditioner.inputs.items():
        if isinstance(one, ClassInput) and label is not None:
            found[name] = label
        elif isinstance(one, TextInput) and text:
            found[name] = text
        elif isinstance(one, NumberInput) and name in numbers:
            found[name] = numbers[name]
    return found


def described(inputs: Mapping[str, Input]) -> str:
    """What a model takes, in words."""
    return ", ".join(
        f"{name} ({one.low:g} to {one.high:g})" if isinstance(one, NumberInput) else f"a{'n' if name[0] in 'aeiou' else ''} {name}"
        for name, one in inputs.items()
    ) or "no condition"  # fmt: skip


def number(name: str, value: Any) -> float:
    """A finite number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{name} is {value!r}; give a finite number")
    return found


def label_of(wanted: Any, names: Sequence[str], num_classes: int) -> int:
    """The number of a class given by its number or name (also the name's last part, or any part that only one name has)."""
    if wanted in names:
        return list(names).index(str(wanted))
    text = str(wanted).strip().lower()
    if text.isdecimal() and text not in names and int(text) < num_classes:
        return int(text)
    exact = [i for i, name in enumerate(names) if text in (name.lower(), name.lower().split("/")[-1])]
    found = exact or [i for i, name in enumerate(names) if text and text in name.lower()]
    if len(exact) == 1 or len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"class {wanted!r} is ambiguous; allowed: {', '.join(names[i] for i in found)}")
    last_parts = [name.split("/")[-1] for name in names]
    allowed = nearest(text, last_parts, 200) if names else f"0 to {num_classes - 1}"
    raise UserError(f"class {wanted!r} is unknown; allowed: {allowed}")


def batch_of(inputs: Mapping[str, Input], conditions: Sequence[Condition], classes: Sequence[str], device: torch.device) -> Batch:
    """What a conditioner with these inputs encodes, a sample per condition; what a condition does not name is none."""
    values = [checked(inputs, condition, classes) for condition in conditions]
    batch: Batch = {"id": [""] * len(values)}
    numbers = [name for name, one in inputs.items() if isinstance(one, NumberInput)]
    for name, one in inputs.items():
        if isinstance(one, ClassInput):
            labels = [label_of(value[name], classes, one.num_classes) if name in value else -1 for value in values]
            batch["label"] = send(torch.tensor(labels), device)
        elif isinstance(one, TextInput):
            batch["text"] = [str(value.get(name, "")) for value in values]
    if numbers:
        batch["numbers"] = [{name: value[name] for name in numbers if name in value} for value in values]
    return batch
