"""Pictures made once more, and pictures that lie about how they were made."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli import main
from ldm.errors import UserError
from ldm.sampling.settings import StoredSettings, settings_in

SETTINGS: dict[str, Any] = {
    "index": 0,
    "seed": 0,
    "condition": {"class": "Smileys & Emotion/cat-face"},
    "negative": None,
    "sampler": {"class_path": "ldm.diffusion.samplers.DPMSolverPP2M", "init_args": {"eta": 0.0}},
    "guidance": {"class_path": "ldm.diffusion.guidance.CFG", "init_args": {"scale": 2.0, "high": "inf"}},
    "steps": 1,
    "spacing": "trailing",
    "task": None,
    "size": None,
    "windows": True,
    "model_sha256": "d84824c5cf5e3407fb9557c52e39f2ddbba4d46bea474f4449c45c9faebc1dc7",
    "ldm": "0.2.0",
}


def picture(path: Path, text: str) -> str:
    """A PNG file that carries this text where our settings are."""
    info = PngInfo()
    info.add_text("ldm", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


def again(tmp_path: Path, text: str) -> int:
    return main(["again", picture(tmp_path / "x.png", text), "emoji", "--device=cpu", "--out", str(tmp_path / "again")])


def test_honest_settings_are_understood(tmp_path: Path) -> None:
    assert again(tmp_path, json.dumps(SETTINGS)) == 0
    found = settings_in(tmp_path / "again" / "0.png")
    assert found is not None
    assert {key: found[key] for key in SETTINGS if key not in ("guidance", "ldm")} == {
        key: value for key, value in SETTINGS.items() if key not in ("guidance", "ldm")
    }


def test_pictures_of_the_version_before_still_work(tmp_path: Path) -> None:
    """Its words: one for a condition, `share`, `towards_seed`, `lanes`, and no word where they did not matter."""
    old = {key: SETTINGS[key] for key in ("index", "seed", "sampler", "guidance", "steps", "spacing", "task", "size", "model_sha256")}
    old |= {
        "class": "cat-face",
        "negative": None,
        "windows": False,
        "towards_seed": 7,
        "share": 0.5,
        "mixed": "country-flag",
        "ldm": "0.1.0",
    }
    assert again(tmp_path, json.dumps(old)) == 0
    found = settings_in(tmp_path / "again" / "0.png")
    assert found is not None
    assert (found["to_seed"], found["weight"], found["chunk_size"]) == (7, 0.5, 8)
    assert found["to_condition"] == {"class": "Flags/country-flag"}


HOSTILE: dict[str, dict[str, Any]] = {
    "a path as index": {"index": "../../x"},
    "no index": {"index": None},
    "a negative index": {"index": -1},
    "an endless sampler": {"sampler": {"class_path": "ldm.diffusion.samplers.RePaint", "init_args": {"times": 10**9}}},
    "endless steps": {"steps": 10**9},
    "steps that are none": {"steps": "many"},
    "a picture as large as a city": {"size": [10**6, 10**6]},
    "a class of Python": {"sampler": {"class_path": "os.system", "init_args": {"command": "touch /tmp/x"}}},
    "another class of ours": {"sampler": {"class_path": "ldm.nn.unet.UNet", "init_args": {"in_channels": 10**6}}},
    "a part in the wrong place": {"sampler": {"class_path": "ldm.diffusion.guidance.CFG"}},
    "an argument of another type": {"sampler": {"class_path": "ldm.diffusion.samplers.DDIM", "init_args": {"eta": "x"}}},
    "an argument that there is not": {"guidance": {"class_path": "ldm.diffusion.guidance.CFG", "init_args": {"x": 1}}},
    "a path to open": {"guidance": {"class_path": "ldm.diffusion.guidance.CFG", "init_args": {"scale": 2.0, "weaker": "/etc/passwd"}}},
    "a condition that is none": {"condition": [1]},
    "a class that there is not": {"condition": {"class": "dragon"}},
    "an input that there is not": {"condition": {"smell": "sweet"}},
    "a huge border": {"task": {"class_path": "ldm.sampling.tasks.Outpaint", "init_args": {"left": 10**9}}},
    "tiles of less than nothing": {"tile": -5},
    "huge calls": {"chunk_size": 10**9},
    "a precision that there is not": {"precision": "8-bit"},
    "a model that is no text": {"model_sha256": 3},
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_lie_is_one_sentence(lie: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(tmp_path, json.dumps({**SETTINGS, **HOSTILE[lie]})) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "fault of ldm" not in said
    assert {path.name for path in tmp_path.iterdir()} <= {"x.png", "again"}


@pytest.mark.parametrize("text", ["{}", "[1]", '"x"', "hello", "", '{"model_sha256": 3}', "null", "NaN", '{"a":' * 2000])
def test_what_is_not_ours_carries_no_settings(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(tmp_path, text) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "fault of ldm" not in said


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["class_path", "init_args", "eta", "scale", "word"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.dictionaries(
        st.sampled_from([*SETTINGS, "class", "share", "towards_seed", "tile", "weight", "image", "shows"]), values, max_size=3
    )
)
def test_settings_are_understood_or_refused(changes: dict[str, Any]) -> None:
    try:
        stored = StoredSettings.parse({**SETTINGS, **changes})
    except UserError:
        return
    assert 0 <= stored.request.index < 2**63
    assert stored.config.num_steps <= 100_000
    assert not math.isnan(stored.weight)


def test_missing_files_are_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["again", str(tmp_path / "none.png"), "emoji"]) == 1
    assert "there is no picture" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert main(["again", str(tmp_path / "plain.png"), "emoji"]) == 1
    assert "carries no settings of ldm" in capsys.readouterr().err
