"""The `ldm` command: a thin dispatcher.  Importing it costs nothing; each command imports what it needs."""

import errno
import gc
import os
import signal
import sys
import tempfile
import traceback
from importlib import import_module

from ldm.commands import COMMANDS
from ldm.errors import Stopped, UserError, nearest, of_library
from ldm.signals import Signals

# What a machine says of a file or a disk of the user: not there, no right, no room, ...
MACHINE_ERRORS = (
    errno.ENOENT,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
)


def run() -> int:
    """The program: as main, and ends at once.  Python would look for cycles in all that torch and Lightning have loaded, which takes two
    seconds of every command."""
    try:
        return main()
    finally:
        gc.freeze()


def usage() -> str:
    rows = "\n".join(f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items())
    return f"""usage: ldm COMMAND [options]

Latent diffusion models on your own images.

{rows}

`ldm COMMAND --help` lists a command's options; -c FILE reads some of them from a YAML file and can be repeated.
`ldm sample emoji` samples from the model that comes with the package."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status.  A mistake of the user is one sentence on stderr, a fault of ldm a short report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import ldm

        print(ldm.__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"ldm: there is no command {name!r}; the commands are {nearest(name, COMMANDS, 20)}", file=sys.stderr)
        return 2
    with Signals(at_once=True) as signals:
        try:
            status: int = import_module(COMMANDS[name][0]).main(name, rest)
            return status or (signals.number and 128 + signals.number)  # one that came at the very end
        except Stopped as stopped:
            return _end(name, str(stopped), stopped.code)
        except UserError as error:
            if os.environ.get("LDM_TRACEBACK"):
                raise
            return _end(name, str(error), 1)
        except BrokenPipeError:  # `ldm ... | head`: nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            return _end(name, "stopped", 128 + (signals.number or signal.SIGINT))
        except SystemExit as error:
            if signals.number and error.code == 1:  # Lightning's end after a KeyboardInterrupt
                return _end(name, "stopped", 128 + signals.number)
            if isinstance(error.code, int) or error.code is None:
                return error.code or 0
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in MACHINE_ERRORS and error.filename:
                remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the path and its rights"
                return _end(name, f"{error.strerror}: {error.filename}: {remedy}", 1)
            if os.environ.get("LDM_TRACEBACK"):
                raise
            if (meaning := of_library(error)) is not None:
                return _end(name, meaning, 1)
            return _report(name, rest, error)


def _end(name: str, message: str, status: int) -> int:
    if message:  # one process of several says it
        print(f"ldm {name}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _report(name: str, arguments: list[str], error: Exception) -> int:
    """What a fault of ours looks like: short, with the traceback in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="ldm-fault-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"ldm {name} {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}")
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    print(f"ldm {name}: this is a fault of ldm ({said}).  Please report it with the file {file.name}", file=sys.stderr)
    return 70  # EX_SOFTWARE


if __name__ == "__main__":
    sys.exit(run())
