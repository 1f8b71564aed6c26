"""fit, validate, test, encode: one LightningCLI for both stages."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# Every part that a YAML file may name by its short class name has to be imported before the file is read.
import ldm.autoencoder.kl
import ldm.callbacks.checkpoints
import ldm.callbacks.ema
import ldm.callbacks.show
import ldm.conditioning.label
import ldm.diffusion.guidance
import ldm.diffusion.objective
import ldm.diffusion.samplers
import ldm.diffusion.schedule
import ldm.nn.unet
import ldm.stages.autoencoder
import ldm.stages.diffusion  # noqa: F401
import lightning as L
from ldm.callbacks.checkpoints import GracefulStop
from ldm.data.module import ImageData
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

_PACKAGE = Path(__file__).parent.parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"  # installed, or a clone


class CLI(LightningCLI):
    """trainer + model + data, and `run`: the folder in which everything of a run lies."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="runs/default", help="folder of this run; configs refer to it as ${run}")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to go on from, or `last` of this run")


def find_configs(arguments: list[str]) -> list[str]:
    """-c data/digits.yaml: a file here, or one of those that come with the package."""
    found, expects_file = [], False
    for argument in arguments:
        name = argument.removeprefix("configs/")
        if expects_file and not Path(argument).exists() and (CONFIGS / name).is_file():
            argument = str(CONFIGS / name)
        elif expects_file and not Path(argument).exists():
            known = ", ".join(sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml")))
            raise ValueError(f"there is no config file {argument!r}; the package has {known}")
        found.append(argument)
        expects_file = argument in ("-c", "--config")
    return found


def parse(arguments: list[str]) -> CLI:
    """Builds trainer, model and data from the command line and config files."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        return CLI(
            L.LightningModule,
            ImageData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "allow_abbrev": False,
                "usage": "ldm COMMAND [-c FILE ...] [--OPTION VALUE ...]",
                "prog": "ldm",
            },
            run=False,
            args=find_configs(arguments),
            seed_everything_default=0,
        )
    except OmegaConfBaseException as error:
        raise ValueError(f"the configuration cannot be resolved: {error}") from error


def checkpoint_path(cli: CLI) -> str | None:
    given = cli.config.ckpt_path
    path = Path(cli.trainer.default_root_dir) / "checkpoints" / "last.ckpt" if given == "last" else given
    if path is not None and not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r} to go on from: leave --ckpt_path out to start anew")
    return None if path is None else str(path)


def require_writable(folder: Path) -> None:
    """Fails now rather than after an hour of training."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: choose another --run")


def fit(cli: CLI) -> int:
    root = Path(cli.trainer.default_root_dir)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint_path(cli))
    stop = next((c.received for c in cli.trainer.callbacks if isinstance(c, GracefulStop)), None)
    if stop:
        print(f"stopped at step {cli.trainer.global_step}; go on with the same command and --ckpt_path last")
        return 128 + stop
    if cli.trainer.is_global_zero:
        metrics = {k: round(float(v), 4) for k, v in cli.trainer.callback_metrics.items()}
        print(f"step {cli.trainer.global_step}, {json.dumps(metrics)}\nthe model is in {root / 'model'}")
    return 0


def encode(cli: CLI) -> int:
    """fit, stopped before its first step: `on_fit_start` has written the cache by then."""
    if getattr(cli.datamodule, "cache", None) is None:
        raise ValueError("`encode` needs a folder for the latents: set --data.cache")
    cli.trainer.fit_loop.epoch_loop.max_steps = 0
    cli.trainer.fit(cli.model, cli.datamodule)
    latents = getattr(cli.model.model, "latents", None)
    if latents is None:
        raise ValueError("`encode` takes the configs of a stage-2 model, whose first_stage encodes")
    if cli.trainer.is_global_zero:
        print(f"{int(latents.count)} images of {cli.datamodule.size} px encoded into {cli.datamodule.cache}")
        print(f"latents {tuple(latents.size.tolist())}: mean {latents.shift.tolist()}, std {latents.scale.tolist()}")
    return 0


def evaluate(cli: CLI, command: str) -> int:
    path = checkpoint_path(cli)
    if path is None:
        raise ValueError(f"`{command}` needs a checkpoint: --ckpt_path FILE, or `last` for this run's last one")
    results = getattr(cli.trainer, command)(cli.model, cli.datamodule, ckpt_path=path)
    if cli.trainer.is_global_zero:
        target = Path(cli.trainer.default_root_dir) / f"{command}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(results[0], indent=1))
        print(f"written to {target}")
    return 0


def main(command: str, arguments: list[str]) -> int:
    for noise in ("does not have many workers", "Checkpoint directory", "smaller than the logging interval", "use_reentrant", "mid-epoch", "lr_scheduler.step"):
        warnings.filterwarnings("ignore", f".*{noise}.*")
    cli = parse(arguments)
    require_writable(Path(cli.trainer.default_root_dir))
    if command == "fit":
        return fit(cli)
    return encode(cli) if command == "encode" else evaluate(cli, command)
