"""fit, validate, test, encode: one LightningCLI for both stages."""

import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ldm import registry
from ldm.callbacks.checkpoints import ANY, LAST, Checkpoints, ModelFolder
from ldm.callbacks.ema import EMA
from ldm.callbacks.loggers import WandbLog
from ldm.callbacks.overfitting import Best
from ldm.callbacks.power_ema import PowerEMA
from ldm.callbacks.show import Pictures
from ldm.console.lightning import PARSER, of_worker, plain_errors, quiet
from ldm.console.shorten import IMAGES, limit, training_options
from ldm.data.module import ImageData
from ldm.errors import UserError
from ldm.files import newest_first, write_atomically
from ldm.run_folder import CHECKPOINTS, CONFIG, RunFolder
from ldm.stages.autoencoder import AutoencoderStage
from ldm.stages.diffusion import DiffusionStage

SUMMED_UP = ("train/loss", "val/loss", "val/fd", "val/psnr", "val/ssim", "val/reconstruction", "val/accuracy", "train/skipped_steps")
WRITERS = (Checkpoints, ModelFolder, Pictures, Best, PowerEMA)  # callbacks that a dry run and a measurement do without


class CLI(LightningCLI):
    """trainer + model + data, and `run`: the folder in which everything of a run lies."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="runs/default", help="folder of this run; configs refer to it as ${run}")
        parser.link_arguments("data", "model.init_args.data", apply_on="instantiate")
        goes_on = "checkpoint to go on from: a file, `last` or `best` of this run, or `auto`: the last one if there is one"
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=goes_on)
        parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run, which is removed")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Without the progress bars of the configs where --trainer.enable_progress_bar is false, which Lightning refuses to combine."""
        settings = self.config_init.trainer
        if settings.get("enable_progress_bar") is False:
            settings.callbacks = [one for one in settings.callbacks or [] if not isinstance(one, ProgressBar)]
        return super().instantiate_trainer(**kwargs)

    @property
    def folder(self) -> RunFolder:
        """Of the stage."""
        return RunFolder(self.trainer.default_root_dir)

    @property
    def settings(self) -> dict[str, Any]:
        """The whole configuration as plain data, in which paths below the run's folder begin with ${run}."""
        self._dump_config()
        run = str(self.config.run)

        def kept(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: kept(item) for key, item in value.items()}
            if isinstance(value, list):
                return [kept(item) for item in value]
            below = isinstance(value, str) and (value == run or value.startswith(f"{run}/"))
            return f"${{run}}{value[len(run) :]}" if below else value

        found = {name: value for name, value in self.config_dump.items() if name not in ("run", "ckpt_path", "overwrite", "config")}
        return dict(kept(found))


def parse(arguments: list[str]) -> CLI:
    """Trainer, model and data from a command line whose config files are paths (console.configs.find_configs)."""
    registry.load()  # a YAML file may name every part by its short class name
    with plain_errors():
        return CLI(
            L.LightningModule,
            ImageData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # `fit` writes it
            parser_kwargs={**PARSER, "prog": "ldm", "usage": "ldm COMMAND [-c FILE ...] [--OPTION VALUE ...]"},
            run=False,
            args=[*arguments, *training_options()],
            seed_everything_default=0,
            auto_configure_optimizers=False,  # the stages do
        )


def checkpoint_path(cli: CLI) -> Path | None:
    """The checkpoint that --ckpt_path means; None: to start anew."""
    given, folder = cli.config.ckpt_path, cli.folder.path / CHECKPOINTS
    if given is None:
        return None
    path = folder / f"{given}.ckpt" if given in ("last", "best") else folder / LAST if given == "auto" else Path(given).expanduser()
    if path.is_file():
        return path
    if given == "auto":  # a process that is killed at its first checkpoint leaves one without that name
        return next(iter(newest_first(folder, ANY)), None)
    raise UserError(f"there is no checkpoint {str(path)!r} to go on from: leave --ckpt_path out to start anew, or give `auto`")


def require_writable(folder: Path, option: str = "--run") -> None:
    """Fails now rather than after an hour of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r} ({error.strerror}): choose another {option}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {str(folder)!r}: choose another {option}")


def fit(cli: CLI) -> int:
    """Train; where a run lies in the folder already, only on its own checkpoint or with --overwrite."""
    path, folder, trainer = checkpoint_path(cli), cli.folder, cli.trainer
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        _leave_out_writers(cli)
        return _fit(cli, path)
    own = path is not None and folder.path.resolve() in path.resolve().parents
    if own and cli.config.overwrite:
        raise UserError(f"--ckpt_path goes on from {path}, --overwrite removes it to start anew: give one of them")
    if not own and not cli.config.overwrite:
        folder.require_free("fit")
    if (rank_zero_only.rank or 0) > 0:  # type: ignore[attr-defined]
        return _fit(cli, path)  # the first process has the lock
    with folder.owned("fit"):
        if cli.config.overwrite:
            folder.set_aside()
        trainer.callbacks.insert(0, Beginning(cli))  # type: ignore[attr-defined]
        try:
            return _fit(cli, path)
        finally:
            folder.restore()


class Beginning(L.Callback):
    """Takes a run's folder when model, data and checkpoint are found to be good: what is refused before changes nothing."""

    def __init__(self, cli: CLI) -> None:
        self.cli = cli

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = self.cli.folder
        if self.cli.config.overwrite:
            folder.clear()
        saved = {"run": str(self.cli.config.run), **self.cli.model.settings}
        write_atomically(folder.path / CONFIG, yaml.safe_dump(saved, sort_keys=False, allow_unicode=True).encode())


def _leave_out_writers(cli: CLI) -> None:
    cli.trainer.callbacks = [one for one in cli.trainer.callbacks if not isinstance(one, WRITERS)]  # type: ignore[attr-defined]


def _fit(cli: CLI, path: Path | None) -> int:
    for logger in cli.trainer.loggers:
        if isinstance(logger, WandbLog):
            logger.goes_on = path is not None
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=None if path is None else str(path))
    if cli.trainer.is_global_zero:
        found = cli.trainer.callback_metrics.items()
        metrics = {name: round(float(value), 4) for name, value in found if name.startswith(SUMMED_UP)}
        written = any(isinstance(one, ModelFolder) and one.written for one in cli.trainer.callbacks)  # type: ignore[attr-defined]
        kept = f"the model is in {cli.folder.path / 'model'}" if written else "no model is written, as there is no callback ModelFolder"
        dry = "nothing is kept, as it was a dry run"
        print(f"step {cli.trainer.global_step}, {json.dumps(metrics)}\n{dry if cli.trainer.fast_dev_run else kept}")  # type: ignore[attr-defined]
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
        print(f"{latents.facts[0]} images of {cli.datamodule.size} px encoded into {cli.datamodule.cache}")
        print(f"latents {latents.facts[1:]}: mean {latents.shift.tolist()}, std {latents.scale.tolist()}")
    return 0


def evaluate(cli: CLI, command: str) -> int:
    path = checkpoint_path(cli)
    if path is None and cli.config.model.init_args.get("init") is None:
        raise UserError(
            f"`{command}` needs a checkpoint: --ckpt_path FILE, `last` for this run's last one, or, in stage 1, --model.init MODEL"
        )
    cli.trainer.loggers = []  # a run's log is that of its training
    _leave_out_writers(cli)
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided")
    results = getattr(cli.trainer, command)(cli.model, cli.datamodule, ckpt_path=None if path is None else str(path))
    if cli.trainer.is_global_zero:
        target = cli.folder.path / f"{command}.json"
        facts = {**results[0], "n": len(cli.datamodule.sets[1]), "size": cli.datamodule.size}
        if isinstance(cli.model, AutoencoderStage):
            facts["made"] = [metric.made for metric in cli.model.metrics if metric.made]
        write_atomically(target, json.dumps(facts, indent=1).encode())
        print(f"written to {target}")
    return 0


def settle_trainer(trainer: Any) -> None:
    """UserError for what Lightning allows and ldm does not; validations come by epochs where that is asked for."""
    if sum(isinstance(one, EMA) for one in trainer.callbacks) > 1:
        raise UserError("trainer.callbacks has EMA twice: change the one in a copy of trainer/cpu.yaml, and give that with -c")
    if (precision := str(trainer.precision)).endswith("-true") and precision != "32-true":
        raise UserError(f"trainer.precision is {precision}; allowed are 32-true, bf16-mixed and 16-mixed")
    if isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch is not None:
        print(f"validations come with check_val_every_n_epoch, not every {trainer.val_check_interval} batches")
        trainer.val_check_interval = 1.0


def main(command: str, arguments: list[str]) -> int:
    quiet()
    action: Literal["fill", "check", "prune"] = "fill"
    if command == "encode":
        action = "check" if "--check" in arguments else "prune" if "--prune" in arguments else "fill"
        arguments = [one for one in arguments if one not in ("--check", "--prune")]
    try:
        cli = parse(arguments)
        require_writable(cli.folder.path)
        cli.model.settings = cli.settings
        cli.model.check(cli.datamodule)  # before loggers and devices are started
        if command in ("fit", "encode") and hasattr(cli.model.model, "latents") and cli.datamodule.cache is not None:
            require_writable(Path(cli.datamodule.cache), "--data.cache")
        if limit() is not None:
            for images in cli.datamodule.sets:
                images.indices = images.indices[:IMAGES]
        settle_trainer(cli.trainer)
        if command == "fit":
            return fit(cli)
        return encode(cli, action) if command == "encode" else evaluate(cli, command)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except UserError as error:
        raise UserError(of_worker(str(error))) from error
