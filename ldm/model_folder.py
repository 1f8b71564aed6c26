"""Save and load models without pickle: a folder of config.yaml (class paths and arguments) and model.safetensors.

The only place that builds classes from names, and it builds only parts of ldm and of packages that the caller trusts.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ldm.card import checked
from ldm.errors import UserError, nearest
from ldm.files import PART, read_yaml, replacing, sweep, sync, write_atomically
from ldm.interfaces import Buildable
from ldm.registry import current_arguments, current_path

FORMAT = 1
CONFIG, WEIGHTS = "config.yaml", "model.safetensors"  # of a model folder
SHIPPED = Path(__file__).parent / "models"
FROZEN = 50_000  # parameters of text encoders and the like, which are loaded from elsewhere
CHECKPOINT_KEY = "ldm"  # what a training checkpoint holds beside Lightning's own entries


def describe(value: Any) -> Any:
    """A part as plain data: {class_path, init_args}, recursively."""
    if isinstance(value, Buildable):
        arguments = value.init_args
        if dataclasses.is_dataclass(value) and not arguments:
            arguments = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class_path": path, "init_args": {name: describe(argument) for name, argument in arguments.items()}}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a model's arguments are numbers, text, lists and parts of ldm; {value!r} is none of them")


def build(spec: Any, trusted: Iterable[str] = ()) -> Any:
    """Inverse of `describe`; class paths outside ldm and the trusted packages are refused."""
    if isinstance(spec, list):
        return [build(item, trusted) for item in spec]
    if not isinstance(spec, dict):
        return spec
    if "class_path" not in spec:
        return {key: build(item, trusted) for key, item in spec.items()}
    module, _, name = current_path(str(spec["class_path"])).rpartition(".")
    if module.split(".")[0] not in {"ldm", *trusted}:
        raise UserError(f"the model names the class {spec['class_path']!r}; allowed are classes of {', '.join(['ldm', *trusted])}")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the model names the class {spec['class_path']!r}, which this version of ldm does not have") from error
    if not (isinstance(cls, type) and issubclass(cls, Buildable)):
        raise UserError(f"the model names {spec['class_path']!r}, which is not a part that a model can be built from")
    try:
        return cls(**build(current_arguments(name, spec.get("init_args", {})), trusted))
    except TypeError as error:
        raise UserError(f"the model's description does not fit this version of ldm: {error}") from error


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the weights, names and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(
    model: nn.Module, folder: str | Path, card: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None, half: bool = False
) -> None:
    """Write `model` (with other `weights`, e.g. the averaged ones) and its card (facts such as class names) to a folder.

    half stores float weights in 16 bits: half the size, about 3 significant digits.
    """
    state = merged({**model.state_dict(), **(weights or {})})
    state = {name: (t.half() if half and t.is_floating_point() else t).detach().cpu().contiguous() for name, t in state.items()}
    data = safetensors.torch.save(state)
    config = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), "card": dict(card), "model": describe(model)}
    folder = Path(folder)
    weights_path, config_path = folder / WEIGHTS, folder / CONFIG
    settle(folder)
    sweep(folder)
    # both are on the disk before the first takes its place: where the process ends between the two, `load` finds the other (`_config_of`)
    with replacing(config_path) as new_config:
        new_config.write_bytes(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
        sync(new_config)
        write_atomically(weights_path, data)


@dataclasses.dataclass(frozen=True)
class Loaded:
    model: Any
    card: dict[str, Any]
    sha256: str  # of the weights' file


def find(path: str | Path) -> Path:
    """The model folder or checkpoint that a user means: a folder, a file, a run with one model below it, or a shipped model's name.

    A folder that holds no model, such as somebody's pictures, does not hide a shipped model of its name.
    """
    folder = Path(path).expanduser()
    if folder.is_file() or (folder / CONFIG).is_file():
        return folder
    if (SHIPPED / str(path) / CONFIG).is_file():
        return SHIPPED / str(path)
    if (folder / "model" / CONFIG).is_file():
        return folder / "model"
    below = sorted(found.parent for found in folder.glob("*/model/config.yaml")) if folder.is_dir() else []
    diffusion = [found for found in below if found.parent.name == "diffusion"]
    if len(below) == 1 or len(diffusion) == 1:
        return (diffusion or below)[0]
    shipped = sorted(found.name for found in SHIPPED.glob("*") if found.is_dir())
    hint = f"; below it are {', '.join(map(str, below))}" if below else ""
    raise UserError(
        f"no model at {str(path)!r}: give a model folder (with config.yaml and model.safetensors), "
        f"a checkpoint (.ckpt) or a shipped model ({nearest(str(path), shipped)}){hint}"
    )


def load(path: str | Path, trusted: Iterable[str] = ()) -> Loaded:
    """The model at a path as `find` understands it; of a training checkpoint the averaged weights."""
    folder = find(path)
    if folder.is_file():
        return _load_checkpoint(folder, trusted)
    weights_path = folder / WEIGHTS
    if not weights_path.is_file():
        raise UserError(f"no model at {str(path)!r}: {weights_path} is missing")
    data = weights_path.read_bytes()
    config = _config_of(folder, hashlib.sha256(data).hexdigest())
    try:
        weights = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise UserError(f"{weights_path} holds no weights that can be read: {error}") from error
    model = _built(config["model"], trusted, weights, folder / CONFIG)
    load_weights(model, weights, weights_path)
    return Loaded(model.eval(), checked(config["card"], folder / CONFIG), config["sha256"])


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a model folder, without its weights."""
    return checked(_read_config(folder / CONFIG)["card"], folder / CONFIG)


def require_free(folder: Path, overwrite: bool) -> None:
    """UserError where a folder that is to be written holds a model already."""
    if (folder / CONFIG).is_file() and not overwrite:
        raise UserError(f"{folder} holds a model: choose another --out, or give --overwrite")


def settle(folder: Path) -> None:
    """Finish what a process that was killed in `save` had begun: the weights of its model are there, their description waits."""
    weights = folder / WEIGHTS
    waiting = list(folder.glob(f".{Path(CONFIG).stem}.*{PART}.yaml")) if weights.is_file() else []
    if waiting:
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        for path in waiting:
            with suppress(UserError):
                if _read_config(path)["sha256"] == sha256:
                    path.replace(folder / CONFIG)
                    return


def _config_of(folder: Path, sha256: str) -> dict[str, Any]:
    """The description that belongs to weights of this hash: config.yaml, or one that was about to become it when its writer was killed."""
    config = _read_config(folder / CONFIG)
    if config["sha256"] == sha256:
        return config
    for waiting in folder.glob(f".{Path(CONFIG).stem}.*{PART}.yaml"):
        with suppress(UserError):
            if (config := _read_config(waiting))["sha256"] == sha256:
                return config
    raise UserError(f"{folder / WEIGHTS} is damaged or was exchanged: its hash is not the one in {CONFIG}")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path)
    if not isinstance(config, dict):
        config = {}
    if missing := {"format", "sha256", "card", "model"} - config.keys():
        raise UserError(f"{path} is not a model description: it lacks {', '.join(sorted(missing))}")
    if config["format"] != FORMAT:
        raise UserError(f"{path} is not a model description of format {FORMAT}: write the folder again with this version of ldm")
    return config


def _built(spec: Any, trusted: Iterable[str], weights: Mapping[str, Tensor], where: Path) -> nn.Module:
    """`build` for a description of unknown origin, which ends: 10^9 blocks would not."""
    allowed, made = len(weights) * 4 + FROZEN, 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        made += 1
        if made > allowed:
            raise UserError(f"{where} describes a larger model than the {len(weights)} weights beside it")

    hook = register_module_parameter_registration_hook(count)
    try:
        model = build(spec, trusted)
    except (RuntimeError, MemoryError, OverflowError, AttributeError, AssertionError, KeyError, IndexError, ZeroDivisionError) as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"the model in {where} cannot be built: {said} ({type(error).__name__})") from error
    finally:
        hook.remove()
    if not isinstance(model, nn.Module):
        raise UserError(f"{where} describes no model, but {type(model).__name__}")
    return model


def _load_checkpoint(path: Path, trusted: Iterable[str]) -> Loaded:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        entry, state = checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"]
        spec, card, averaged = entry["model"], entry["card"], entry.get("averaged", {})
        weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        if not all(isinstance(t, Tensor) for t in (*weights.values(), *averaged.values())):
            raise TypeError
        weights = merged({**weights, **averaged})
    except Exception as error:  # torch.load raises many kinds: zip, pickle, key, runtime
        raise UserError(f"{path} is not a checkpoint written by `ldm fit` ({type(error).__name__})") from error
    model = _built(spec, trusted, weights, path)
    load_weights(model, weights, path)
    return Loaded(model.eval(), checked(card, path), hashlib.sha256(path.read_bytes()).hexdigest())


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the sums in place of what nn.lora.LowRank adds to them."""
    found = dict(state)
    for name in [name for name in state if name.endswith(".original")]:
        module, _, weight = name.removesuffix(".original").rpartition(".parametrizations.")
        up, down, scale = (found.pop(f"{module}.parametrizations.{weight}.0.{part}") for part in ("up", "down", "scale"))
        original = found.pop(name)
        found[f"{module}.{weight}"] = original + (scale * up @ down).view_as(original)
    return found


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """All of the model's, and no others; UserError where they do not fit, or are not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{name} in {path} is not finite: these weights make no pictures; take an earlier checkpoint, or train again")
    try:
        model.load_state_dict({name: tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the weights in {path} do not fit the model: {first}") from error
