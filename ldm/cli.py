"""The `ldm` command: a thin dispatcher.  Importing it costs nothing; each command imports what it needs."""

import os
import sys
from importlib import import_module

COMMANDS = {
    "fit": ("ldm.commands.train", "train stage 1 or stage 2"),
    "validate": ("ldm.commands.train", "measure a checkpoint on the held-out images"),
    "test": ("ldm.commands.train", "the same, as Lightning's test loop"),
    "encode": ("ldm.commands.train", "write the latent cache and the latent statistics, and stop"),
    "ema": ("ldm.commands.ema", "make an average of the weights of any length, after training"),
    "evaluate": ("ldm.commands.evaluate", "distances (FD, KID) between two sets of images"),
    "likelihood": ("ldm.commands.likelihood", "bits per dimension of images, by the bound and the ODE"),
    "import": ("ldm.commands.import_", "make a model folder of an autoencoder of diffusers"),
    "sample": ("ldm.commands.sample", "pictures from words: --prompt, --class, --image, --mask, --upscale, ..."),
    "predict": ("ldm.commands.predict", "the same from parts and configs, on many devices"),
    "again": ("ldm.commands.again", "make a picture anew from the settings that it carries"),
    "wav": ("ldm.commands.wav", "sound of pictures of a model of data.Audio"),
    "watermark": ("ldm.commands.watermark", "check whether pictures have the watermark of `ldm sample`"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items())
    return f"""usage: ldm COMMAND [options]

Latent diffusion models on your own images.

{rows}

`ldm COMMAND --help` lists a command's options; -c FILE reads some of them from a YAML file and can be repeated.
`ldm sample emoji` samples from the model that comes with the package."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status.  Mistakes of the user end with one sentence on stderr."""
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
        print(f"ldm: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return import_module(COMMANDS[name][0]).main(name, rest)
    except (ValueError, OSError) as error:
        if os.environ.get("LDM_TRACEBACK"):
            raise
        message = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"ldm {name}: {' '.join(message.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ldm {name}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
