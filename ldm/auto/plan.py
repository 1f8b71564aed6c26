"""From what is known of the pictures and the machine to two `ldm fit` commands: sizes, networks, batches, steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ldm.errors import UserError

# px on a side: factor of the autoencoder, its multipliers (4 px patches), images that stage 1 and stage 2 should at least see
SIZES: dict[int, tuple[int, list[int], int, int]] = {
    32: (4, [1], 2_000, 5_000),
    64: (4, [1], 4_000, 20_000),
    128: (8, [1, 2], 200_000, 1_000_000),
    256: (8, [1, 2], 1_000_000, 4_000_000),
    512: (16, [1, 2, 2], 4_000_000, 8_000_000),
}
FIRST_BATCH, SECOND_BATCH, LATENT_CHANNELS = 8, 16, 4
FIRST_SHARE = 0.2  # of the training time that stage 1 gets
LAST_SHARE = 0.15  # of all time that is kept for choosing, sampling, the report, and for a machine that becomes slower
START = 12.0  # seconds until a stage makes its first step
ENOUGH = 400_000  # images that stage 2 sees where nobody says for how long to train
MOST_EPOCHS = 1500
LEAST_HOURS, MOST_HOURS = 0.05, 48.0
LEAST_PERCEPTUAL = 1.0  # hours on a CPU from which stage 1 compares features, too
VALIDATIONS = 5  # in a stage
MOST_BESIDE = 1.5  # times its steps' own time that a stage may take


@dataclass(frozen=True)
class Facts:
    """What is known of a set of pictures.  side: the median of their shorter sides in px."""

    path: str
    images: int  # to train on
    classes: int
    has_texts: bool
    channels: int
    side: float
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Where it is trained: device cpu or cuda, so many of them; cores, and memory in bytes; perceptual: whether the package with the
    network of the perceptual loss is there."""

    device: str
    devices: int
    cores: int
    memory: int
    perceptual: bool = False


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a training, and where it starts.

    start: a model whose networks have these shapes, from which both stages start.  perceptual: whether stage 1 compares features, too.
    """

    size: int  # px
    channels: int  # of the images
    factor: int
    multipliers: tuple[int, ...]
    width: int  # of the UNet
    start: str | None = None
    perceptual: bool = False

    @property
    def side(self) -> int:
        """Of the latents."""
        return self.size // self.factor


@dataclass(frozen=True)
class Speed:
    """Seconds of a training step of each stage, and of one network call for one picture, all devices together."""

    first: float
    second: float
    call: float


Measure = Callable[[Shape], Speed]


@dataclass(frozen=True)
class Plan:
    """A whole training."""

    facts: Facts
    machine: Machine
    shape: Shape
    speed: Speed
    hours: float
    first_steps: int
    second_steps: int
    text_encoder: str | None = None

    @property
    def seconds(self) -> tuple[float, float]:
        """How long each stage should take."""
        return self.first_steps * self.speed.first, self.second_steps * self.speed.second

    def fit(self, run: str) -> dict[str, list[str]]:
        """The arguments of `ldm fit` by stage."""
        facts, shape, trainer = self.facts, self.shape, ["-c", "trainer/cpu.yaml"]
        if self.machine.device == "cuda":
            trainer += ["-c", "trainer/gpu.yaml"]
        data = ["-c", "data/folder.yaml", "--data.path", facts.path, "--data.size", str(shape.size)]
        losses = ["-c", "losses/perceptual.yaml"] if shape.perceptual else []
        first = ["--data.batch_size", str(FIRST_BATCH), *_steps(self.first_steps)]
        if shape.multipliers != (1,):
            first += ["--model.autoencoder.multipliers", str(list(shape.multipliers)).replace(" ", "")]
        second = ["--data.batch_size", str(SECOND_BATCH), *_steps(self.second_steps), "--model.network.channels", str(shape.width)]
        if self._latents_fit:
            second += ["--data.cache_on", "memory"]
        if shape.side > 32:  # Eq. 23, arXiv:2403.03206
            second += [
                "--model.schedule",
                "Shifted",
                "--model.schedule.schedule",
                "LDMSchedule",
                "--model.schedule.factor",
                f"{shape.side / 32:g}",
            ]
        if shape.start is not None:
            first += ["--model.init", shape.start]
            second += [] if self.text_encoder else ["--model.init", shape.start]
        if self.text_encoder is not None:
            second += ["--model.conditioner", "Text", "--model.conditioner.encoder", self.text_encoder]
        return {
            "autoencoder": ["fit", *trainer, *data[:2], "-c", "autoencoder/emoji.yaml", *losses, *data[2:], *first, "--run", run],
            "diffusion": ["fit", *trainer, *data[:2], "-c", "diffusion/emoji.yaml", *data[2:], *second, "--run", run],
        }

    @property
    def _latents_fit(self) -> bool:
        """Whether all moments, of mirror images too, take less than a quarter of the memory."""
        return self.facts.images * 2 * 2 * LATENT_CHANNELS * self.shape.side**2 * 2 < self.machine.memory / 4


def _steps(steps: int) -> list[str]:
    every = max(1, steps // VALIDATIONS)
    return ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(every)]


def plan(facts: Facts, machine: Machine, measure: Measure, hours: float | None = None, text_encoder: str | None = None) -> Plan:
    """Choose everything for so many hours; None: for as long as is sensible.  The largest size is taken for which the time suffices.

    UserError where the pictures are too small, or the time too short for a few steps.
    """
    if hours is not None and not LEAST_HOURS <= hours <= 24 * 365:
        raise UserError(f"--hours is {hours:g}; allowed is {LEAST_HOURS:g} or more")
    allowed = [size for size in SIZES if size <= facts.side * 1.1] or [max(8, int(facts.side) // 8 * 8)]
    if facts.side < 8:
        raise UserError(f"the pictures' shorter sides have a median of {facts.side:g} px; at least 8 are needed")
    # a step with the perceptual network takes four times as long on a CPU
    affordable = machine.device == "cuda" or hours is None or hours >= LEAST_PERCEPTUAL
    perceptual, found = machine.perceptual and facts.channels == 3 and affordable, None
    for size in allowed:
        shape = shape_of(size, facts, machine, perceptual)
        speed = measure(shape)
        made = _scheduled(facts, machine, shape, speed, hours, text_encoder)
        _, _, first, second = SIZES.get(size, SIZES[32])
        enough = made.first_steps * FIRST_BATCH >= first and made.second_steps * SECOND_BATCH >= second
        if found is None or enough:
            found = made
        if not enough or (hours is None and size >= (256 if machine.device == "cuda" else 64)):
            break
    assert found is not None
    return found


def shape_of(size: int, facts: Facts, machine: Machine, perceptual: bool) -> Shape:
    """The networks for pictures of a size: on a CPU those of the emoji model where these fit, from which they then start; larger on GPUs.

    That the emoji model knows edges, colours and noise saves most of the time that a small training has (docs/results.md).
    """
    factor, multipliers, _, _ = SIZES.get(size, SIZES[32])
    small = machine.device == "cpu"
    start = "emoji" if small and (factor, multipliers, facts.channels) == (4, [1], 3) else None
    return Shape(size, facts.channels, factor, tuple(multipliers), 60 if small else 128, start, perceptual)


def _scheduled(facts: Facts, machine: Machine, shape: Shape, speed: Speed, hours: float | None, text_encoder: str | None) -> Plan:
    """So many steps as fit into the time."""
    if hours is None:
        images = min(ENOUGH, MOST_EPOCHS * facts.images)
        seconds = images / SECOND_BATCH * speed.second / (1 - FIRST_SHARE) / (1 - LAST_SHARE) + 2 * START
        hours = min(MOST_HOURS, max(LEAST_HOURS, seconds / 3600))
    seconds = hours * 3600 * (1 - LAST_SHARE) - 2 * START - _encoding(facts, speed)
    first, second = int(FIRST_SHARE * seconds / speed.first), int((1 - FIRST_SHARE) * seconds / speed.second)
    if min(first, second) < VALIDATIONS:
        raise UserError(f"{hours:g} hours are {max(0, first)} and {max(0, second)} steps on this machine: give more --hours")
    return Plan(facts, machine, shape, speed, hours, first, second, text_encoder)


def _encoding(facts: Facts, speed: Speed) -> float:
    """Seconds: forward only, but of mirror images too."""
    return facts.images * speed.first / FIRST_BATCH / 2


def after_first(found: Plan, spent: float, stage: float, now: Speed) -> Plan:
    """The plan with as many steps of stage 2 as fit into what is left of the time when stage 1 has ended.

    spent: seconds since the start; stage: those of stage 1 among them, which say how much a stage takes besides its steps; now: the speed
    measured again, as others may use the machine, or have stopped.
    """
    slower = min(MOST_BESIDE, max(1.0, (stage - START) / found.first_steps / max(found.speed.first, now.first)))
    left = found.hours * 3600 * (1 - LAST_SHARE) - spent - START - slower * _encoding(found.facts, now)
    return replace(found, speed=now, second_steps=max(VALIDATIONS, int(left / (slower * now.second))))


def described(found: Plan) -> list[str]:
    """What was chosen and why, in sentences."""
    shape, machine, speed = found.shape, found.machine, found.speed
    first, second = found.seconds
    where = _counted(machine.devices, "GPU") + " (bf16)" if machine.device == "cuda" else _counted(machine.cores, "core")
    condition = "the captions" if found.text_encoder else f"{found.facts.classes} classes" if found.facts.classes else "no condition"
    return [
        f"trains {found.hours:.2g} hours on {where}: {first / 60:.1f} minutes for the autoencoder ({found.first_steps:,} steps of "
        f"{FIRST_BATCH} images), {second / 60:.1f} for the diffusion model ({found.second_steps:,} steps of {SECOND_BATCH}), the rest to "
        "encode, choose and show",
        f"pictures of {shape.size} px -> latents {shape.side}x{shape.side}x{LATENT_CHANNELS} -> a UNet {shape.width} wide, told "
        f"{condition}{f', both starting from the model {shape.start}' if shape.start else ''}; "
        f"measured: {1 / speed.first:.1f} and {1 / speed.second:.1f} steps a second",
    ]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def from_data(data: dict[str, Any]) -> Plan:
    """The plan of a run's folder, of what dataclasses.asdict made of it."""
    shape = Shape(**{**data["shape"], "multipliers": tuple(data["shape"]["multipliers"])})
    facts = Facts(**{**data["facts"], "sentences": tuple(data["facts"]["sentences"])})
    rest = {name: data[name] for name in ("hours", "first_steps", "second_steps", "text_encoder")}
    return Plan(facts, Machine(**data["machine"]), shape, Speed(**data["speed"]), **rest)
