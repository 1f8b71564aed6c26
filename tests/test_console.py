"""What the commands' command lines share (ldm/console/options.py): values, parts, configs, old spellings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm.console.options import Option, named_numbers, parse, path, prompts, sides, size, steps, switch, whole
from ldm.diffusion.samplers import DDIM, DDPM, RePaint
from ldm.errors import UserError
from ldm.interfaces import Sampler

OPTIONS = [
    Option("model", "which model", path),
    Option("--n", "how many", whole(1), 4, "N"),
    Option("--per-class", "of each", whole(0), 0),
    Option("--size", "of pictures", size),
    Option("--overwrite", "make anew", switch, False),
    Option("--watermark", "hide one", switch, True),
    Option("--sampler", "which sampler", base=Sampler),
]
DEFAULTS = {"model": "m", "n": 4, "per_class": 0, "size": None, "overwrite": False, "watermark": True, "sampler": None}


def parsed(*arguments: str, old: dict[str, str] | None = None) -> dict[str, Any]:
    return parse("sample", "Pictures.", OPTIONS, arguments, old)


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("m", {}),
        ("--model m", {}),
        ("m --n 3 --per-class=2", {"n": 3, "per_class": 2}),
        ("--n=3 m --overwrite --no-watermark", {"n": 3, "overwrite": True, "watermark": False}),
        ("m --size 48x32", {"size": (32, 48)}),
        ("m --sampler DDIM", {"sampler": DDIM()}),
        ("m --sampler=ddim --sampler.eta=0.5", {"sampler": DDIM(0.5)}),
        ("m --sampler RePaint --sampler.times 3 --sampler.sampler DDPM --sampler.sampler.eta 0.5", {"sampler": RePaint(DDPM(0.5), 3)}),
    ],
)
def test_values_of_a_command_line(line: str, changed: dict[str, Any], capsys) -> None:
    assert parsed(*line.split()) == DEFAULTS | changed
    assert capsys.readouterr().err == ""


def test_files_come_first_and_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("n: 7\nsize: 48x32\nsampler: {class_path: DDIM, init_args: {eta: 1.0}}\noverwrite: true\n")
    Path("two.yaml").write_text("per_class: 5\nn: 9\n")
    Path("wrong.yaml").write_text("nn: 3\n")
    Path("range.yaml").write_text("n: 0\n")
    found = DEFAULTS | {"n": 7, "size": (32, 48), "sampler": DDIM(1.0), "overwrite": True}
    assert parsed("m", "-c", "one.yaml") == found
    assert parsed("m", "-c", "one.yaml", "--config", "two.yaml", "--sampler.eta=0.5", "--no-overwrite") == found | {
        "n": 9, "per_class": 5, "sampler": DDIM(0.5), "overwrite": False,
    }  # fmt: skip
    for name, message in {
        "wrong.yaml": "^wrong.yaml has 'nn', which is no option here: allowed are n, ",
        "range.yaml": "^--n is 0; allowed is 1 or more$",
        "none.yaml": "^there is no config file 'none.yaml'; the package has ",
    }.items():
        with pytest.raises(UserError, match=message):
            parsed("m", "-c", name)


@pytest.mark.parametrize(
    ("line", "changed", "said"),
    [
        ("m --num 3", {"n": 3}, "--num is the old spelling: write --n"),
        ("m --per_class=2", {"per_class": 2}, "--per_class is the old spelling: write --per-class"),
        ("m --overwrite=true", {"overwrite": True}, "--overwrite true is the old spelling: write --overwrite"),
        ("m --watermark false", {"watermark": False}, "--watermark false is the old spelling: write --no-watermark"),
        ("m --size=[32,48]", {"size": (32, 48)}, "--size [32,48] is the old spelling, height first: write WIDTHxHEIGHT"),
    ],
)
def test_old_spellings_are_understood_with_one_line_each(line: str, changed: dict[str, Any], said: str, capsys) -> None:
    assert parsed(*line.split(), old={"--num": "--n"}) == DEFAULTS | changed
    assert capsys.readouterr().err == f"ldm: {said}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "^model is missing: which model "),
        ("m --n 0", "^--n is 0; allowed is 1 or more$"),
        ("m --n", "^--n: expected one argument "),
        ("m x", "^'x' belongs to no option: "),
        ("m --overwrit", "^there is no option --overwrit: did you mean --overwrite"),
        ("m --zzzzzz", r"^there is no option --zzzzzz \(see --help\)$"),
        ("m --sampler Nope", "^--sampler is 'Nope'; allowed are "),
        ("m --sampler.eta 1", "^--sampler.eta was given without --sampler NAME: name the class$"),
    ],
)
def test_mistakes(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*line.split())


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (size, "64", (64, 64)),
        (size, "128×64", (64, 128)),
        (steps, "25", 25),
        (steps, "999,500,1", [999.0, 500.0, 1.0]),
        (steps, "[999]", [999.0]),
        (sides, "8,0,0,7", [8, 0, 0, 7]),
        (sides, "[8, 0, 0, 7]", [8, 0, 0, 7]),
        (prompts, "a cat, red", ["a cat, red"]),
        (prompts, "[a cat,red]", ["a cat", "red"]),
        (named_numbers, "age=30, dose = 1e0", {"age": 30.0, "dose": 1.0}),
        (named_numbers, "", {}),
    ],
)
def test_kinds_of_values(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (size, "48x32x1", "^'48x32x1'; give WIDTHxHEIGHT in px, such as 128x64$"),
        (size, "0x3", "^'0x3'; give WIDTHxHEIGHT"),
        (size, "-3x3", "^'-3x3'; give WIDTHxHEIGHT"),
        (steps, "many", "^'many'; give a whole number, or a list of steps such as 999,500,100$"),
        (sides, "8,8", r"^\[8, 8\]; give 4 numbers of 0 or more"),
        (sides, "1,2,3,-4", r"^\[1, 2, 3, -4\]; give 4 numbers of 0 or more"),
        (named_numbers, "age", "^'age'; give NAME=NUMBER, separated by commas$"),
        (named_numbers, "age=", "^'age='; give NAME=NUMBER, separated by commas$"),
        (named_numbers, "age=old", "^'old'; give a number$"),
        (path, " ", r"^empty: was a shell variable not set\?$"),
    ],
)
def test_values_of_the_wrong_kind(kind: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(text)
