"""Sampling on several devices or machines: Lightning starts the processes, each makes every so-manieth picture."""

from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.console.lightning import quiet
from ldm.errors import UserError
from ldm.sampling.pipeline import chunks
from ldm.sampling.run import Job, advance


class Sampling(L.LightningModule):
    """A job for a Trainer: predict_step makes and writes the pending pictures at these positions."""

    def __init__(self, job: Job, bar: Any) -> None:
        super().__init__()
        self.model, self.job, self.bar = job.model, job, bar

    def predict_step(self, batch: list[int], batch_idx: int) -> None:
        for some in chunks([self.job.pending[position] for position in batch], self.job.chunk_size):
            self.job.make(some, lambda share: advance(self.bar, share * self.trainer.world_size))


def run_on_devices(job: Job, options: dict[str, Any]) -> bool:
    """Make the pending pictures of a job; True in the process that finishes it."""
    quiet()
    accelerator = {"cuda": "gpu"}.get(options["device"], options["device"])
    devices = int(options["devices"]) if options["devices"].isdecimal() else options["devices"]
    try:
        trainer = L.Trainer(
            accelerator=accelerator, devices=devices, num_nodes=options["num_nodes"], strategy=options["strategy"], logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"--devices {options['devices']}, --strategy {options['strategy']}: {error}") from error
    if job.pending:
        with tqdm(total=len(job.pending), desc="Sampling", unit="img", disable=not trainer.is_global_zero) as bar:
            positions: Any = range(len(job.pending))
            loader = DataLoader(positions, batch_size=job.chunk_size, collate_fn=list)
            trainer.predict(Sampling(job, bar), loader, return_predictions=False)
            job.settle()
        trainer.strategy.barrier("all pictures written")
    return bool(trainer.is_global_zero)
