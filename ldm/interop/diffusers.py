"""Autoencoders of diffusers (AutoencoderKL, VQModel) as ours, weight for weight."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ldm.autoencoder.bottleneck import KL, VQ
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.errors import UserError
from ldm.interfaces import Bottleneck

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = {
    "first.norm": "norm1", "first.conv": "conv1", "second.norm": "norm2", "second.conv": "conv2", "skip": "conv_shortcut",
    "norm": "group_norm", "out": "to_out.0", "conv": "conv",
}  # fmt: skip
STEADY = 1000.0  # uses per step that a code of theirs counts for: it moves only as the average forgets these
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # before diffusers 0.15


def load_autoencoder(folder: str | Path) -> ConvAutoencoder:
    """From a folder with config.json and diffusion_pytorch_model.safetensors."""
    folder = Path(folder)
    config, theirs = read(folder)
    try:
        model = build(config)
        renamed = dict(renaming(len(config["block_out_channels"]), config["layers_per_block"], attention_levels(config)))
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} is not that of an autoencoder of diffusers: it has no {error.args[0]}") from error
    for old, new in OLD_NAMES.items():
        theirs = {name.replace(old, new): tensor for name, tensor in theirs.items()}
    state, left = {}, dict(theirs)
    for name, ours in model.state_dict().items():
        if name.startswith("bottleneck."):
            state[name] = ours
            continue
        wanted = find(name, renamed)
        if missing := [key for key in wanted if key not in theirs]:
            raise UserError(f"{folder / WEIGHTS} has no {missing[0]}: it does not fit the config.json beside it")
        found = torch.cat([theirs[key] for key in wanted])
        state[name] = fitting(found, ours, wanted[0], folder).reshape(ours.shape)
        for key in wanted:
            left.pop(key, None)
    if isinstance(model.bottleneck, VQ) and (codes := left.pop("quantize.embedding.weight", None)) is not None:
        codes = fitting(codes, model.bottleneck.values, "quantize.embedding.weight", folder)
        often = torch.full_like(model.bottleneck.used, STEADY)
        state |= {"bottleneck.values": codes, "bottleneck.used": often, "bottleneck.sums": STEADY * codes}
    if left:
        raise UserError(
            f"{folder / WEIGHTS} has {min(left)}, of which the config.json beside it does not speak: they do not belong together"
        )
    model.load_state_dict(state)
    return model.eval()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights."""
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} is not an autoencoder of diffusers: it has no {name}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error
    try:
        return config, safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from error


def fitting(found: Tensor, ours: Tensor, name: str, folder: Path) -> Tensor:
    """found, which may be a matrix where ours is a convolution of one pixel, or the other way round."""
    a, b = ([size for size in tensor.shape if size > 1] for tensor in (found, ours))
    if a != b:
        raise UserError(f"{folder / WEIGHTS} has {name} of shape {list(found.shape)}, but its config.json asks for {list(ours.shape)}")
    return found


def attention_levels(config: dict[str, Any]) -> list[int]:
    return [level for level, name in enumerate(config["down_block_types"]) if name.startswith("Attn")]


def build(config: dict[str, Any]) -> ConvAutoencoder:
    """Ours of the same shape as theirs with this config.json."""
    known = {"act_fn": "silu", "norm_num_groups": 32, "mid_block_add_attention": True}
    for name, value in known.items():
        if config.get(name, value) != value:
            raise UserError(f"this autoencoder has {name} = {config[name]!r}; only {value!r} can be imported")
    widths, latent = config["block_out_channels"], config["latent_channels"]
    if any(width % widths[0] for width in widths):
        raise UserError(f"this autoencoder's widths are {widths}; only multiples of the first can be imported")
    bottleneck: Bottleneck
    if config["_class_name"] == "AutoencoderKL":
        bottleneck = KL(latent)
    elif config["_class_name"] == "VQModel" and config.get("vq_embed_dim") in (None, latent):
        bottleneck = VQ(latent, config["num_vq_embeddings"])
    else:
        kind = config["_class_name"]
        raise UserError(f"a {kind} of this kind cannot be imported; AutoencoderKL and VQModel (vq_embed_dim = latent_channels) can")
    multipliers, convs = [width // widths[0] for width in widths], config.get("use_quant_conv", True)
    arguments = {"image_channels": config["in_channels"], "quant_conv": convs}
    return ConvAutoencoder(bottleneck, widths[0], multipliers, config["layers_per_block"], attention_levels(config), **arguments)


def renaming(levels: int, num_blocks: int, attended: list[int]) -> Iterator[tuple[str, str]]:
    """(our module, their module), for all that are not named alike."""
    for side, stem, order in (("encoder", "down", range(levels)), ("decoder", "up", reversed(range(levels)))):
        yield f"{side}.stem", f"{side}.conv_in"
        yield f"{side}.head.norm", f"{side}.conv_norm_out"
        yield f"{side}.head.conv", f"{side}.conv_out"
        position = 0 if side == "encoder" else 1  # the decoder begins with the middle
        for block, level in enumerate(order):
            for layer in range(num_blocks + (side == "decoder")):
                kinds = ["resnets", "attentions"] if level in attended else ["resnets"]
                for kind in kinds:
                    yield f"{side}.layers.{position}", f"{side}.{stem}_blocks.{block}.{kind}.{layer}"
                    position += 1
            if block < levels - 1:
                yield f"{side}.layers.{position}", f"{side}.{stem}_blocks.{block}.{stem}samplers.0"
                position += 1
        middle = position if side == "encoder" else 0
        for place, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            yield f"{side}.layers.{middle}.{place}", f"{side}.mid_block.{name}"


def find(name: str, renamed: dict[str, str]) -> list[str]:
    """What they call the tensor that is called `name` here; several are one after the other."""
    module, kind = name.rsplit(".", 1)
    ours = max((key for key in renamed if f"{module}.".startswith(f"{key}.")), key=len, default=None)
    if ours is None:
        return [name]  # quant_conv, post_quant_conv
    if ours == module:
        return [f"{renamed[ours]}.{kind}"]
    part = module.removeprefix(f"{ours}.")
    return [f"{renamed[ours]}.{n}.{kind}" for n in (("to_q", "to_k", "to_v") if part == "qkv" else (NAMES[part],))]
