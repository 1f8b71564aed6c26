"""What a stage derives from the data and from its other parts, so that nobody has to say it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ldm.conditioning.label import ClassLabel, Unconditional
from ldm.conditioning.numbers import Numbers
from ldm.interfaces import Autoencoder, Conditioner, Factory, Network, TrainingData, argument, built
from ldm.latents.clips import FrameStack

LEAST_CLASS_DIM = 64  # of the vectors of classes; otherwise they are as wide as the network
COND_DROP_PROB = 0.1  # arXiv:2207.12598 finds 0.1 and 0.2 alike


def facts(data: TrainingData | None) -> dict[str, Any]:
    """What the data say of a conditioner's arguments."""
    if data is None:
        return {}
    ranges = {name: bounds for name, bounds in data.ranges.items() if bounds[0] < bounds[1]}
    return {"num_classes": len(data.classes) or None, "ranges": ranges or None}


def conditioner_of(data: TrainingData | None, network: Factory[Network] | Network) -> Factory[Conditioner]:
    """Classes where the data have them, else numbers, else nothing; both at once would be asked for one without the other."""
    if data is not None and data.classes:
        width = argument(network, "channels") or argument(network, "dim") or 0
        return partial(ClassLabel, dim=max(LEAST_CLASS_DIM, width))
    return Numbers if data is not None and facts(data)["ranges"] else Unconditional


def unused(data: TrainingData, conditioner: Conditioner) -> str:
    """What the data say of their images and a conditioner does not take, in words; empty where that is nothing."""
    found = {
        f"the {len(data.classes)} classes": bool(data.classes) and not conditioner.num_classes,
        "the captions (take them with --model.conditioner Text)": data.has_texts and not conditioner.takes_text,
    }
    rest = [name for name in data.ranges if name not in conditioner.numbers]
    numbers = [f"the numbers {', '.join(rest[:6])}{' ...' if len(rest) > 6 else ''} (--model.conditioner Numbers)"] if rest else []
    return ", ".join([what for what, there in found.items() if there] + numbers)


def parts_of_stage_2(
    autoencoder: Autoencoder, network: Factory[Network] | Network, conditioner: Factory[Conditioner] | Conditioner | None,
    data: TrainingData | None,
) -> tuple[Autoencoder, Network, Conditioner]:  # fmt: skip
    """The autoencoder, of clips where these are trained, the network and the conditioner, with the numbers that follow."""
    frames = data.frames if data is not None else int(argument(network, "frames", 1))
    channels = autoencoder.channels // (autoencoder.frames if isinstance(autoencoder, FrameStack) else 1)
    chosen = conditioner_of(data, network) if conditioner is None else conditioner
    condition = built(chosen, **facts(data), channels=channels, frames=frames)
    widths: Mapping[str, int] = {"vector_dim": condition.vector_dim, "token_dim": condition.token_dim}
    made = built(network, in_channels=channels, **widths, concat_channels=condition.concat_channels // frames, frames=frames)
    if made.frames > 1 and not isinstance(autoencoder, FrameStack):
        autoencoder = FrameStack(autoencoder, made.frames)
    return autoencoder, made, condition
