"""Where a run's numbers go: Weights & Biases, and one CSV file."""

import csv
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

ID = "wandb-id"  # file of a stage's folder
TIMEOUT = 30.0  # seconds that the server has to answer; WANDB_INIT_TIMEOUT overrides it


class WandbLog(WandbLogger):
    """Weights & Biases, which never decides whether a training runs.

    Offline without a key or a stored login (upload later with `wandb sync`), and where the server does not answer.  A training that goes
    on from a checkpoint goes on in its run, whose id lies in save_dir.  options: tags, group, notes, job_type, id, ... of wandb.init;
    group and job_type are else the run's and the stage's folder.
    """

    def __init__(self, project: str = "ldm", save_dir: str = ".", name: str | None = None, **options: Any) -> None:
        folder = Path(save_dir)
        usual = {"group": folder.parent.name or None, "job_type": folder.name or None}
        settings = wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", TIMEOUT)))
        offline = not _has_login()
        super().__init__(project=project, save_dir=save_dir, name=name, offline=offline, settings=settings, **{**usual, **options})
        del self._wandb_init["anonymous"]  # of which wandb says at each start that it does nothing
        self.known_id: str | None = None  # of the checkpoint, for where the file is not there
        self.goes_on = False  # whether the training does, from a checkpoint; `fit` says so

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            folder = Path(str(self.save_dir))
            folder.mkdir(parents=True, exist_ok=True)
            if "WANDB_RUN_ID" not in os.environ and self._wandb_init["id"] is None:  # which the agent of a sweep sets
                self._wandb_init["id"] = self._own_id(folder / ID)
            self._start()
        return self._experiment

    def _own_id(self, file: Path) -> str:
        if not (self.goes_on and file.is_file()):
            file.write_text((self.goes_on and self.known_id) or secrets.token_hex(4))
        return file.read_text().strip()

    def _start(self) -> None:
        for mode, instead in ((None, "this run is logged offline"), ("offline", "this run is not logged to it"), ("disabled", "")):
            if mode is not None:
                self._wandb_init["mode"], self._offline = mode, False
            try:
                super().experiment  # noqa: B018  starts it
                return
            except Exception as error:  # whatever it is: a network, a login, a folder, a wrong setting
                if mode == "disabled":
                    raise
                warnings.warn(f"W&B does not start ({' '.join(str(error).split())[:160]}): {instead}", stacklevel=2)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """With W&B's own step too, so that rows which a resumed run makes again are not shown twice."""
        self.experiment.log({**metrics, "trainer/global_step": step} if step is not None else dict(metrics), step=step)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        """Ends the run, so that the next stage of the same process has one of its own."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


@contextmanager
def wandb_may_fail(what: str) -> Iterator[None]:
    """W&B does not decide whether a training goes on: where it fails here, a warning says `what` it does not do."""
    try:
        yield
    except Exception as error:  # whatever it is: a network, a folder, a name
        warnings.warn(f"W&B does not {what} ({' '.join(str(error).split())[:160]})", stacklevel=4)


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        stored = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return stored.is_file() and "wandb" in stored.read_text()
    except (OSError, RuntimeError, UnicodeDecodeError):  # unreadable, no home folder
        return False


class CSVLog(CSVLogger):
    """All numbers in one file, save_dir/name/metrics.csv, over all starts of a run: rows that a resumed run makes again are replaced."""

    def __init__(self, save_dir: str, name: str = "logs") -> None:
        super().__init__(save_dir, name=name, version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment

    def begin(self, step: int) -> None:
        """Drop the rows from a step on, at which training begins now."""
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self.experiment.drop(step)


class _Rows(ExperimentWriter):
    """Lightning's writer, which deletes what is there; this one goes on."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = sorted(csv.DictReader(file).fieldnames or [])

    def _check_log_dir_exists(self) -> None:
        pass

    def drop(self, step: int) -> None:
        if not self._path.is_file():
            return
        with self._path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal() and int(row["step"]) < step]
        self._path.unlink()
        if rows:
            with self._path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
