"""Parts by their names (ldm/registry.py): those of earlier versions, and checked arguments."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from ldm.data.corruptions import BSR
from ldm.degradations import Degradation, Downscale
from ldm.diffusion.guidance import CFG
from ldm.diffusion.samplers import DDPM, RePaint
from ldm.errors import UserError
from ldm.interfaces import Conditioner, Corruption, Guidance, Sampler, Task
from ldm.model_folder import build
from ldm.registry import current_path, find, fits, parts, resolve
from ldm.sampling.tasks import Restore

OLD = {
    "ldm.stages.model.LatentDiffusion": "ldm.latents.model.LatentDiffusion",
    "ldm.stages.clips.FrameStack": "ldm.latents.clips.FrameStack",
    "ldm.diffusion.tasks.Inpaint": "ldm.sampling.tasks.Inpaint",
    "ldm.conditioning.together.Together": "ldm.conditioning.composite.CompositeConditioner",
    "ldm.degradations.Smaller": "ldm.degradations.Downscale",
    "ldm.degradations.Blurred": "ldm.degradations.GaussianBlur",
    "ldm.degradations.Grey": "ldm.degradations.Grayscale",
    "Smaller": "Downscale",
}


SMALLER = {"class_path": "ldm.degradations.Smaller", "init_args": {"factor": 2}}


@pytest.mark.parametrize("path", OLD)
def test_class_paths_of_earlier_versions(path: str) -> None:
    assert current_path(path) == current_path(OLD[path]) == OLD[path]


def test_paths_of_other_packages_stay() -> None:
    assert current_path("mine.parts.Grey") == "mine.parts.Grey"


def test_parts_of_earlier_versions_are_built() -> None:
    assert build({"class_path": "ldm.diffusion.tasks.Restore", "init_args": {"degradation": SMALLER}}) == Restore(Downscale(2))
    label = {"class_path": "ldm.conditioning.label.ClassLabel", "init_args": {"num_classes": 3, "dim": 4}}
    together = build({"class_path": "ldm.conditioning.together.Together", "init_args": {"parts": [label]}})
    assert isinstance(together, Conditioner)
    assert together.num_classes == 3


OLD_ARGUMENTS = [  # in model folders and configs, and in pictures' settings
    ({"class_path": "ldm.data.corruptions.BSR", "init_args": {"shrinks": 2}}, BSR(2)),
    ({"class_path": "ldm.diffusion.tasks.Restore", "init_args": {"degradation": SMALLER, "scale": 1.0}}, Restore(Downscale(2))),
]


@pytest.mark.parametrize(("spec", "part"), OLD_ARGUMENTS, ids=["shrinks", "scale"])
def test_arguments_of_earlier_versions_are_understood(spec: dict[str, Any], part: Any) -> None:
    assert build(spec) == part
    rooms = ["data", "degradations", "sampling"]
    assert build(resolve(spec, Task if isinstance(part, Task) else Corruption, "task", rooms)) == part


def test_parts_are_found_by_walking_the_rooms() -> None:
    assert {"DDIM", "DDPM", "UniPC", "RePaint"} <= parts(Sampler, ["diffusion"]).keys()
    assert {"Task", "Inpaint", "Restore"} <= parts(Task, ["sampling"]).keys(), "the base class is a task, too"
    assert parts(Degradation, ["degradations"]).keys() == {"Downscale", "GaussianBlur", "Grayscale"}, "no abstract one"
    assert find(Sampler, "ddpm", "--sampler", ["diffusion"]) is DDPM
    assert find(Sampler, "ldm.diffusion.samplers.DDPM", "--sampler", ["diffusion"]) is DDPM
    assert find(Degradation, "Smaller", "--degradation", ["degradations"]) is Downscale
    with pytest.raises(UserError, match=r"^--sampler is 'DDMP'; allowed are DDPM, "):
        find(Sampler, "DDMP", "--sampler", ["diffusion"])


def test_a_description_is_resolved_and_checked() -> None:
    spec = {"class_path": "RePaint", "init_args": {"times": 3, "sampler": {"class_path": "DDPM", "init_args": {"eta": 0.5}}}}
    full = resolve(spec, Sampler, "--sampler", ["diffusion"])
    assert full["class_path"] == "ldm.diffusion.samplers.RePaint"
    assert full["init_args"]["sampler"]["class_path"] == "ldm.diffusion.samplers.DDPM"
    assert build(full) == RePaint(DDPM(0.5), 3)
    assert build(resolve({"class_path": "CFG"}, Guidance, "--guidance", ["diffusion"])) == CFG()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "RePaint", "init_args": {"time": 3}}, "^--sampler.time is unknown: RePaint takes times, "),
        ({"class_path": "RePaint", "init_args": {"times": 1.5}}, "^--sampler.times is 1.5; RePaint takes a whole number$"),
        ({"class_path": "RePaint", "init_args": {"times": True}}, "^--sampler.times is True; RePaint takes a whole number$"),
        ({"class_path": "RePaint", "init_args": {"times": 1001}}, "^--sampler.times is 1001; allowed is 1 to 1000$"),
        ({"class_path": "RePaint", "init_args": [3]}, r"^--sampler has the arguments \[3\]; give them by name: sampler, times$"),
        ({"class_path": "RePaint", "init_args": {"sampler": {"class_path": "CFG"}}}, "^--sampler.sampler is 'CFG'; allowed are "),
        ({"class_path": "os.system"}, "^--sampler is 'os.system'; allowed are "),
        ({}, "^--sampler is ''; allowed are "),
    ],
)
def test_descriptions_that_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(spec, Sampler, "--sampler", ["diffusion"], {"times": (1, 1000)})


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3, -1], [1.0, "3", True, None, [3]]),
        (float, [3, 1.5, float("inf")], ["3", True, None, float("nan")]),
        (str, ["3"], [3, None]),
        (bool, [True], [1, "true"]),
        (float | None, [None, 2.0], ["x"]),
        (Literal["a", "b"], ["a"], ["c", 1]),
        (list[int], [[], [1, 2]], [[1.5], "12", 3]),
        (Sequence[float], [[1, 2.5]], [["a"], 1.0]),
        (int | list[float], [3, [1.0, 2]], [1.5, "3", ["x"]]),
        (Any, [3, "x", None], []),
    ],
    ids=str,
)
def test_plain_data_of_a_declared_type(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []
