"""From what a user asks for, whoever passes it on, to requests: the command line and the Python API both begin here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ldm.conditioning.values import checked, described
from ldm.diffusion.samplers import LCM, RePaint
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.interfaces import ClassInput, Condition, Guidance, Input, Sampler, Task, TextInput
from ldm.latents.model import LatentDiffusion
from ldm.model_folder import Loaded
from ldm.ranges import ValueRange
from ldm.sampling.inputs import ImageFormat, ImageLike, read_images
from ldm.sampling.pipeline import inputs_of
from ldm.sampling.request import InputImage, Mix, SampleRequest, SamplingConfig, SeedNoise, Slerp
from ldm.sampling.tasks import Inpaint
from ldm.sampling.wrappers import window_starts

MANY_WINDOWS = 16  # from which on a hint says how to do with fewer


@dataclass(frozen=True)
class SampleOptions:
    """What a user asks for.  Nothing is asked for where a field is None or empty: the model's own choice then holds.

    classes, prompts: taken in turn.  numbers: attributes by name.  negative, to_condition: a class or a prompt.  shows: what is to be
    seen in `image`.  first: index of the first picture.
    """

    classes: Sequence[str | int] = ()
    prompts: Sequence[str] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    negative: str | int | None = None
    unconditional: bool = False
    n: int | None = None
    per_class: int = 0
    first: int = 0
    seed: int = 0
    steps: int | list[float] | None = None
    sampler: Sampler | None = None
    guidance: Guidance | float | None = None
    spacing: Spacing | None = None
    size: tuple[int, int] | None = None
    windows: bool | None = None
    task: Task | None = None
    image: ImageLike | None = None
    mask: ImageLike | None = None
    to_image: ImageLike | None = None
    to_seed: int | None = None
    to_condition: str | int | None = None
    shows: str | int | None = None

    @property
    def walks(self) -> bool:
        """True where the pictures go from one to another."""
        return self.to_seed is not None or self.to_condition is not None or self.to_image is not None


@dataclass(frozen=True)
class Plan:
    """Requests, how they are sampled, and sentences on what was derived or left out."""

    requests: list[SampleRequest]
    config: SamplingConfig
    notes: list[str]


def plan(loaded: Loaded, options: SampleOptions, default_n: int = 4) -> Plan:
    """The requests of a user; a UserError for what contradicts itself or the model."""
    model, names = loaded.model, loaded.card["classes"]
    config = configured(loaded, options)
    if options.windows and model.conditioner.concat_channels:
        raise UserError("a model that is given images makes larger pictures in one piece: leave --windows out")
    images, notes = _images(loaded, config, options)
    notes += _notes_on_size(loaded, config, images)
    inputs, film = inputs_of(model, config, names), len(images) > 1
    if film and options.to_image is not None:
        raise UserError(f"{str(options.image)!r} is a film of {len(images)} frames: --to-image goes from one image to another")
    if film and (options.n is not None or options.per_class):
        given = options.per_class or options.n
        raise UserError(f"{str(options.image)!r} has {len(images)} frames, each of which becomes a picture: leave the number {given} out")
    count = len(images) if film else default_n if options.n is None else options.n
    if config.task is not None and config.task.one_picture and not film and _is_deterministic(config.sampler):
        if options.n is not None and options.n > 1:
            notes.append(f"no noise decides what {type(config.task).__name__} makes: one picture is made, not {options.n}")
        count = 1
    conditions = _conditions(model, inputs, names, options, count, bool(images))
    spoken = bool(options.classes or options.prompts)
    if (film or options.walks) and spoken and any(condition != conditions[0] for condition in conditions):
        what = "the frames of a film" if film else "pictures that go from one to another"
        raise UserError(f"{what} have one class or prompt, several were given: choose one")
    negative = None if options.negative is None else as_condition(inputs, names, options.negative)
    _require_effect(model, config, options, conditions)
    notes += _notes_on_null(loaded, config, conditions, bool(images))
    requests = []
    for i, condition in enumerate(conditions):
        image = images[i % len(images)] if images else None
        request = SampleRequest(options.first + i, SeedNoise(options.seed, options.first + i), condition, negative, image)
        requests.append(
            _interpolated(request, options, inputs, names, conditions[0], _weight(i, len(conditions))) if film or options.walks else request
        )
    return Plan(requests, config, notes)


def configured(loaded: Loaded, options: SampleOptions) -> SamplingConfig:
    """The model's own sampling configuration with what the user chose."""
    config = SamplingConfig.of(loaded.card)
    chosen = {one.name: getattr(options, one.name) for one in fields(SamplingConfig) if hasattr(options, one.name)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if isinstance(options.guidance, (int, float)):
        if "scale" not in {one.name for one in fields(config.guidance)}:  # type: ignore[arg-type]
            raise UserError(f"the model's guidance {type(config.guidance).__name__} has no scale: leave --guidance out")
        chosen["guidance"] = replace(config.guidance, scale=float(options.guidance))  # type: ignore[type-var]
    config = replace(config, **chosen)
    if options.windows is None and _is_trained_size(loaded, config):
        config = replace(config, windows=False)
    if config.task is not None and options.sampler is None:
        config = replace(config, sampler=config.task.sampler(config.sampler))
    loaded.model.denoiser.schedule.steps(config.steps, config.spacing)  # says now what is wrong with them
    return config


def _is_trained_size(loaded: Loaded, config: SamplingConfig) -> bool:
    """Whether pictures have one of several sizes with which the model was trained (data.crop none)."""
    return config.size is not None and list(config.size) in [list(one) for one in loaded.card.get("buckets", ())]


def as_condition(inputs: Mapping[str, Input], names: Sequence[str], wanted: str | int) -> Condition:
    """A class or a prompt, whichever the model takes; of a model that takes both, a class where there is one of that name."""
    kinds = {type(one): name for name, one in inputs.items()}
    if TextInput in kinds and ClassInput in kinds:
        try:
            return checked(inputs, {kinds[ClassInput]: wanted}, names)
        except UserError:
            return {kinds[TextInput]: str(wanted)}
    for kind in (ClassInput, TextInput):
        if kind in kinds:
            return checked(inputs, {kinds[kind]: wanted}, names)
    raise UserError(f"this model takes {described(inputs)}, {wanted!r} was asked for: leave it out")


def classes_of(names: Sequence[str], wanted: Sequence[str], num: int, per_class: int) -> list[str | None]:
    """One class per picture.  A wanted name that is the first part of several ("a" of "a/x", "a/y") stands for them in turn."""
    groups = [[name for name in names if name.startswith(f"{w}/")] or [w] for w in wanted] if wanted else [[name] for name in names]
    if not groups:
        return [None] * num
    if per_class:
        return [group[i % len(group)] for group in groups for i in range(per_class)]
    if not wanted:
        order = _spread(len(names))
        return [names[order[i % len(names)]] for i in range(num)]
    return [groups[i % len(groups)][i // len(groups) % len(groups[i % len(groups)])] for i in range(num)]


def _spread(count: int) -> list[int]:
    """0 .. count-1 in an order whose beginnings are spread evenly (steps of the golden ratio), so that picture i has the same class
    whatever n is, and n pictures of few have different ones."""
    order = dict.fromkeys(int(k * (5**0.5 - 1) / 2 % 1 * count) for k in range(20 * count))
    return [*order, *(i for i in range(count) if i not in order)]


def image_format(loaded: Loaded) -> ImageFormat:
    """What a model's images are."""
    frames = loaded.model.denoiser.network.frames
    window, values = loaded.card.get("window"), ValueRange.of(loaded.card)
    channels = loaded.model.latents.autoencoder.image_channels // frames
    if values.is_default:
        return ImageFormat(frames, channels, tuple(window) if window else None)
    return ImageFormat(frames, channels, (values.low, values.high), values.is_deep)


def image_size(loaded: Loaded, config: SamplingConfig, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The size of the image of which pictures of `size` px are made; None: the image's own."""
    takes = loaded.model.conditioner.image
    factor = config.task.downscale if config.task else takes.downscale if takes else 1
    if size is None:
        return None
    if min(size) < factor:
        raise UserError(f"pictures of {size[1]}x{size[0]} px cannot be {factor} times larger than an image: give a larger --size, or none")
    return size[0] // factor, size[1] // factor


def _images(loaded: Loaded, config: SamplingConfig, options: SampleOptions) -> tuple[list[InputImage], list[str]]:
    """The images that the user gave, as the task or the model wants them."""
    files: dict[str, Any] = {"mask": options.mask, "source-class": options.shows, "to-image": options.to_image}
    if options.image is None:
        for name, given in files.items():
            if given is not None:
                raise UserError(f"--{name} needs an image: give --image FILE")
        return [], []
    takes = loaded.model.conditioner.image
    if config.task is None and takes is None:
        raise UserError("an image was given, but nothing to do with it: choose a task, such as image-to-image with --strength 0.6")
    if config.task is not None and takes is not None and takes.downscale > 1:
        raise UserError(
            f"this model makes its pictures from images {takes.downscale} times smaller and does nothing else: "
            f"leave {type(config.task).__name__} out"
        )
    names, inputs = loaded.card["classes"], inputs_of(loaded.model, config, loaded.card["classes"])
    shows = {} if options.shows is None else as_condition(inputs, names, options.shows)
    size = image_size(loaded, config, config.size)
    return read_images(options.image, image_format(loaded), options.mask, options.to_image, shows, size)


def picture_size(model: LatentDiffusion, config: SamplingConfig, image: InputImage | None) -> tuple[int, int]:
    """Height and width in px of the picture that is made, of this image or of none."""
    if image is None:
        height, width = (side * model.latents.autoencoder.factor for side in model.latents.shape_of(None))
        return config.size or (height, width)
    height, width = image.pixels.shape[1:]
    if config.task is None:
        factor = model.conditioner.image.downscale if model.conditioner.image else 1
        return height * factor, width * factor
    _, mask = config.task.canvas(image.pixels[None], torch.zeros(1, 1, height, width))
    return mask.shape[2], mask.shape[3]


def _notes_on_size(loaded: Loaded, config: SamplingConfig, images: Sequence[InputImage]) -> list[str]:
    """A sentence where pictures are not of the training's size, and what that means."""
    latents, network, task = loaded.model.latents, loaded.model.denoiser.network, config.task
    trained = [side * latents.autoencoder.factor for side in latents.shape_of(None)]
    height, width = picture_size(loaded.model, config, images[0] if images else None)
    if _is_trained_size(loaded, config):
        return []
    what = f"pictures of {width}x{height} px, of a model that was trained with {trained[1]}x{trained[0]}"
    whole = task.whole if task else 1
    if height > whole * trained[0] or width > whole * trained[1]:
        count = len(window_starts(latents.shape_of((height, width), network.multiple), latents.shape_of(None)))
        made = f"are made of {count} windows" if config.windows and not network.concat_channels else "are made in one piece"
        sheet = -(-height // trained[0]), -(-width // trained[1])
        hint = "" if images else f"; for a sheet of {sheet[0] * sheet[1]} pictures use --n {sheet[0] * sheet[1]} --columns {sheet[1]}"
        shrink = f"; --size {trained[1]}x{trained[0]} resizes the image to the model's size" if images and count > MANY_WINDOWS else ""
        return [f"{what}, {made}{hint}{shrink}"]
    if height < trained[0] and width < trained[1]:
        return [f"{what}, look worse: give --size {trained[1]}x{trained[0]}"]
    return []


def _notes_on_null(loaded: Loaded, config: SamplingConfig, conditions: Sequence[Condition], has_image: bool) -> list[str]:
    """A sentence where "no condition" plays a part which the model never learned."""
    guided = getattr(config.guidance, "scale", 1.0) != 1 and config.guidance.companion is None
    learned = loaded.card.get("cond_drop_prob", 1.0) or not loaded.model.conditioner.inputs
    if learned or not (guided or (not has_image and not all(conditions))):
        return []
    return [
        "this model never learned to do without its condition (it was trained with cond_drop_prob 0), and guidance leads away from just "
        "that: give a condition and --guidance 1, or train with --model.cond_drop_prob 0.1"
    ]


def _is_deterministic(sampler: Sampler) -> bool:
    """True where a sampler adds no noise on the way."""
    return not isinstance(sampler, (LCM, RePaint)) and getattr(sampler, "eta", 0.0) == 0 and getattr(sampler, "churn", 0.0) == 0


def _require_effect(model: LatentDiffusion, config: SamplingConfig, options: SampleOptions, conditions: Sequence[Condition]) -> None:
    """A UserError for what cannot act: guidance without a condition or without a noise level, inpainting without a mask."""
    scale, guided = getattr(config.guidance, "scale", 1.0), isinstance(options.guidance, (int, float)) and options.guidance != 1
    if type(config.task) is Inpaint and options.mask is None:
        raise UserError("the task Inpaint makes the white part of a mask anew: give --mask FILE, or --strength alone for a picture like it")
    low, high = getattr(config.guidance, "low", 0.0), getattr(config.guidance, "high", float("inf"))
    sigmas = model.denoiser.schedule.steps(config.steps, config.spacing)[:-1]
    if (guided or options.negative is not None) and not ((sigmas >= low) & (sigmas <= high)).any():
        raise UserError(
            f"guidance acts at noise levels from {low:g} to {high:g}, and {len(sigmas)} steps visit none of them: "
            "give more --steps, or --guidance CFG --guidance.scale 2"
        )
    if options.negative is not None and scale == 1:
        raise UserError("--negative means nothing with guidance 1: give --guidance 2 or more, or leave it out")
    if options.negative is not None or config.guidance.companion is not None or any(conditions) or options.to_condition is not None:
        return
    if guided:
        raise UserError(f"--guidance {options.guidance:g} means nothing without a condition: give --class or --prompt, or leave it out")


def _conditions(
    model: LatentDiffusion, inputs: Mapping[str, Input], names: Sequence[str], options: SampleOptions, count: int, has_image: bool
) -> list[Condition]:
    """What each picture shows: what was asked for, or all classes evenly spread; an image brings no class along."""
    spread = bool(model.conditioner.num_classes) and not (options.unconditional or options.prompts or options.numbers or has_image)
    wanted = [str(each).strip() for each in options.classes]
    if options.per_class and options.n is not None:
        raise UserError(f"--n {options.n} and --per-class {options.per_class} were given together: choose one")
    if options.unconditional and (wanted or options.prompts or options.numbers):
        raise UserError("a condition was given together with --unconditional: leave one out")
    if wanted or spread:
        if wanted and not any(isinstance(one, ClassInput) for one in inputs.values()):
            raise UserError(
                f"a class was given ({wanted[0]!r}), but this model takes {described(inputs)}: use --prompt or --numbers, or leave it out"
            )
        labels = classes_of(names, wanted, count, options.per_class)
    elif options.per_class:
        raise UserError(f"per_class is {options.per_class}, but no classes were given and this model knows none: give --n instead")
    else:
        labels = [None] * count
    if options.prompts and not model.conditioner.takes_text:
        raise UserError(
            f"a prompt was given ({options.prompts[0]!r}), but this model takes no text, it takes {described(inputs)}: "
            "use --class or --numbers, or a model with the conditioner Text"
        )
    conditions: list[Condition] = []
    for i, label in enumerate(labels):
        condition: dict[str, Any] = {} if label is None else {"class": label}
        if options.prompts:
            condition["text"] = options.prompts[i % len(options.prompts)]
        conditions.append(checked(inputs, {**condition, **options.numbers}, names))
    return conditions


def _interpolated(
    request: SampleRequest, options: SampleOptions, inputs: Mapping[str, Input], names: Sequence[str], condition: Condition, weight: float
) -> SampleRequest:
    """A picture of a film or on a way: one condition, and one noise unless the way is that from image to image."""
    noise: SeedNoise | Slerp = request.noise  # type: ignore[assignment]
    if options.to_seed is not None:
        noise = Slerp(SeedNoise(options.seed, 0), SeedNoise(options.to_seed, 0), weight)
    elif options.to_condition is not None or not options.walks:
        noise = SeedNoise(options.seed, 0)
    image = request.image
    if image is not None and options.to_image is not None:  # the noise that makes an image under a condition is found under that
        image = replace(image, weight=weight, shows=image.shows or condition)
    wanted: Condition | Mix = condition
    if options.to_condition is not None:
        wanted = Mix(condition, as_condition(inputs, names, options.to_condition), weight)
    return replace(request, noise=noise, condition=wanted, image=image)


def _weight(i: int, n: int) -> float:
    """Weight of the second of two ends in picture i of n."""
    return 0.5 if n == 1 else i / (n - 1)
