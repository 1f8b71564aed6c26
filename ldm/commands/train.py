"""fit, validate, test, encode: one LightningCLI for both stages."""

import json
import os
import sys
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ldm import registry
from ldm.callbacks.checkpoints import Stopped
from ldm.console.configs import find_configs
from ldm.console.lightning import PARSER, of_worker, plain_errors, quiet
from ldm.console.shorten import IMAGES, limit, training_options
from ldm.data.module import ImageData
from ldm.errors import UserError
from ldm.stages.autoencoder import AutoencoderStage
from ldm.stages.diffusion import DiffusionStage


class CLI(LightningCLI):
    """trainer + model + data, and `run`: the folder in which everything of a run lies."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="runs/default", help="folder of this run; configs refer to it as ${run}")
        parser.link_arguments("data", "model.init_args.data", apply_on="instantiate")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to go on from, or `last` or `best` of this run")


def parse(arguments: list[str]) -> CLI:
    """Trainer, model and data from the command line and config files."""
    registry.load()  # a YAML file may name every part by its short class name
    with plain_errors():
        return CLI(
            L.LightningModule,
            ImageData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={**PARSER, "prog": "ldm", "usage": "ldm COMMAND [-c FILE ...] [--OPTION VALUE ...]"},
            run=False,
            args=[*find_configs(arguments), *training_options()],
            seed_everything_default=0,
        )


def checkpoint_path(cli: CLI) -> str | None:
    given = cli.config.ckpt_path
    named = Path(cli.trainer.default_root_dir) / "checkpoints" / f"{given}.ckpt"
    path = named if given in ("last", "best") else given
    if path is not None and not Path(path).is_file():
        raise UserError(f"there is no checkpoint {str(path)!r} to go on from: leave --ckpt_path out to start anew")
    return None if path is None else str(path)


def require_writable(folder: Path) -> None:
    """Fails now rather than after an hour of training."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {str(folder)!r}: choose another --run")


def fit(cli: CLI) -> int:
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint_path(cli))
    except Stopped as stop:
        print(f"stopped at step {cli.trainer.global_step}; the same command with --ckpt_path last goes on from there", file=sys.stderr)
        return int(stop.code or 1)
    if cli.trainer.is_global_zero:
        found = cli.trainer.callback_metrics.items()
        metrics = {name: round(float(value), 4) for name, value in found if "/latent_" not in name}
        print(f"step {cli.trainer.global_step}, {json.dumps(metrics)}\nthe model is in {Path(cli.trainer.default_root_dir) / 'model'}")
    return 0


def encode(cli: CLI, action: Literal["fill", "check", "prune"]) -> int:
    """fit without a step: `on_fit_start` writes the cache, or checks it, or removes others as well."""
    if not isinstance(cli.model, DiffusionStage):
        raise UserError("`encode` takes the configs of stage 2 (model DiffusionStage), whose first_stage encodes")
    if cli.datamodule.cache is None:
        raise UserError("`encode` needs a folder for the latents: set --data.cache")
    if cli.datamodule.varies:
        raise UserError("latents of images that differ in every epoch, or in size, cannot be kept: leave out data.crop and data.augment")
    cli.datamodule.cache_action = action
    cli.trainer.limit_train_batches = 0
    cli.trainer.fit(cli.model, cli.datamodule)
    if cli.trainer.is_global_zero and action != "check":
        latents = cli.model.model.latents
        print(f"{int(latents.count)} images of {cli.datamodule.size} px encoded into {cli.datamodule.cache}")
        print(f"latents {tuple(latents.size.tolist())}: mean {latents.shift.tolist()}, std {latents.scale.tolist()}")
    return 0


def evaluate(cli: CLI, command: str) -> int:
    path = checkpoint_path(cli)
    if path is None and cli.config.model.init_args.get("init") is None:
        raise UserError(
            f"`{command}` needs a checkpoint: --ckpt_path FILE, `last` for this run's last one, or, in stage 1, --model.init MODEL"
        )
    results = getattr(cli.trainer, command)(cli.model, cli.datamodule, ckpt_path=path)
    if cli.trainer.is_global_zero:
        target = Path(cli.trainer.default_root_dir) / f"{command}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        facts = {**results[0], "n": len(cli.datamodule.sets[1]), "size": cli.datamodule.size}
        if isinstance(cli.model, AutoencoderStage):
            facts["made"] = [metric.made for metric in cli.model.metrics if metric.made]
        target.write_text(json.dumps(facts, indent=1))
        print(f"written to {target}")
    return 0


def main(command: str, arguments: list[str]) -> int:
    quiet()
    action: Literal["fill", "check", "prune"] = "fill"
    if command == "encode":
        action = "check" if "--check" in arguments else "prune" if "--prune" in arguments else "fill"
        arguments = [one for one in arguments if one not in ("--check", "--prune")]
    try:
        cli = parse(arguments)
        require_writable(Path(cli.trainer.default_root_dir))
        cli.model.check(cli.datamodule)  # before loggers and devices are started
        if limit() is not None:
            for images in cli.datamodule.sets:
                images.indices = images.indices[:IMAGES]
        if (precision := str(cli.trainer.precision)).endswith("-true") and precision != "32-true":
            raise UserError(f"trainer.precision is {precision}; allowed are 32-true, bf16-mixed and 16-mixed")
        if command == "fit":
            return fit(cli)
        return encode(cli, action) if command == "encode" else evaluate(cli, command)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except UserError as error:
        raise UserError(of_worker(str(error))) from error
