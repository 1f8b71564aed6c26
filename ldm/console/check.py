"""Whether a command line and its config files name settings that exist, with values of their types, before anything heavy is loaded.

jsonargparse reads them again and builds the parts; what it would say of a mistake is about Python's types.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ldm.console.signatures import Argument, Sources, as_number, sources
from ldm.errors import UserError, nearest
from ldm.files import read_yaml
from ldm.paths import existing

PLAIN = ("run", "ckpt_path", "overwrite", "seed_everything", "config", "print_config")
KINDS = {"trainer.callbacks": "callback", "trainer.logger": "logger"}  # parts of Lightning's as well
ROOTS = {"trainer": "Trainer", "model": "LightningModule", "data": "ImageData"}
CHOICES = {
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu", "hpu"),
    "trainer.strategy": ("auto", "ddp", "fsdp", "deepspeed", "single", "xla", "hpu"),  # and what begins so, as ddp_spawn
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16"),
}
FORMS = {
    "trainer.max_time": (r"\d+(:\d+){3}", "DD:HH:MM:SS, such as 00:12:00:00 for 12 hours"),
    "trainer.devices": (r"auto|-1|[1-9]\d*|\d+(, *\d+)+,?|\d+,", "a number of devices, their numbers such as [0,2], or auto"),
    "trainer.val_check_interval": (r"[1-9]\d*|0?\.\d+|\d+(:\d+){3}", "a number of batches, a share of an epoch, or a time DD:HH:MM:SS"),
}
LEAST: dict[str, float] = {
    "trainer.max_steps": -1, "trainer.max_epochs": -1, "trainer.log_every_n_steps": 0, "trainer.num_nodes": 1,
    "trainer.accumulate_grad_batches": 1, "trainer.gradient_clip_val": 0,
    "trainer.check_val_every_n_epoch": 1, "trainer.limit_train_batches": 0, "trainer.limit_val_batches": 0,
}  # fmt: skip
OWN_MODELS = {"first_stage": ("${run}/autoencoder/model", 1), "init": ("${run}/diffusion/model", 2)}  # of the same run, by setting
SWITCHES = ("--overwrite", "--check", "--prune")
NEEDED = {
    "model": "a stage: -c autoencoder/kl-f8.yaml for stage 1, -c diffusion/unet-f8.yaml for stage 2 (`ldm configs` lists all)",
    "data": "what to train on: -c data/folder.yaml --data.path PICTURES",
}


@dataclass
class Check:
    """The settings so far: the class at each place, and which arguments it was given."""

    sources: Sources = field(default_factory=sources)
    classes: dict[str, str | None] = field(default_factory=lambda: {"trainer": "Trainer"})
    given: dict[str, Any] = field(default_factory=dict)
    run: str = "runs/default"
    file: str = ""  # in which the setting lies; "": on the command line

    def refuse(self, sentence: str) -> NoReturn:
        raise UserError(sentence + (f" (in {self.file})" if self.file else ""))

    # --- settings one by one

    def config(self, path: Path) -> None:
        """All of a YAML file."""
        content, self.file = read_yaml(path), str(path)
        if content is not None and not isinstance(content, Mapping):
            self.refuse("a config has settings by name, such as `data:` and below it `  path: pictures`")
        for name, value in (content or {}).items():
            place = str(name).rstrip("+")
            if place not in ROOTS:
                self._require_plain(place)
                self.run = str(value) if place == "run" else self.run
            elif place == "trainer" and isinstance(value, Mapping):
                for key, one in value.items():
                    self.argument(place, str(key), one)
            elif value is not None:
                self.part(place, [ROOTS[place]], value)
        self.file = ""

    def option(self, name: str, text: str) -> None:
        """--model.autoencoder.channels 3."""
        parts = [part for part in name[2:].split(".") if part != "init_args"]
        root = parts[0].rstrip("+")
        if root not in ROOTS:
            self.run = text if root == "run" else self.run
            return None
        if parts[-1] in ("help", "help+"):
            return None
        if len(parts) == 1 or parts[-1] == "class_path":
            return self.part(".".join(parts if len(parts) == 1 else parts[:-1]), [ROOTS[root]] if len(parts) < 3 else None, _value(text))
        place = root
        for part in parts[1:-1]:
            takes = self._takes(place, part)
            place = f"{place}.{part}"
            if takes is not None and self.classes.get(place) is None:
                self.classes[place] = self._only(takes.type)
        return self.argument(place, parts[-1], _value(text))

    def _only(self, hint: ast.expr | None) -> str | None:
        """The class of a setting that names none, where it can be but one."""
        names = [one for base in self.sources.bases_in(hint) for one in self.sources.parts(base)]
        return names[0] if len(names) == 1 else None

    def require_root(self, option: str) -> None:
        """UserError where there is no option that begins so."""
        if (root := option[2:].split(".")[0].rstrip("+")) not in ROOTS:
            self._require_plain(root)

    def _require_plain(self, name: str) -> None:
        if name not in PLAIN:
            known = nearest(name, [*ROOTS, *PLAIN])
            self.refuse(f"there is no {f'setting {name!r}' if self.file else f'option --{name}'}; allowed are {known}")

    # --- parts

    def part(self, place: str, bases: list[str] | None, spec: Any) -> None:
        """A class with its arguments at a place; bases: what it has to be one of, None: not known."""
        if isinstance(spec, str):
            spec = {"class_path": spec}
        if not isinstance(spec, Mapping):
            self.refuse(f"{place} is {spec!r}; give {'settings by name' if place == 'trainer' else 'the name of a class'}")
        name = spec.get("class_path")
        if name is not None:
            self.classes[place] = self._known(place, bases, str(name))
        arguments = spec.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            self.refuse(f"{place}.init_args is {arguments!r}; give arguments by name")
        for other in set(spec) - {"class_path", "init_args", "dict_kwargs"}:
            self.refuse(f"{place}.{other} is unknown: a part has a class_path and init_args, and {other!r} may belong below init_args")
        for key, value in arguments.items():
            self.argument(place, str(key), value)

    def _known(self, place: str, bases: list[str] | None, name: str) -> str | None:
        """The short name of a class; None: one of elsewhere, which Python knows."""
        short = name.rpartition(".")[2]
        if "." in name and not name.startswith("ldm."):
            return None
        allowed = [one for base in bases or () for one in self.sources.parts(base)]
        if allowed and short not in allowed:
            self.refuse(f"{place} is {name!r}; allowed are {nearest(short, allowed, 40)}")
        return short if short in self.sources.classes else None

    def _takes(self, place: str, name: str) -> Argument | None:
        """What the class at a place takes under a name; None: not known.  UserError where it does not take it."""
        cls = self.classes.get(place)
        if cls is None:
            return None
        arguments, complete = self.sources.arguments(cls)
        name = name.rstrip("+")
        if name not in arguments and complete:
            what = "" if place == "trainer" else f": {cls} takes"
            known = nearest(name, [one for one in arguments if one != "data"], 30)
            self.refuse(f"{place}.{name} is unknown{what or ': allowed are'} {known}")
        return arguments.get(name)

    def argument(self, place: str, name: str, value: Any) -> None:
        """One argument of the class at a place."""
        takes, where = self._takes(place, name), f"{place}.{name.rstrip('+')}"
        self.given[where] = value
        begins = str(value).partition("_")[0] if where == "trainer.strategy" else str(value)
        if where in CHOICES and value is not None and not isinstance(value, Mapping) and begins not in CHOICES[where]:
            self.refuse(f"{where} is {value!r}; allowed are {nearest(str(value), CHOICES[where])}")
        if where in FORMS and isinstance(value, (int, str)) and not re.fullmatch(FORMS[where][0], str(value)):
            self.refuse(f"{where} is {value!r}; give {FORMS[where][1]}")
        if where in LEAST and isinstance(value, (int, float)) and value < LEAST[where]:
            self.refuse(f"{where} is {value}; allowed is {LEAST[where]:g} or more")
        if where == "trainer.barebones" and value:
            self.refuse("trainer.barebones forbids checkpoints and pictures, which a run of ldm keeps: leave it out")
        if where in ("trainer.max_steps", "trainer.max_epochs") and value == 0:
            self.refuse(f"{where} is 0; give 1 or more, or -1 for no end")
        if where in KINDS and not isinstance(value, bool):
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                self.part(where, self.sources.outside[KINDS[where]], one)
        elif takes is not None:
            self.value(where, takes.type, value, several=name.endswith("+"))

    # --- values

    def value(self, place: str, hint: ast.expr | None, value: Any, several: bool = False) -> None:
        """A value of a declared type; several: it is added to a list, alone or as a list."""
        bases = self.sources.bases_in(hint)
        if isinstance(value, str) and "${" in value:
            return
        if isinstance(value, Mapping) and ("class_path" in value or "init_args" in value):
            return self.part(place, bases, value)
        if bases and isinstance(value, str) and (several or not self.sources.fits(value, hint, plain=True)):
            return self.part(place, bases, value)
        if bases and isinstance(value, (list, tuple)):
            for i, one in enumerate(value):
                self.value(f"{place}[{i}]", hint, one, several=True)
            return None
        if not several and not self.sources.fits(value, hint):
            number = as_number(value) if self.sources.fits(0, hint) else None
            instead = f": write {int(number)}" if number is not None and number % 1 == 0 else ""
            self.refuse(f"{place} is {value!r}; allowed is {self.sources.described(hint, value)}{instead}")
        return None

    # --- the whole

    def complete(self) -> None:
        """UserError where something is missing, or named that is not there."""
        for root in ("model", "data"):
            if root not in self.classes:
                self.refuse(f"{root} is missing: give {NEEDED[root]}")
            if (cls := self.classes[root]) is None:
                continue
            for name, argument in self.sources.arguments(cls)[0].items():
                if argument.default is None and name != "data" and f"{root}.{name}" not in self.given:
                    self.refuse(f"{root}.{name} is missing: {cls} needs it, as --{root}.{name} or in a config")
        for name, (place, stage) in OWN_MODELS.items():
            if self.given.get(f"model.{name}") == place and not Path(place.replace("${run}", self.run)).expanduser().is_dir():
                self.refuse(
                    f"{self.run} has no model of stage {stage} yet: train it first, with the same --run, or give --model.{name} MODEL"
                )
        path = self.given.get("data.path")
        if self.classes["data"] in ("Folder", "Clips", "Audio") and isinstance(path, str) and "${" not in path:
            existing(path)


def check(arguments: list[str]) -> None:
    """UserError with one sentence for the first mistake of a command line of Lightning's commands, whose config files are paths."""
    found, i = Check(), 0
    while i < len(arguments):
        name, sign, text = arguments[i].partition("=")
        i += 1
        if not name.startswith("-"):
            raise UserError(f"{name!r} belongs to no option: put values right behind their option, and text with spaces in quotes")
        if name in SWITCHES and (sign or arguments[i : i + 1] in (["true"], ["false"])):
            raise UserError(f"{name} takes no value: give it, or leave it out")
        if name in SWITCHES or name.split(".")[-1] == "help" or name == "--print_config":
            continue
        if name.startswith("--"):
            found.require_root(name)
        if not sign:
            if i == len(arguments):
                raise UserError(f"{name} has no value: write it behind the option")
            text, i = arguments[i], i + 1
        if name in ("-c", "--config"):
            found.config(Path(text))
        elif name == "--ckpt_path" and text not in ("last", "best", "auto") and not Path(text).expanduser().is_file():
            raise UserError(f"there is no checkpoint {text!r}: give a file, `last`, `best` or `auto`; without --ckpt_path it starts anew")
        elif name == "--seed_everything" and re.fullmatch(r"-?\d+|null", text) and not (text.isdecimal() and int(text) < 2**32):
            raise UserError(f"--seed_everything is {text!r}; allowed is 0 to {2**32 - 1}")
        elif name.startswith("--"):
            found.option(name, text)
        else:
            raise UserError(f"there is no option {name}; -c FILE reads a config, all others begin with --")
    if "--print_config" not in arguments:
        found.complete()


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
