"""ldm fit, validate, test, encode: what is wrong with their command line is said before Lightning is loaded, which takes seconds."""

import os

from ldm.console.check import check
from ldm.console.configs import find_configs, listed
from ldm.console.signatures import Argument, sources
from ldm.errors import UserError

EXAMPLES = {
    "fit": [
        "ldm fit -c data/folder.yaml -c autoencoder/kl-f8.yaml --data.path PICTURES --run runs/mine     stage 1",
        "ldm fit -c data/folder.yaml -c diffusion/unet-f8.yaml --data.path PICTURES --run runs/mine     stage 2",
        "on GPUs with -c trainer/gpu.yaml; with --ckpt_path auto the same command goes on where it was stopped",
    ],
    "validate": ["ldm validate -c data/folder.yaml -c autoencoder/kl-f8.yaml --data.path PICTURES --run runs/mine --ckpt_path last"],
    "test": ["ldm test -c data/folder.yaml -c autoencoder/kl-f8.yaml --data.path PICTURES --run runs/mine --ckpt_path last"],
    "encode": [
        "ldm encode -c data/folder.yaml -c diffusion/unet-f8.yaml --data.path PICTURES --run runs/mine",
        "--check compares a sample with what the first stage makes now, --prune removes caches of other settings",
    ],
}
OWN = [
    ("-c FILE", "settings from a YAML file, here or of the package (below); can be repeated, later ones win"),
    ("--run FOLDER", "of this run; configs call it ${run} (default: runs/default)"),
    ("--ckpt_path PATH", "checkpoint to go on from: a file, `last` or `best` of this run, or `auto`: the last one if there is one"),
    ("--overwrite", "start anew in a folder that holds a run, which is removed"),
    ("--seed_everything N", "of Python, NumPy and torch; what a run draws depends on --model.seed and --data.seed (default: 0)"),
    ("--print_config", "print all settings and stop"),
]
DESCRIBED = (("data", "Folder"), ("model", "AutoencoderStage"), ("model", "DiffusionStage"))


def page(command: str) -> str:
    """The help page: examples, our own options, the configs, then what a stage, the data and the trainer take."""
    known = sources()
    blocks = ["\n".join([f"usage: ldm {command} -c FILE ... [--OPTION VALUE ...]", "", *EXAMPLES[command]]), _rows("options", OWN)]
    blocks.append(_rows("config files", listed()))
    blocks += [_rows(f"{root}: {cls}", _options(root, cls)) for root, cls in DESCRIBED]
    blocks.append(f"trainer: --trainer.NAME VALUE of Lightning's Trainer\n  {', '.join(known.arguments('Trainer')[0])}")
    blocks.append(
        "A part is named by its class, and takes arguments behind a dot: --model.network DiT --model.network.depth 12;\n"
        f"`ldm {command} --model.help DiffusionStage` explains all arguments of a class."
    )
    return "\n\n".join(blocks)


def options() -> list[tuple[str, str]]:
    """All options with a few words each."""
    found = {f"--{name.split()[0].lstrip('-')}": about for name, about in OWN[1:]}
    for root, cls in (*DESCRIBED, ("trainer", "Trainer")):
        found |= dict(_options(root, cls))
    return list(found.items())


def _options(root: str, cls: str) -> list[tuple[str, str]]:
    return [(f"--{root}.{name}", _about(one)) for name, one in sources().arguments(cls)[0].items() if name != "data"]


def _about(argument: Argument) -> str:
    kind = sources().described(argument.type).removesuffix(" or null")
    return kind + (" (needed)" if argument.default is None else "" if argument.default == "None" else f" (default: {argument.default})")


def _rows(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([f"{title}:", *(f"  {name:<{width}}{said}" for name, said in rows)])


def _of_trial(arguments: list[str]) -> list[str]:
    """Each trial of a sweep of W&B has its own run below --run."""
    trial = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    if trial is None:
        return arguments
    places = [i for i, one in enumerate(arguments) if i and arguments[i - 1] == "--run"]
    given = arguments[places[-1]] if places else next((one[6:] for one in arguments if one.startswith("--run=")), "runs/sweep")
    run = f"{given}/{trial}"
    print(f"trial {trial} of a sweep: its run is in {run}")
    return [*arguments, "--run", run]


def main(command: str, arguments: list[str]) -> int:
    if not arguments:
        raise UserError(f"nothing was said: for example {EXAMPLES[command][0].split('     ')[0]}")
    if any(one in ("-h", "--help") for one in arguments):
        print(page(command))
        return 0
    arguments = _of_trial(find_configs(arguments))
    check(arguments)
    from ldm.commands import train  # not before: Lightning takes seconds

    return train.main(command, arguments)
