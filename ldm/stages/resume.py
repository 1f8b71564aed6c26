"""Going on from a checkpoint: which settings are today's, and which have to be the checkpoint's."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import UserError
from ldm.registry import current_arguments, current_path

# of a model's description: what may differ, as it changes no weight (dropout, memory, a loss), or is followed by name (classes)
FREE = ("dropout", "num_classes", "cond_drop_prob", ".recompute", ".bottleneck.weight")
DAMAGED = "the optimizer's state in the checkpoint is damaged: go on from another one, or start a new run from it with --model.init"
ELSEWHERE = ("trainer.default_root_dir", "trainer.logger", "trainer.callbacks.Pictures.folder")  # where things are written


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Settings by their option's name: {"model.optimizer.lr": 0.002}; a part's own name is that of its class."""
    if isinstance(value, Mapping) and "class_path" in value:
        path = current_path(str(value["class_path"])).rpartition(".")[2]
        return {name: path, **flat(current_arguments(path, value.get("init_args") or {}), name)}
    if isinstance(value, Mapping):
        found = dict[str, Any]()
        for key, item in value.items():
            found |= flat(item, f"{name}.{key}" if name else str(key))
        return found
    if isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
        found, seen = {}, Counter[str]()
        for i, item in enumerate(value):
            part = item.get("class_path") if isinstance(item, Mapping) else None
            one = current_path(str(part)).rpartition(".")[2] if part else str(i)
            seen[one] += 1
            found |= flat(item, f"{name}.{one}" if seen[one] == 1 else f"{name}.{one} {seen[one]}")
        return found
    return {name: list(value) if isinstance(value, tuple) else value}


def changes(before: Any, now: Any) -> list[str]:
    """What differs between the settings of a checkpoint and today's, as `name old -> new`."""
    old, new = flat(before), flat(now)
    names = [name for name in {**old, **new} if not name.startswith(ELSEWHERE)]
    return [f"{name} {_shown(old, name)} -> {_shown(new, name)}" for name in names if _told(old.get(name)) != _told(new.get(name))]


def _told(value: Any) -> str | None:
    """What counts of a setting: 1 and "1" are the same, and so are an empty list and none."""
    return None if value is None or value == [] else str(value)


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "(none)"


def require_same_model(before: Any, now: Any, option: str = "model") -> None:
    """A UserError where a checkpoint's model is described otherwise than today's: its weights would mean something else.

    option: what the description belongs to.  Classes are compared before their arguments.
    """
    old, new = flat(before, option), flat(now, option)
    for name in sorted(old.keys() & new.keys(), key=lambda one: (one.count("."), one)):
        if old[name] != new[name] and not name.endswith(FREE):
            raise UserError(
                f"{name} is {new[name]}, in the checkpoint {old[name]}: a run goes on with the model that it began with; leave that "
                "option as it was, or start a new run from the checkpoint with --model.init"
            )


def require_same_start(before: Any, now: Any) -> None:
    """A UserError where today's settings ask for another model to begin with: a run that goes on has its weights from the checkpoint."""
    old, new = flat(before), flat(now)
    if (wanted := new.get("model.init")) is not None and wanted != old.get("model.init"):
        raise UserError(
            f"model.init is {wanted}, in the checkpoint {old.get('model.init')}: a run that goes on has its weights from the checkpoint; "
            "leave that option as it was, or start a new run with another --run"
        )


def follow_optimizer(checkpoint: dict[str, Any], configured: Mapping[str, Any]) -> None:
    """Put today's learning rates, their end, weight decay and betas into the checkpoint's optimizer and schedule.

    configured: what configure_optimizers gives.  The moments and the number of steps stay the checkpoint's; UserError where they are not
    those of today's parameters.
    """
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    try:
        (state,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        counts = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
        moments = {i: {one[name].shape for name in ("exp_avg", "exp_avg_sq")} for i, one in state["state"].items()}
        steps = int(schedule["last_epoch"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(DAMAGED) from error
    if counts[0] != counts[1]:
        raise UserError(
            f"{sum(counts[1])} tensors are trained, in the checkpoint {sum(counts[0])}: leave freeze, learn_variance and the adversary "
            "as they were, or start a new run from the checkpoint with --model.init"
        )
    shapes = dict(enumerate(parameter.shape for group in optimizer.param_groups for parameter in group["params"]))
    if any(shape != {shapes.get(i)} for i, shape in moments.items()):  # torch's own code would read beyond them
        raise UserError(DAMAGED)
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, today, rate in zip(state["param_groups"], optimizer.param_groups, rates, strict=True):
        group |= {name: value for name, value in today.items() if name != "params"}
        group["lr"] = rate
    schedule |= {"base_lrs": list(scheduler.base_lrs), "_last_lr": rates}
