"""The folder of one stage of a run: what is in it, and which process writes there."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm import model_folder
from ldm.errors import UserError
from ldm.files import newest_first, sweep
from ldm.locking import try_lock

LOCK, CONFIG, CHECKPOINTS = ".ldm.lock", "fit.yaml", "checkpoints"
ASIDE, GONE = ".overwritten", ".removed"  # what --overwrite moved, until the new training begins, and then
WRITTEN = (CHECKPOINTS, "model", "pictures", "logs", "averages")  # folders of a stage that belong to one training


class RunFolder:
    """RUN/STAGE: checkpoints, model, pictures and logs of one training."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def holds(self) -> str | None:
        """What would be lost if another training were written here, in words; None: nothing."""
        if checkpoints := newest_first(self.path / CHECKPOINTS, "*.ckpt"):
            return f"checkpoints ({', '.join(path.name for path in checkpoints[:3])})"
        return "a model" if (self.path / "model" / model_folder.CONFIG).is_file() else None

    def require_free(self, command: str) -> None:
        """UserError where another training lies here."""
        if (found := self.holds) is not None:
            raise UserError(
                f"{self.path} holds {found}: `ldm {command}` goes on from there with --ckpt_path last, starts anew with --overwrite, "
                "or takes another --run"
            )

    @contextmanager
    def owned(self, command: str) -> Iterator[None]:
        """While this process alone writes here; removes what killed processes left half written.

        UserError where another process is at work; a lock ends with its process, whatever ends that.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a+", encoding="utf-8") as file:
            if not try_lock(file):
                file.seek(0)
                raise UserError(f"{self.path} is being written {_owner(file.read())}: wait for it, or choose another --run")
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            json.dump({"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
            file.flush()
            self.restore()
            model_folder.settle(self.path / "model")
            if left := [path for name in ("", *WRITTEN) for path in sweep(self.path / name)]:
                print(f"removed {len(left)} half-written files of a run that was killed in {self.path}")
            try:
                yield
            finally:
                file.truncate(0)

    def set_aside(self) -> None:
        """Move what an earlier training wrote out of the way; latents, and what was logged for W&B, stay."""
        if self.path.resolve() == Path.cwd():
            raise UserError("--overwrite would remove folders from where you are: give the run a folder of its own with --run")
        self.restore()
        (self.path / ASIDE).mkdir(parents=True)
        for name in WRITTEN:
            if (self.path / name).is_dir():
                (self.path / name).rename(self.path / ASIDE / name)

    def clear(self) -> None:
        """Remove what is set aside; a kill on the way leaves nothing that could be put back in part."""
        if found := sorted(folder.name for folder in (self.path / ASIDE).iterdir()):
            print(f"--overwrite: removed {', '.join(found)} of the run before in {self.path}")
        (self.path / ASIDE).rename(self.path / GONE)
        shutil.rmtree(self.path / GONE)

    def restore(self) -> None:
        """Put back what is still set aside, as the training in its place did not begin."""
        shutil.rmtree(self.path / GONE, ignore_errors=True)
        if not (self.path / ASIDE).is_dir():
            return
        for folder in (self.path / ASIDE).iterdir():
            shutil.rmtree(self.path / folder.name, ignore_errors=True)
            folder.rename(self.path / folder.name)
        (self.path / ASIDE).rmdir()


def _owner(text: str) -> str:
    """Who has the lock, as far as its file says."""
    try:
        found = json.loads(text)
        return f"by `ldm {found['command']}`, process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "by another process"
