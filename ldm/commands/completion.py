"""ldm completion: a script that makes a shell complete ldm's commands, options and config files."""

import argparse
from importlib import import_module

import shtab

from ldm.commands import COMMANDS, fit
from ldm.console.configs import listed
from ldm.console.options import switch
from ldm.errors import UserError, nearest

ABOUT = {
    "bash": "ldm completion bash > ~/.local/share/bash-completion/completions/ldm",
    "zsh": "ldm completion zsh > ~/.zfunc/_ldm, with `fpath+=~/.zfunc; autoload -Uz compinit && compinit` in ~/.zshrc",
    "tcsh": "ldm completion tcsh > ~/.ldm.completion.csh, and `source ~/.ldm.completion.csh` in ~/.cshrc",
}


def main(command: str, arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join(["usage: ldm completion SHELL", "", *ABOUT.values()]))
        return 0 if arguments else 2
    if arguments[0] not in ABOUT:
        raise UserError(f"there is no completion for {arguments[0]!r}; allowed are {nearest(arguments[0], ABOUT)}")
    print(shtab.complete(parser(), arguments[0]))
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and options, which only describes them."""
    found = argparse.ArgumentParser(prog="ldm", add_help=False)
    commands = found.add_subparsers()
    configs = [name for name, _ in listed()]
    for name, (module, about) in COMMANDS.items():
        one = commands.add_parser(name, help=about, add_help=False)
        if module == fit.__name__:
            for option, said in fit.options():
                one.add_argument(option, help=said.replace("%", "%%")).complete = shtab.FILE  # type: ignore[attr-defined]
        for option in getattr(import_module(module), "OPTIONS", []):
            if option.help and option.type is switch:
                one.add_argument(option.name, help=option.help.replace("%", "%%"), action="store_true")
            elif option.help:
                one.add_argument(option.name, help=option.help.replace("%", "%%")).complete = shtab.FILE  # type: ignore[attr-defined]
        if hasattr(import_module(module), "OPTIONS") or module == fit.__name__:
            one.add_argument("-c", "--config", choices=configs, help="YAML file, here or of the package")
    return found
