"""What a picture says of how it was made: written into its PNG and the manifest, and read back as something that may be hostile."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from ldm import __version__, model_folder, registry
from ldm.card import MAX_SIDE, MAX_STEPS
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.interfaces import Condition, Guidance, Sampler, Task
from ldm.sampling.request import PRECISIONS, InputImage, Mix, SampleRequest, SamplingConfig, SeedNoise, Slerp

TEXT_KEY = "ldm"  # of the PNG's text chunk
BOUNDS = {"times": (1, 1000), "factor": (1, 1000), **dict.fromkeys(("left", "right", "top", "bottom"), (0, MAX_SIDE))}
OLD_CHUNK_SIZE = 8  # of pictures that do not say it


def settings_of(request: SampleRequest, config: SamplingConfig, model_sha256: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what a picture shows, as plain data; extra: what decides its last bits."""
    condition = request.condition
    found: dict[str, Any] = {"index": request.index, "seed": _seed(request.noise), "negative": request.negative}
    found["condition"] = dict(condition.a if isinstance(condition, Mix) else condition)
    if isinstance(request.noise, Slerp):
        found |= {"to_seed": request.noise.b.seed, "weight": request.noise.weight}
    elif request.noise.index != request.index:
        found |= {"noise_index": request.noise.index}
    if isinstance(condition, Mix):
        found |= {"to_condition": dict(condition.b), "weight": condition.weight}
    if request.image is not None:
        found |= {**request.image.facts, "shows": dict(request.image.shows)}
        found |= {"weight": request.image.weight} if request.image.second is not None else {}
    return {**found, **config.described(), **extra, "model_sha256": model_sha256, "ldm": __version__}


def _seed(noise: SeedNoise | Slerp) -> int:
    return noise.a.seed if isinstance(noise, Slerp) else noise.seed


def to_json(settings: Mapping[str, Any]) -> str:
    """Strict JSON: infinity, which guidance has as "no upper limit", is the text "inf"."""
    return json.dumps(_finite(settings), ensure_ascii=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def settings_in(path: Path) -> dict[str, Any] | None:
    """The settings of a picture of ours as they stand there; None for a missing file, somebody else's, or one that ends too early.

    Pixels are not decoded: the text comes before them.
    """
    try:
        with path.open("rb") as file:
            file.seek(-12, 2)
            whole = file.read().endswith(b"IEND\xaeB`\x82")
        with Image.open(path, formats=["PNG"]) as image:  # the chunks before the pixels
            text = image.info.get(TEXT_KEY)
        found = json.loads(text) if whole and text else None
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError):  # not there, not a PNG, not JSON, too deep
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class StoredSettings:
    """What `ldm again` may do for a picture: checked types and ranges; nothing here names a file that is read or written."""

    request: SampleRequest
    config: SamplingConfig
    model_sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # of its images
    shows: Condition = field(default_factory=dict)
    weight: float = 0.0
    size: tuple[int, int] | None = None  # to which its image was resized
    old: bool = False  # of a version that resized every image to the training's size
    watermark: bool = False
    tile: int = 0
    chunk_size: int = OLD_CHUNK_SIZE
    precision: str = "32-true"

    @classmethod
    def read(cls, path: Path) -> "StoredSettings":
        """Those of a PNG file; a UserError that says what is wrong with it."""
        if not path.is_file():
            raise UserError(f"there is no picture {str(path)!r}")
        stored = settings_in(path)
        if stored is None or "model_sha256" not in stored:
            raise UserError(f"{str(path)!r} carries no settings of ldm: give a PNG file as `ldm sample` wrote it")
        try:
            return cls.parse(stored)
        except UserError as error:
            raise UserError(f"the settings in {str(path)!r} cannot be used: {error}") from error

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> "StoredSettings":
        """From plain data; what an older version did not write has the value that it had there."""
        old = _Reader(_of_old_version(stored))
        weight, index = old.number("weight", 0, 1, 0.0), old.whole("index", 0, 2**53)
        seed = old.whole("seed", 0, 2**64 - 1)
        noise: SeedNoise | Slerp = SeedNoise(seed, old.whole("noise_index", 0, 2**53, index))
        if "to_seed" in old.data:
            noise = Slerp(SeedNoise(seed, 0), SeedNoise(old.whole("to_seed", 0, 2**64 - 1), 0), weight)
        first = old.condition("condition") or {}
        condition = Mix(first, old.condition("to_condition") or {}, weight) if "to_condition" in old.data else first
        request = SampleRequest(index, noise, condition, old.condition("negative"))
        config = old.config()
        facts = {name: old.data[name] for name in FACTS if name in old.data}
        precision, model = old.data.get("precision", "32-true"), old.data.get("model_sha256")
        if not isinstance(model, str) or precision not in PRECISIONS:
            raise UserError(f"its model is {model!r}, its precision {precision!r}")
        return cls(
            request, config, model, facts, old.condition("shows") or {}, weight, config.size, "old" in old.data,
            bool(old.data.get("watermark", False)), old.whole("tile", 0, MAX_SIDE, 0),
            old.whole("chunk_size", 1, 4096, OLD_CHUNK_SIZE), precision,
        )  # fmt: skip

    def with_companion(self, given: str | None) -> SamplingConfig:
        """Its configuration, whose guidance's second model is a shipped one or the one that the user gives: no other path is opened."""
        config, name = self.config, self.config.guidance.companion
        if name is None or (name.isidentifier() and (model_folder.SHIPPED / name).is_dir()):
            return config
        if given is None:
            raise UserError(f"the picture was made with the second model {name!r}: give it with --guide-model")
        field = "classifier" if config.guidance.needs_labels else "weaker"
        return replace(config, guidance=replace(config.guidance, **{field: given}))  # type: ignore[type-var]

    def matching(self, images: Sequence[InputImage]) -> InputImage:
        """The image, or frame, that the picture was made from; a UserError that says which file is another one."""
        wrong, image = ["image"], None
        for image in images:
            names = ("image_sha256", "frame", "mask_sha256", "to_image_sha256")
            wrong = [name for name in names if image.facts.get(name) != self.facts.get(name)]
            if not wrong or wrong[0] not in names[:2]:
                break
        if wrong or image is None:
            what = "image" if wrong[0] == "frame" else wrong[0].removesuffix("_sha256").replace("_", "-")
            raise UserError(f"the picture was made with another file as {what}, or with none: give that")
        return image


FACTS = ("image", "image_sha256", "frame", "mask_sha256", "to_image", "to_image_sha256")
OLD_NAMES = {
    "towards": "to_image",
    "towards_sha256": "to_image_sha256",
    "towards_seed": "to_seed",
    "share": "weight",
    "lanes": "chunk_size",
}


def _of_old_version(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in today's names: before, a condition was one word, and an interpolated noise was that of index 0."""
    found = {OLD_NAMES.get(key, key): value for key, value in stored.items()}
    if "class" in found:
        for old, new in (("class", "condition"), ("negative", "negative"), ("mixed", "to_condition"), ("shows", "shows")):
            word = found.pop(old, None)
            found[new] = {"word": word} if word is not None else None
        found.setdefault("old", True)
        if found["to_condition"] is None:
            del found["to_condition"]
    return found


class _Reader:
    """Plain data of unknown origin, read with types and ranges."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise UserError(f"{name} is {value!r}; allowed is {low:g} to {high:g}")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.number(name, low, high, default)
        if not isinstance(value, int):
            raise UserError(f"{name} is {value!r}; it must be a whole number")
        return value

    def condition(self, name: str) -> Condition | None:
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict) or not all(isinstance(v, (str, int, float)) for v in value.values()):
            raise UserError(f"{name} is {value!r}; it must be values by name")
        return value

    def config(self) -> SamplingConfig:
        """Sampler, guidance and task by name, of these kinds and no others."""
        steps, size = self.data.get("steps", 25), self.data.get("size")
        if isinstance(steps, list):
            if not 1 <= len(steps) <= MAX_STEPS or not all(isinstance(t, (int, float)) for t in steps):
                raise UserError("steps is no list of numbers")
        elif not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise UserError(f"steps is {steps!r}; allowed is 1 to {MAX_STEPS}")
        if size is not None and not (
            isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in size)
        ):
            raise UserError(f"size is {size!r}; allowed are two numbers from 1 to {MAX_SIDE}")
        spacing = self.data.get("spacing", "trailing")
        if spacing not in get_args(Spacing):
            raise UserError(f"spacing is {spacing!r}")
        sampler = _part(self.data.get("sampler"), Sampler, "sampler")
        guidance = _part(self.data.get("guidance"), Guidance, "guidance")
        task = None if self.data.get("task") is None else _part(self.data["task"], Task, "task")
        windows = bool(self.data.get("windows", True))
        return SamplingConfig(sampler, guidance, steps, spacing, task, None if size is None else (size[0], size[1]), windows)


def _part(spec: Any, base: type, what: str) -> Any:
    """A part of this kind: class, types and bounds of its arguments are checked before it is built."""
    if not isinstance(spec, dict):
        raise UserError(f"{what} is {spec!r}, which names no class")
    resolved = registry.resolve(_infinite(spec), base, what, ("degradations", "diffusion", "sampling"), BOUNDS)
    return model_folder.build(resolved)


def _infinite(value: Any) -> Any:
    """Inverse of what `to_json` does to infinity."""
    if isinstance(value, dict):
        return {key: _infinite(item) for key, item in value.items()}
    return float(value) if value in ("inf", "-inf") else value
