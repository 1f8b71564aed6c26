"""What every logger gets of a run: its configuration and origin, and how it trains."""

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch.utils.flop_counter import FlopCounterMode

from ldm import model_folder
from ldm.callbacks.compile import Compile
from ldm.callbacks.ema import EMA
from ldm.callbacks.loggers import CSVLog, WandbLog, wandb_may_fail
from ldm.data.report import sentences
from ldm.interfaces import Autoencoder
from ldm.stages.training import logs_now

PACKAGES = ("ldm", "torch", "torchvision", "lightning", "numpy", "pillow", "safetensors", "wandb")
# dense bf16 FLOP/s by the device's name, from NVIDIA's data sheets; MFU (arXiv:2204.02311, appendix B) is not logged for others
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}


class Tracking(L.Callback):
    """Configuration, git state, versions and hashes to all loggers at the start, and every log_every_n_steps: learning rates, images per
    second, the share of time that training waits for data, memory, model FLOP utilisation, the average's decay.

    W&B gets the model folder as an artifact at the end, whose lineage are the data and the models that it is made from.  List it after EMA.
    model: the folder that ModelFolder writes.
    """

    def __init__(self, model: str | None = None) -> None:
        self.model = model
        self._images, self._batches, self._waited, self._since, self._ended = 0, 0, 0.0, 0.0, 0.0
        self._flops: float | None = None  # of a step of one process
        self._counter: FlopCounterMode | None = None
        self._made_of: dict[str, Any] = {}
        self._wandb_id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"wandb_id": self._wandb_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._wandb_id = state_dict["wandb_id"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLog):
                    logger.known_id = self._wandb_id
                    self._wandb_id = logger.experiment.id
            self._log(trainer, {**getattr(pl_module, "settings", {}), "origin": origin(trainer)})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the first stage is loaded and the latents are cached."""
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.begin(trainer.global_step)
        if trainer.is_global_zero:
            self._made_of = made_of(trainer, pl_module)  # hashing the data and the first stage takes a while
            self._log(trainer, {"made_of": self._made_of})
            self._lineage(trainer, pl_module)
        self._since = self._ended = time.monotonic()

    @staticmethod
    def _log(trainer: L.Trainer, facts: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(facts)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._waited += time.monotonic() - self._ended
        if self._flops is None and self._peak(trainer) and not any(isinstance(one, Compile) for one in trainer.callbacks):  # type: ignore[attr-defined]
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._flops, self._counter = float(self._counter.get_total_flops()), None
        self._images, self._batches = self._images + len(batch["id"]) * trainer.world_size, self._batches + 1
        now = time.monotonic()
        if logs_now(trainer):
            pl_module.log_dict(self._numbers(trainer, now), batch_size=1)
            self._images, self._batches, self._waited, self._since = 0, 0, 0.0, now
        self._ended = now

    def _numbers(self, trainer: L.Trainer, now: float) -> dict[str, float]:
        seconds = max(now - self._since, 1e-9)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        found = {"train/lr" if i == 0 else f"train/lr_{i}": float(rate) for i, rate in enumerate(rates)}
        found |= {"time/images_per_second": self._images / seconds, "time/waits_for_data": min(1.0, self._waited / seconds)}
        if trainer.strategy.root_device.type == "cuda":
            found["memory/gpu_GB"] = torch.cuda.max_memory_allocated() / 1e9
        found["memory/host_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        if self._flops and (peak := self._peak(trainer)):
            found["time/model_flop_utilisation"] = self._flops * self._batches / seconds / peak
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA):
                found["train/ema_decay"] = callback.decay_at(trainer.global_step)
        return found

    @staticmethod
    def _peak(trainer: L.Trainer) -> float | None:
        name = device_name(trainer)
        return next((peak for part, peak in PEAKS.items() if part in name.split()), None)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The time of a validation is none of training."""
        self._images, self._batches, self._waited, self._since = 0, 0, 0.0, time.monotonic()
        self._ended = self._since

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """ModelFolder has written by now."""
        if not trainer.is_global_zero or self.model is None or not (Path(self.model) / model_folder.CONFIG).is_file():
            return
        facts = {"steps": trainer.global_step, **(self._made_of or made_of(trainer, pl_module))}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                if isinstance(stored := model_folder.load(self.model).model, Autoencoder):  # what stage 2 will call its first stage
                    facts["model_fingerprint"] = model_folder.fingerprint(stored)
                logger.experiment.log_artifact(as_artifact(Path(self.model), facts))

    def _lineage(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What this run is made from becomes its input in W&B: the data, by their fingerprint, and the models of made_from.

        An artifact of the same files is there once, so that the model which stage 1 logged is the one that stage 2 uses.  run.use_artifact
        would wait for the server and refuses offline; what it calls does neither.
        """
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                with wandb_may_fail("record what this run is made from"):
                    for used in inputs(self._made_of, getattr(pl_module, "made_from", ())):
                        logger.experiment._log_artifact(used, is_user_created=True, use_after_commit=True)


def as_artifact(folder: Path, facts: dict[str, Any]) -> wandb.Artifact:
    """A model folder, or a checkpoint, under the name of its run and stage, such as `mine-autoencoder`."""
    parts = folder.resolve().parts
    name = "-".join(parts[-3:-1] if folder.name == "model" else parts[-1:])
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-128:], "model", metadata=facts)  # what W&B allows as a name
    if folder.is_dir():
        artifact.add_dir(str(folder))
    else:
        artifact.add_reference(folder.resolve().as_uri())  # a checkpoint is not copied to W&B
    return artifact


def inputs(made_of: dict[str, Any], models: Sequence[str]) -> Iterator[wandb.Artifact]:
    """Data and models that a run is made from."""
    if "data_fingerprint" in made_of:
        data = wandb.Artifact(f"data-{made_of['data_fingerprint'][:12]}", "dataset", metadata={"data": made_of["data"]})
        with data.new_file("data.json") as file:  # what the data hold, not the data
            json.dump({name: made_of[name] for name in ("data", "data_fingerprint")}, file)
        yield data
    for path in models:
        yield as_artifact(model_folder.find(path), {})


def origin(trainer: L.Trainer) -> dict[str, Any]:
    """Code, machine and command of a run."""
    return {
        "command": " ".join(sys.argv),
        "git": git_state(),
        "python": sys.version.split()[0],
        "versions": {package: version(package) for package in PACKAGES},
        "device": device_name(trainer),
        "processes": trainer.world_size,
    }


def device_name(trainer: L.Trainer) -> str:
    """Such as `NVIDIA H100 80GB HBM3`, or cpu."""
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_state() -> dict[str, Any] | None:
    """Commit of the repository in which the command runs, and whether it has changes; None outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def made_of(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """Hashes of what a model is trained on: the data and what they hold, the latent cache, the first stage."""
    data: Any = getattr(trainer, "datamodule", None)
    found: dict[str, Any] = {}
    if data is not None and hasattr(data, "sets"):
        train, held_out = data.sets
        found = {"data": " ".join(sentences(train, held_out)), "data_fingerprint": train.images.fingerprint()}
        found |= {"latent_cache": train.cache.key} if getattr(train, "cache", None) is not None else {}
    model: Any = pl_module.model
    if hasattr(model, "latents"):
        found["first_stage_fingerprint"] = model_folder.fingerprint(model.latents.autoencoder)
    return found
