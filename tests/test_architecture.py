"""The import rule of the README's map, read with ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ldm"
LEAVES = {"data", "nn", "diffusion"}
ALLOWED = {
    "interfaces": set(),
    "ranges": set(),
    "frames": set(),
    "labels": set(),
    "degradations": {"interfaces"},
    **{leaf: {"interfaces", "ranges", "frames", "degradations"} for leaf in LEAVES},
    "conditioning": {"interfaces", "nn", "ranges", "frames", "labels"},
    "autoencoder": {"interfaces", "nn"},
    "metrics": {"interfaces", "nn", "ranges"},
    "interop": {"interfaces", "autoencoder"},
    "model_folder": {"interfaces"},
    "stages": {"interfaces", "diffusion", "model_folder", "ranges", "frames", "labels"},
    "callbacks": {"interfaces", "model_folder", "data", "nn", "stages", "ranges", "frames"},
    "commands": {
        "interfaces",
        "ranges",
        "degradations",
        "frames",
        "data",
        "nn",
        "autoencoder",
        "conditioning",
        "diffusion",
        "metrics",
        "interop",
        "stages",
        "callbacks",
        "model_folder",
    },
    "cli": {"commands"},
    "__main__": {"cli"},
    "__init__": set(),
}
MAY_USE_LIGHTNING = {"data", "stages", "callbacks", "commands", "cli"}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" if node.module == "ldm" else node.module for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("ldm.")} - {"__version__"}
    assert inside <= ALLOWED[here] | {here}, f"{path} must not import {inside - ALLOWED[here] - {here}}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_the_outer_rooms_know_lightning(path: Path) -> None:
    if any(name.split(".")[0] in {"lightning", "pytorch_lightning"} for name in imports(path)):
        assert room(path) in MAY_USE_LIGHTNING


def test_every_room_is_named_in_the_rule() -> None:
    assert {room(path) for path in FILES} == set(ALLOWED)
