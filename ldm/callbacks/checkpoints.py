"""Checkpoints that survive crashes and signals, and the model folder at the end."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from ldm import model_folder
from ldm.callbacks.ema import EMA
from ldm.errors import Stopped, UserError
from ldm.files import newest_first, replacing
from ldm.signals import Signals

LAST, BROKEN, ANY = "last.ckpt", "exception.ckpt", "*.ckpt"
ASKED = 0.5  # seconds


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a crash never destroys the previous checkpoint; loads without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(Path(path)) as temporary, _Watched(temporary) as file:
            torch.save(checkpoint, file)  # type: ignore[arg-type]

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


class _Watched:
    """A file to write to; where the disk refuses, that is what is raised, not what torch.save makes of it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._file.close()
        finally:
            if self._error is not None:
                raise self._error


def read_checkpoint(path: Path, map_location: Any = None) -> dict[str, Any]:
    """The content of a checkpoint of `ldm fit`; no code in it is executed.

    UserError where it is none, or damaged; it names the newest whole one beside it.
    """
    try:
        found: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        if not _is_ours(found):
            raise TypeError
    except Exception as error:  # torch.load raises many kinds: zip, pickle, key, runtime
        whole = next((other for other in newest_first(path.parent, ANY) if other != path and _is_whole(other)), None)
        remedy = "leave --ckpt_path out to start anew" if whole is None else f"the newest whole one there is --ckpt_path {whole}"
        raise UserError(f"{path} is damaged, or no checkpoint of `ldm fit` ({type(error).__name__}): {remedy}") from error
    return found


# what a checkpoint has at least, by type
PARTS = {"state_dict": dict, "global_step": int, "pytorch-lightning_version": str, "loops": dict, "callbacks": dict}


def _is_ours(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(name), kind) for name, kind in PARTS.items())
        and found["global_step"] >= 0
        and found["pytorch-lightning_version"][:1].isdecimal()
    )


def _is_whole(path: Path) -> bool:
    try:
        return _is_ours(torch.load(path, map_location="meta", weights_only=True))
    except Exception:  # whatever it is, it is not whole
        return False


class Checkpoints(ModelCheckpoint):
    """Lightning's, but last.ckpt is the last step of a run whatever ends it, and going on from there is exact.

    A signal's is last.ckpt as well; what an exception interrupts goes into exception.ckpt, beside the last good one, unless there is
    none.  Weights that are not finite are not saved: UserError.
    """

    started, _saved = False, -1  # whether steps were made; the step of last.ckpt
    _loops: dict[str, Any]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.started = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps or trainer.should_stop or is_last_epoch(trainer):
            self._save(trainer)  # later, Lightning has begun the next epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.should_stop and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saved != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not (self.save_on_exception and self.started and self.dirpath and trainer.global_step):
            return
        if isinstance(exception, (Stopped, BrokenPipeError)):  # raised between two steps, on all ranks
            if self._saved != trainer.global_step:
                self._save(trainer)
        elif not isinstance(exception, (NotFinite, KeyboardInterrupt)) and trainer.is_global_zero:
            last = Path(self.dirpath) / LAST
            path = last.with_name(BROKEN) if last.is_file() else last
            require_finite(trainer, pl_module)
            # without the barrier of trainer.save_checkpoint, to which other ranks may never come
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(False), path)
            print(f"what was reached at step {trainer.global_step}, where this ended, is in {path}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the loops were when the last batch ended: a run that is stopped in a validation goes on from there."""
        self._loops = trainer.fit_loop.state_dict()
        for part in ("total", "current"):
            self._loops["epoch_loop.batch_progress"][part]["completed"] -= 1

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.validating and trainer.state.status == TrainerStatus.INTERRUPTED:
            checkpoint["loops"]["fit_loop"] = self._loops

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        require_finite(trainer, trainer.lightning_module)
        super()._save_checkpoint(trainer, filepath)

    def _save(self, trainer: L.Trainer) -> None:
        if self.save_last and self.dirpath is not None:
            require_finite(trainer, trainer.lightning_module)
            trainer.save_checkpoint(Path(self.dirpath) / LAST)
            self._saved = trainer.global_step


def is_last_epoch(trainer: L.Trainer) -> bool:
    """Whether this batch ends the last epoch of `max_epochs`."""
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


class NotFinite(UserError):
    """Weights that no checkpoint should hold."""


def require_finite(trainer: L.Trainer, module: L.LightningModule) -> None:
    """A NotFinite where a weight, or an average of one, is no number."""
    averaged = [t for callback in trainer.callbacks if isinstance(callback, EMA) for t in callback.averaged.values()]  # type: ignore[attr-defined]
    tensors = [t for t in (*module.state_dict().values(), *averaged) if t.is_floating_point() and t.numel()]
    if tensors and not bool(torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all()):
        raise NotFinite(
            f"the weights are not finite at step {trainer.global_step}: the last checkpoint stays as it was; go on from it with "
            "--ckpt_path last and a lower learning rate, or with precision 32-true or bf16-mixed"
        )


class LastValidation(L.Callback):
    """The last step, or epoch, is followed by a validation, whatever `val_check_interval` is."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = trainer.global_step == trainer.max_steps or is_last_epoch(trainer)
        if last and trainer.check_val_every_n_epoch is None:
            trainer.val_check_batch = trainer.fit_loop.epoch_loop.total_batch_idx + 1  # Lightning asks whether it divides this number


class GracefulStop(L.Callback):
    """A signal (ldm/signals.py) ends the run after an optimizer step, or a batch of a validation, with a checkpoint; a second Ctrl-C
    ends it at once.  Several ranks ask each other about every ASKED seconds of training, as each question waits for their GPUs.

    List it after EMA, so that the average has seen the step.
    """

    def __init__(self) -> None:
        self._signals = Signals()
        self._every, self._left, self._asked = 1, 1, time.monotonic()  # steps from question to question, until the next, its time

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals = Signals()
        self._signals.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        self._left -= 1
        if trainer.world_size == 1 or self._left <= 0:
            self._stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:  # fmt: skip
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer, pl_module)

    def _stop_if_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        number = self._signals.number
        if trainer.world_size > 1:  # all ranks stop at the same step, and ask after as many steps as the slowest of them
            now = time.monotonic()
            pace = min(2 * self._every, max(1, int(self._every * ASKED / max(now - self._asked, 1e-6))))
            told = torch.tensor([number, -pace], device=pl_module.device)
            number, pace = torch.as_tensor(trainer.strategy.reduce(told, reduce_op="max")).tolist()
            self._every, self._left, self._asked = -pace, -pace, now
        if number:
            there = f"stopped at step {trainer.global_step}; the same command with --ckpt_path last goes on from there"
            raise Stopped(number, there if trainer.is_global_zero else "")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        """Signals do what they did before the training."""
        self._signals.__exit__()


class ModelFolder(L.Callback):
    """Writes the model folder (averaged weights) when training has come to its end.

    A run that was ended between its last step and that makes up for its last validation when it goes on.
    """

    def __init__(self, path: str, half: bool = False) -> None:
        self.path, self.half, self.written = path, half, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's loop returns at once where no step is left, and asks no callback before the devices are given back."""
        loop = trainer.fit_loop

        def run() -> None:
            del loop.run  # Lightning's again
            begun = trainer.global_step
            loop.run()
            if not trainer.global_step == begun > 0:
                return
            if trainer.is_global_zero:
                of, end = (f" of {trainer.max_steps}", "max_steps") if 0 < trainer.max_steps <= begun else ("", "max_epochs or max_time")
                print(f"the run is at step {begun}{of}: nothing was left to train; raise --trainer.{end} to go on")
            if self._steps() != begun:
                trainer.validating = True
                loop.epoch_loop.val_loop.run()
                trainer.training = True

        loop.run = run  # type: ignore[method-assign]

    def _steps(self) -> int | None:
        """Of the model that is there; None: there is none, or a damaged one, which is written anew."""
        try:
            return model_folder.read_card(Path(self.path)).get("steps")
        except (UserError, OSError):
            return None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.written = True
        if trainer.is_global_zero:
            averaged = next((c.averaged for c in trainer.callbacks if isinstance(c, EMA)), {})  # type: ignore[attr-defined]
            stage: Any = pl_module
            model_folder.save(stage.model, self.path, stage.card(), averaged, self.half)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on from its last step trains nothing, and Lightning then leaves `on_train_end` out."""
        if not self.written and trainer.global_step > 0:
            self.on_train_end(trainer, pl_module)
