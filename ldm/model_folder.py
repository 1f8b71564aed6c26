"""Save and load models without pickle: a folder of config.yaml (class paths and arguments) and model.safetensors.

The only place that builds classes from names, and it builds only parts of ldm and of packages that the caller trusts.
"""

import dataclasses
import hashlib
import importlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from ldm.errors import UserError, nearest
from ldm.interfaces import Buildable
from ldm.registry import current_arguments, current_path

FORMAT = 1
CONFIG = "config.yaml"  # of a model folder
SHIPPED = Path(__file__).parent / "models"
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


def write_atomically(path: Path, data: bytes) -> None:
    """The file is there whole or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


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
    write_atomically(Path(folder) / "model.safetensors", data)
    write_atomically(Path(folder) / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())


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
    config_path, weights_path = folder / CONFIG, folder / "model.safetensors"
    if not weights_path.is_file():
        raise UserError(f"no model at {str(path)!r}: {weights_path} is missing")
    try:
        config = yaml.safe_load(config_path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{config_path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        config = {}
    if missing := {"format", "sha256", "card", "model"} - config.keys():
        raise UserError(f"{config_path} is not a model description: it lacks {', '.join(sorted(missing))}")
    if config["format"] != FORMAT:
        raise UserError(f"{config_path} is not a model description of format {FORMAT}: write the folder again with this version of ldm")
    data = weights_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise UserError(f"{weights_path} is damaged or was exchanged: its hash is not the one in config.yaml")
    model = build(config["model"], trusted)
    load_weights(model, safetensors.torch.load(data), weights_path)
    return Loaded(model.eval(), config["card"], config["sha256"])


def _load_checkpoint(path: Path, trusted: Iterable[str]) -> Loaded:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        entry = checkpoint[CHECKPOINT_KEY]
    except Exception as error:  # torch.load raises many kinds: zip, pickle, key, runtime
        raise UserError(f"{path} is not a checkpoint written by `ldm fit` ({type(error).__name__})") from error
    model = build(entry["model"], trusted)
    weights = {name.removeprefix("model."): t for name, t in checkpoint["state_dict"].items() if name.startswith("model.")}
    load_weights(model, merged({**weights, **entry.get("averaged", {})}), path)
    return Loaded(model.eval(), entry["card"], hashlib.sha256(path.read_bytes()).hexdigest())


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
    """All of the model's, and no others."""
    try:
        model.load_state_dict({name: tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the weights in {path} do not fit the model: {first}") from error
