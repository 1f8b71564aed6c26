"""Signals that ask a command to end: Ctrl-C, SIGTERM (docker stop, Slurm), SIGHUP (a closed terminal), SIGUSR1 (Slurm's warning)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal that ends what the process does, between two lines of Python."""


class Signals:
    """While it is entered, notes the signals that ask the process to end, instead of obeying them.

    number: the first one that came, 0 until then.  at_once: raise Interrupted where one comes.  A second Ctrl-C always does.
    Those that the process ignores (`nohup`) stay ignored; in other threads than the main one nothing changes.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.number, self.at_once = 0, at_once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self in _entered:
            _entered.remove(self)
        if _entered and not _entered[-1].number:  # nobody has obeyed it
            _entered[-1].number = self.number

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.number = bool(self.number), self.number or number
        if self.at_once or (again and number == signal.SIGINT):
            raise Interrupted


_entered = list[Signals]()  # the last one has the handlers


def waiting() -> int:
    """The signal that came and that nobody has obeyed yet; 0: none."""
    return _entered[-1].number if _entered else 0


@contextmanager
def breakable() -> Iterator[None]:
    """Work on which nothing depends: a signal raises Interrupted in it, or before it where one has come already."""
    signals = _entered[-1] if _entered else Signals()
    if signals.number:
        raise Interrupted
    before, signals.at_once = signals.at_once, True
    try:
        yield
    finally:
        signals.at_once = before
