"""Locks of the operating system, which end with the process that has them."""

import os
import time
from collections.abc import Callable
from typing import IO, Any


def lock(file: IO[Any], waiting: Callable[[], None] | None = None) -> None:
    """Take an exclusive lock, which is kept until the file is closed; waits for another process, and calls `waiting` before."""
    if try_lock(file):
        return
    if waiting is not None:
        waiting()
    while not try_lock(file):
        time.sleep(0.05)


def try_lock(file: IO[Any]) -> bool:
    """Take an exclusive lock if it is free, and say whether it was."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # pragma: no cover  Windows
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return False
    return True
