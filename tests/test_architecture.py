"""The import rule of the README's map, read with ast, and what a process that samples does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ldm"
CORE = {"interfaces", "errors", "ranges", "frames", "locking", "files", "paths", "signals", "draws", "devices"}  # imported by all
ALLOWED = {
    "errors": set(),
    "devices": set(),
    "ranges": {"errors"},
    "frames": set(),
    "locking": set(),
    "files": {"errors", "locking"},
    "signals": set(),
    "paths": {"errors"},
    "card": {"errors", "ranges"},
    "draws": {"devices"},
    "interfaces": {"errors", "ranges", "draws"},
    "registry": {"errors"},
    "degradations": CORE,
    "data": CORE | {"degradations"},
    "nn": CORE,
    "diffusion": CORE,
    "conditioning": CORE | {"nn"},
    "autoencoder": CORE | {"nn"},
    "metrics": CORE | {"nn"},
    "interop": CORE | {"autoencoder"},
    "model_folder": {"interfaces", "errors", "files", "card", "registry"},
    "run_folder": {"errors", "files", "locking", "model_folder"},
    "latents": CORE | {"diffusion", "model_folder"},
    "sampling": CORE | {"diffusion", "conditioning", "latents", "data", "degradations", "autoencoder", "card", "model_folder", "registry"},
    "stages": CORE | {"diffusion", "conditioning", "latents", "sampling", "model_folder", "registry"},
    "callbacks": CORE | {"data", "nn", "metrics", "sampling", "stages", "model_folder"},
    "auto": CORE | {"data", "nn", "autoencoder", "latents", "metrics", "sampling", "model_folder"},  # what `ldm train` chooses
    "console": CORE | {"registry", "model_folder"},  # what the commands' command lines share
    "commands": CORE
    | {"data", "degradations", "diffusion", "conditioning", "metrics", "interop", "latents", "sampling", "stages", "callbacks", "auto"}
    | {"console", "model_folder", "run_folder", "registry"},
    "cli": {"errors", "signals", "commands"},  # commands by name, when one is run
    "__main__": {"cli"},
    "__init__": {"commands", "data", "sampling"},  # when it is asked for
}
MAY_USE_LIGHTNING = {"data", "stages", "callbacks", "commands"}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" if node.module == "ldm" else str(node.module) for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def rooms_in(path: Path) -> set[str]:
    """Other rooms that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("ldm.")} - {"__version__", room(path)}


FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())


@each_file
def test_imports_run_one_way(path: Path) -> None:
    assert rooms_in(path) - ALLOWED[room(path)] == set(), f"{path} must not import these"


@each_file
def test_only_the_outer_rooms_know_lightning(path: Path) -> None:
    if any(name.split(".")[0] in {"lightning", "pytorch_lightning"} for name in imports(path)):
        assert room(path) in MAY_USE_LIGHTNING


def test_every_room_is_named_in_the_rule() -> None:
    assert {room(path) for path in FILES} == set(ALLOWED)


def test_of_the_autoencoders_sampling_knows_the_tiles_alone() -> None:
    found = {name for path in FILES if room(path) == "sampling" for name in imports(path) if name.startswith("ldm.autoencoder")}
    assert found == {"ldm.autoencoder.tiling"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Rooms that lead back to the first of them; empty where there are none."""
    done: set[str] = set()

    def walk(here: str, way: list[str]) -> list[str]:
        if here in way:
            return way[way.index(here) :]
        for there in sorted(graph.get(here, set()) - done):
            if found := walk(there, [*way, here]):
                return found
        done.add(here)
        return []

    return next(filter(None, (walk(start, []) for start in graph)), [])


def test_no_room_leads_back_to_itself() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circle(ALLOWED) == []
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(rooms_in(path))
    assert circle(graph) == []


def test_sampling_loads_neither_lightning_nor_other_things_that_training_needs(tmp_path: Path) -> None:
    heavy = {
        "lightning",
        "torchvision",
        "jsonargparse",
        "omegaconf",
        "torchmetrics",
        "wandb",
        "lpips",
        "diffusers",
        "sklearn",
        "matplotlib",
    }
    code = (
        "import sys, ldm.commands.sample\n"
        "from ldm import registry\n"
        "from ldm.cli import main\n"
        "registry.load(['sampling'])\n"
        f"assert main(['sample', 'emoji', '--n=1', '--steps=1', '--sampler=DDIM', '--device=cpu', '--out', {str(tmp_path)!r}]) == 0\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "0.png").is_file()
