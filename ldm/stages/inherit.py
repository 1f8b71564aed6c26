"""What a model of stage 2 takes over from the one that it starts from."""

import torch
from torch import Tensor

from ldm import model_folder
from ldm.errors import UserError
from ldm.latents.model import LatentDiffusion
from ldm.stages.vocabulary import tables


def start_from(model: LatentDiffusion, path: str) -> tuple[list[str], dict[str, Tensor]] | None:
    """Its weights where they fit; input channels that only `model` has are zeros, and what mixes its frames does nothing, so that
    nothing changes at first.  Returns its classes and their tables, which fit by name alone."""
    loaded, frames = model_folder.load(path), model.denoiser.network.frames
    started = loaded.model
    if isinstance(started, LatentDiffusion) and started.denoiser.network.frames < frames:
        started.latents = started.latents.of_frames(frames)
    mine, theirs = model.state_dict(), started.state_dict()
    theirs |= _first_stage_asked_for(mine, theirs, path)
    for name, found in theirs.items():
        wanted = mine.get(name, found)
        if found.ndim > 1 and found.shape[1] < wanted.shape[1] and found[:, 0].shape == wanted[:, 0].shape:
            theirs[name] = torch.cat([found, torch.zeros_like(wanted[:, found.shape[1] :])], dim=1)
    classes = list(loaded.card.get("classes") or [])
    rows = {
        name: theirs[name] for name, has_null in tables(model).items() if name in theirs and len(theirs[name]) == len(classes) + has_null
    }
    theirs |= {name: mine[name] for name in rows if theirs[name].shape != mine[name].shape}
    new, unused = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    model_folder.load_weights(model, {**mine, **{name: theirs[name] for name in mine.keys() & theirs.keys()}}, path)
    if new or unused:
        print(f"started from {path}; not in it: {_some(new)}; not used of it: {_some(unused)}")
    return (classes, rows) if rows else None


def _first_stage_asked_for(mine: dict[str, Tensor], theirs: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The weights of the first stage that the user asked for, where `init` has another one.

    With another encoder the latents are others, too: their statistics stay unmeasured, and the network has to learn them.  UserError
    where they have another number of channels.
    """
    prefix = "latents.autoencoder."
    names = {name for state in (mine, theirs) for name in state if name.startswith(prefix)}
    other = {name for name in names if name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name].to(mine[name]))}
    decoder = {name for name in other if name.removeprefix(prefix).startswith(("decoder", "post_quant"))}
    channels = [len(state["latents.shift"]) for state in (mine, theirs)]
    if channels[0] != channels[1]:
        raise UserError(
            f"the first stage makes {channels[0]} latent channels, the network of init, {path}, works on {channels[1]}: "
            f"give --model.first_stage {path} to go on in its latents, or leave --model.init out"
        )
    if other - decoder:
        print(
            f"the autoencoder is that of first_stage, not that of {path}: its latents are measured anew, and the network has to learn them"
        )
        other |= {f"latents.{name}" for name in ("shift", "scale", "count", "size")}
    elif other:
        print(f"the decoder is that of first_stage, not that of {path}; their encoders are the same")
    for name in other - mine.keys():
        del theirs[name]
    return {name: mine[name] for name in other & mine.keys()}


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
