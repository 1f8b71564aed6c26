"""`ldm sample` and `ldm again` at toy size: every option does what it says, says what it did, and can be done again."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ldm
from PIL import Image

from ldm import model_folder
from ldm.cli import COMMANDS, main
from ldm.data.images import DigitImages, EmojiImages
from ldm.data.transforms import as_image
from ldm.sampling.settings import settings_in

SIZE = (40, 48)  # height and width of the picture that is given


@pytest.fixture
def picture(tmp_path: Path) -> dict[str, str]:
    """A digit of 48x40 px, a mask of its right half, others that do not fit it, a film."""
    files = tmp_path / "files"
    (files / "film").mkdir(parents=True)
    three = as_image(DigitImages(64).pixels(3))
    three.crop((8, 12, 56, 52)).save(files / "three.png")
    three.resize((12, 10), box=(8, 12, 56, 52)).save(files / "small.png")
    mask = np.zeros((64, 48), dtype=np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask[:40]).save(files / "mask.png")
    Image.fromarray(mask[:24]).save(files / "half.png")
    (files / "broken.png").write_bytes((files / "three.png").read_bytes()[:200])
    for name in ("three", "mask"):
        shutil.copy(files / f"{name}.png", files / "film")
    return {path.stem: str(path) for path in files.iterdir()}


@pytest.fixture(scope="module")
def digits(trained: Path) -> str:
    return str(trained / "diffusion" / "model")


def sample(model: str | Path, out: Path, *options: str, n: int = 2) -> list[np.ndarray]:
    steps = [] if any(option.startswith("--steps") for option in options) else ["--steps=2"]
    assert main(["sample", str(model), *steps, f"--n={n}", "--out", str(out), "--device=cpu", *options]) == 0
    return [np.asarray(Image.open(out / f"{i}.png"), dtype=int) for i in range(n)]


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# From an image, from one to another
# ---------------------------------------------------------------------------------------------------------------------

CASES = {
    "image": ["--image={three}", "--strength=0.5"],
    "mask": ["--image={three}", "--mask={mask}"],
    "repaint": ["--image={three}", "--mask={mask}", "--repaint=2"],
    "outpaint": ["--image={three}", "--outpaint=8,0,0,7"],
    "edit": ["--image={three}", "--source-class=3", "--class=8"],
    "upscale": ["--image={small}", "--upscale=4"],
    "deblur": ["--image={three}", "--deblur=2"],
    "colourise": ["--image={three}", "--colourise"],
    "denoise": ["--image={three}", "--denoise=0.3"],
    "style": ["--image={three}", "--style"],
    "task": ["--image={three}", "--task=ImageToImage", "--task.strength=0.4", "--size=32"],
    "to-image": ["--image={three}", "--to-image={half}", "--guidance=1"],
    "to-class": ["--class=3", "--to-class=8"],
    "size": ["--size=64x48"],
    "tile": ["--size=64x48", "--tile=32"],
    "to-seed": ["--to-seed=7"],
    "negative": ["--class=3", "--negative=8", "--guidance=4"],
}
SIZES = (
    {"outpaint": (47, 56), "task": (32, 32)}
    | dict.fromkeys(("size", "tile"), (48, 64))
    | dict.fromkeys(("to-class", "to-seed", "negative"), (32, 32))
)
ONE_PICTURE = ("edit", "denoise")  # no noise decides what they make


@pytest.mark.parametrize("name", CASES)
def test_every_task_has_an_option_and_its_settings_are_kept(name: str, digits: str, picture: dict[str, str], tmp_path: Path) -> None:
    options, count = [option.format(**picture) for option in CASES[name]], 1 if name in ONE_PICTURE else 2
    made = sample(digits, tmp_path / "out", *options, n=count)
    assert [each.shape for each in made] == [(*SIZES.get(name, SIZE), 3)] * count
    lines = manifest(tmp_path / "out")
    assert ("image_sha256" in lines[0]) == ("image" in options[0])
    if name == "to-seed":
        assert [(line["seed"], line["to_seed"], line["weight"]) for line in lines] == [(0, 7, 0.0), (0, 7, 1.0)]
    if name == "to-class":
        ends = [(line["condition"], line["to_condition"], line["weight"]) for line in lines]
        assert ends == [({"class": "3"}, {"class": "8"}, weight) for weight in (0.0, 1.0)]
    if name == "edit":
        assert (lines[0]["condition"], lines[0]["shows"]) == ({"class": "8"}, {"class": "3"})
    if name == "negative":
        assert (lines[1]["condition"], lines[1]["negative"]) == ({"class": "3"}, {"class": "8"})
    if name in ("mask", "repaint"):
        shown = np.asarray(Image.open(picture["three"]), dtype=int)
        assert np.array_equal(made[0][:, :24], shown[:, :24]), "what is known has the given pixels"
    if name == "outpaint":
        assert np.array_equal(made[0][:40, 8:], np.asarray(Image.open(picture["three"]), dtype=int))
    files = [option for option in options if option.split("=")[0] in ("--image", "--mask", "--to-image")]
    again = ["again", str(tmp_path / "out" / f"{count - 1}.png"), digits, *files, "--device=cpu"]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / f"{count - 1}.png").read_bytes() == (tmp_path / "out" / f"{count - 1}.png").read_bytes()


def test_what_does_not_belong_to_a_picture_is_refused(digits: str, picture: dict[str, str], tmp_path: Path, capsys) -> None:
    sample(digits, tmp_path / "out", f"--image={picture['three']}")
    made = str(tmp_path / "out" / "0.png")
    cases = {
        (picture["three"], digits): "carries no settings of ldm",
        (made, "emoji"): "was made by another model",
        (made, digits): "was made from the image three.png: give it with --image",
        (made, digits, f"--image={picture['half']}"): "made with another file as image",
        (made, digits, f"--image={picture['three']}", f"--to-image={picture['mask']}"): "made with another file as to-image, or with none",
    }
    for arguments, message in cases.items():
        assert main(["again", *arguments, "--device=cpu", "--out", str(tmp_path / "again")]) == 1
        assert message in capsys.readouterr().err


def test_how_a_picture_comes_about_is_shown(digits: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = sample(digits, out, "--trajectory=3", "--steps=4", "--class=3,8", "--preview", "--no-watermark")
    preview = np.asarray(Image.open(out / "preview.png"), dtype=int)
    for i, start in enumerate((2, 36)):
        assert np.abs(preview[2:34, start : start + 32] - made[i]).max() <= 1, "after the last step"
    for i in range(2):
        strip = np.asarray(Image.open(out / f"{i}-steps.png"), dtype=int)
        assert strip.shape == (36, 2 + 3 * 34, 3)
        assert np.abs(strip[2:34, 2 + 2 * 34 : -2] - made[i]).max() <= 1, "the last D is the picture"
        with Image.open(out / f"{i}.gif") as animation:
            assert animation.n_frames >= 3


def test_interpolation_ends_in_the_pictures_of_both_seeds(digits: str, tmp_path: Path) -> None:
    ends = sample(digits, tmp_path / "between", "--to-seed=7", "--class=3")
    zero, seven = (sample(digits, tmp_path / seed, f"--seed={seed}", "--class=3", n=1)[0] for seed in ("0", "7"))
    assert np.array_equal(ends[0], zero)
    assert np.array_equal(ends[1], seven)


def test_a_mixture_of_conditions_ends_in_both(tmp_path: Path) -> None:
    cat, flag = "--class=cat-face", "--class=country-flag"
    ends = sample("emoji", tmp_path / "mixed", cat, "--to-class=country-flag", "--no-watermark")
    one, other = (sample("emoji", tmp_path / name[8:], name, "--no-watermark", n=1)[0] for name in (cat, flag))
    assert np.abs(ends[0] - one).max() <= 1
    assert np.abs(ends[1] - other).max() <= 1
    assert np.abs(one - other).max() > 50


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


@pytest.mark.parametrize("condition", [[], ["--class=face-smiling"]])
def test_on_the_way_between_two_images_both_are_met(condition: list[str], tmp_path: Path) -> None:
    """By the carried model; what the images show need not be said."""
    images, files = EmojiImages(), []
    for number in (40, 900):
        files.append(tmp_path / f"{number}.png")
        as_image(images.pixels(number)).save(files[-1])
    options = [f"--image={files[0]}", f"--to-image={files[1]}", "--guidance=1", "--steps=25", *condition]
    ends = sample("emoji", tmp_path / "out", *options)
    (shown,) = {line["condition"].get("class") for line in manifest(tmp_path / "out")}
    assert (shown is None) == (not condition)
    for end, file in zip(ends, files, strict=True):
        assert psnr(end, np.asarray(Image.open(file))) > 25


def test_frames_share_their_noise_and_become_an_animation(digits: str, picture: dict[str, str], tmp_path: Path) -> None:
    three = Image.open(picture["three"]).convert("RGB")
    frames = [three, three, three.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{number}.png")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    common = ["--steps=2", "--device=cpu", "--class=3", "--strength=0.5"]
    for name in ("frames", "moving.gif"):
        out = tmp_path / f"out-{name}"
        assert main(["sample", digits, "--image", str(tmp_path / name), "--out", str(out), *common]) == 0
        made = [np.asarray(Image.open(out / f"{i}.png"), dtype=int) for i in range(len(list(out.glob("?.png"))))]
        if name == "frames":
            assert len(made) == 3
            assert np.array_equal(made[0], made[1]), "the same frame gives the same picture"
        assert not np.array_equal(made[0], made[-1])
        with Image.open(out / "animation.webp") as animation:
            assert animation.n_frames >= 2
            animation.seek(animation.n_frames - 1)
            assert np.array_equal(np.asarray(animation.convert("RGB"), dtype=int), made[-1])
    third = tmp_path / "out-frames" / "2.png"
    arguments = [str(third), digits, f"--image={tmp_path / 'frames'}", "--device=cpu", "--out", str(tmp_path / "folder")]
    assert main(["again", *arguments]) == 0
    assert (tmp_path / "folder" / "2.png").read_bytes() == third.read_bytes()
    last = str(tmp_path / "out-moving.gif" / f"{len(made) - 1}.png")
    image = f"--image={tmp_path / 'moving.gif'}"
    assert main(["again", last, digits, image, "--device=cpu", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / Path(last).name).read_bytes() == Path(last).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Guidance, devices, folders
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_bytes_in_one_go_in_two_and_in_two_processes(digits: str, tmp_path: Path) -> None:
    common = ["sample", digits, "--steps", "3", "--device=cpu", "--class=0,1,2,3,4,5,6,7,8", "--chunk-size=4"]
    assert main([*common, "--n=9", "--out", str(tmp_path / "one")]) == 0
    for first in (0, 5):
        shifted = [*common[:-2], "--class=" + ",".join(str((first + i) % 9) for i in range(5)), common[-1]]
        assert main([*shifted, f"--n={5 - first // 5}", f"--first={first}", "--out", str(tmp_path / "parts")]) == 0
    two = ldm(*common, "--n=9", "--out", str(tmp_path / "two"), "--devices=2", "--strategy=ddp")
    assert two.returncode == 0, two.stderr
    for index in range(9):
        pictures = {(tmp_path / folder / f"{index}.png").read_bytes() for folder in ("one", "parts", "two")}
        assert len(pictures) == 1, f"picture {index} depends on the others"
    for folder in ("parts", "two"):
        assert (tmp_path / folder / "manifest.jsonl").read_bytes() == (tmp_path / "one" / "manifest.jsonl").read_bytes()
        assert (tmp_path / folder / "grid.png").read_bytes() == (tmp_path / "one" / "grid.png").read_bytes()
    lines = manifest(tmp_path / "one")
    assert [line["index"] for line in lines] == list(range(9))
    assert lines[8] | {"file": "8.png", "condition": {"class": "8"}, "seed": 0, "steps": 3, "chunk_size": 4} == lines[8]
    assert lines[0]["model_sha256"] == model_folder.load(digits).sha256


def test_the_checkpoint_alone_is_enough_and_a_rerun_skips_what_is_done(trained: Path, tmp_path: Path, capsys) -> None:
    checkpoint, out = shutil.copy(trained / "diffusion" / "checkpoints" / "last.ckpt", tmp_path / "alone.ckpt"), tmp_path / "out"
    command = ["sample", str(checkpoint), "--steps=2", "--out", str(out), "--class=3,7", "--device=cpu"]
    assert main([*command, "--n=4"]) == 0
    before = (out / "3.png").stat().st_mtime_ns
    (out / "1.png").unlink()
    assert main([*command, "--n=5"]) == 0
    assert "2 pictures made, 3 were there" in capsys.readouterr().out
    assert (out / "3.png").stat().st_mtime_ns == before
    assert [line["condition"] for line in manifest(out)] == [{"class": name} for name in "37373"]
    assert Image.open(out / "grid.png").size == (2 + 2 * 34, 2 + 3 * 34)
    assert main([*command, "--n=4", "--seed=1"]) == 1
    assert "made with other settings" in capsys.readouterr().err
    assert main([*command, "--n=1", "--seed=1", "--overwrite"]) == 0
    assert [line["seed"] for line in manifest(out)] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs" / "sampling").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sampling_config_makes_pictures(path: Path, digits: str, tmp_path: Path) -> None:
    assert main(["sample", digits, "-c", f"sampling/{path.name}", "--steps=2", "--n=2", "--out", str(tmp_path)]) == 0
    sampler = yaml.safe_load(path.read_text())["sampler"]["class_path"]
    assert [line["sampler"]["class_path"] for line in manifest(tmp_path)] == [f"ldm.diffusion.samplers.{sampler}"] * 2


def test_a_negative_class_takes_the_place_of_no_class(digits: str, tmp_path: Path, capsys) -> None:
    runs = {"none": [], "seven": ["--negative=7"], "three": ["--negative=3"], "plain": []}
    read = {}
    for name, options in runs.items():
        scale = f"--guidance={1 if name == 'plain' else 300}"  # ten steps of training tell classes little apart
        read[name] = sample(digits, tmp_path / name, "--class=3", scale, *options, n=1)[0]
    assert np.abs(read["three"] - read["plain"]).max() <= 1, "away from itself nothing changes"
    assert (read["seven"] != read["none"]).any()
    assert main(["sample", digits, "--n=1", "--class=3", "--guidance=2", "--negative=ten", "--out", str(tmp_path / "bad")]) == 1
    assert "class 'ten' is unknown; allowed: 0, 1" in capsys.readouterr().err


def test_a_model_that_guides_itself_changes_nothing(digits: str, tmp_path: Path) -> None:
    guided = ["--guidance=CFG", f"--guidance.weaker={digits}", "--guidance.scale=5"]
    itself, plain = (sample(digits, tmp_path / str(i), *options, n=1)[0] for i, options in enumerate((guided, ["--guidance=1"])))
    assert np.abs(itself - plain).max() <= 1, "guided by itself nothing changes"


# ---------------------------------------------------------------------------------------------------------------------
# Old spellings
# ---------------------------------------------------------------------------------------------------------------------

OLD = {
    "between": ("--class=3 --to-seed=7 --n=2", "--classes=3 --between=7 --num=2"),
    "mix": ("--class=3 --to-class=8 --n=2", "--class=3 --mix=8 --n=2"),
    "edit": ("--image={three} --source-class=3 --class=8 --n=1", "--image={three} --edit=3 --class=8 --n=1"),
    "shows": ("--image={three} --task=Edit --source-class=3 --class=8 --n=1", "--image={three} --task=Edit --shows=3 --class=8 --n=1"),
    "towards": ("--image={three} --to-image={half} --n=2", "--image={three} --towards={half} --n=2"),
    "film": ("--image={film} --strength=0.6", "--image={film} --task=ImageToImage"),
    "frames": ("--trajectory=2 --per-class=1 --class=3", "--frames=2 --per_class=1 --classes=3"),
    "switches": ("--image={three} --colourise --no-watermark --n=1", "--image={three} --colourise=true --watermark=false --n=1"),
    "overwrite": ("--n=1 --overwrite", "--n=1 --overwrite=true"),
    "size": ("--n=1 --size=48x32", "--n=1 --size=[32,48]"),
    "machine": ("--n=1 --chunk-size=2 --precision=bf16-mixed", "--n=1 --lanes=2 --trainer.precision=bf16-mixed"),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_spellings_make_the_same_picture_and_say_the_new_ones(
    name: str, digits: str, picture: dict[str, str], tmp_path: Path, capsys
) -> None:
    new, old = ([part.format(**picture) for part in options.split()] for options in OLD[name])
    said = []
    for command, options in (
        ("sample", [digits, "--device=cpu", *new]),
        ("predict", ["--model", digits, "--trainer.accelerator=cpu", *old]),
    ):
        assert main([command, *options, "--steps=2", "--out", str(tmp_path / command)]) == 0
        said.append([line for line in capsys.readouterr().err.splitlines() if "is the old spelling" in line])
    for path in [*(tmp_path / "sample").iterdir()]:
        assert path.read_bytes() == (tmp_path / "predict" / path.name).read_bytes()
    assert said[0] == []
    changed = [part for part in ["--trainer.accelerator=cpu", *old] if part not in new and not part.startswith("--task=Im")]
    assert len(said[1]) == len(changed), "a line for each"


def test_predict_is_sample_under_another_name() -> None:
    assert COMMANDS["predict"][0] == COMMANDS["sample"][0] == "ldm.commands.sample"


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "--mask={mask}": "--mask needs an image: give --image FILE",
    "--image={three} --mask={half}": "has 48x24 px, the image 48x40: make them alike",
    "--image={three} --strength=1.5": "strength is 1.5; allowed is 0",
    "--image={three} --upscale=2 --deblur=1": "choose one task",
    "--class=ten": "class 'ten' is unknown; allowed: 0, 1",
    "--image=nothing.png": "there is no file 'nothing.png'",
    "--image=pyproject.toml": "'pyproject.toml' cannot be read: ",
    "--image=": "--image is empty: was a shell variable not set?",
    "--image={three} --upscale=2 --strength=0.5": "--strength means nothing to --upscale: leave it out",
    "--size=0x30": "--size is '0x30'; give WIDTHxHEIGHT",
    "--size=large": "--size is 'large'; give WIDTHxHEIGHT",
    "--to-image={three}": "--to-image needs an image: give --image FILE",
    "--class=3 --to-class=ten": "class 'ten' is unknown; allowed: 0, 1",
    "--tile=30": "tiles of 30 px with an overlap of 4: both must be multiples",
    "--n=0": "--n is 0; allowed is 1 or more",
    "--n=many": "--n is 'many'; give a whole number",
    "--image={three} --outpaint=8,8": "--outpaint is [8, 8]; give 4 numbers",
    "--image={three} --outpaint=-8,0,0,0": "--outpaint is [-8, 0, 0, 0]; give 4 numbers",
    "--image={three} --upscale=0": "is 0; allowed is 1 or more",
    "--image={three} --deblur=-1": "the blur is -1.0 px; allowed is more than 0",
    "--image={three} --denoise=-1": "the level of noise to remove is -1.0; allowed is 0 or more",
    "--image={three} --mask={mask} --repaint=0": "--repaint is 0; allowed is 1 or more",
    "--image={three} --repaint=5": "--repaint means nothing without --mask or --outpaint: leave it out",
    "--strength=0.5": "--strength needs an image: give --image FILE",
    "--steps=0": "0 sampling steps were asked for; this schedule allows 1 to 1000",
    "--trajectory=-1": "--trajectory is -1; allowed is 0 or more",
    "--device=tpu": "--device is 'tpu'; allowed are auto, cpu, cuda, mps",
    **({} if torch.cuda.is_available() else {"--device=cuda": "device is 'cuda', which this machine does not have: choose auto or cpu"}),
    "--image={three} --size=32 --upscale=100": "cannot be 100 times larger than an image",
    "--seed=-1": "--seed is -1; allowed is 0 or more",
    "--seed=18446744073709551616": "seed is 18446744073709551616; allowed is 0 to 2^64 - 1",
    "--to-seed=-7": "--to-seed is -7; allowed is 0 or more",
    "--image={broken}": "broken.png' cannot be read: ",
    "--image={three} --to-image={broken}": "broken.png' cannot be read: ",
    "--image={film} --strength=0.5": "has 2 frames, each of which becomes a picture: leave the number 1 out",
    "--class=3,8 --to-seed=7 --n=2": "have one class or prompt, several were given: choose one",
    "--class=3 --unconditional": "a condition was given together with --unconditional: leave one out",
    "--sampler=DDIN": "--sampler is 'DDIN'; allowed are DDIM, ",
    "--sampler=DDIM --sampler.eta=much": "--sampler.eta is 'much'; DDIM takes a number",
    "--sampler=DDIM --sampler.etta=1": "--sampler.etta is unknown: DDIM takes eta",
    "--sampler.eta=1": "--sampler.eta was given without --sampler NAME: name the class",
    "--clas=3": "there is no option --clas: did you mean --class",
    "a red flag": "'a' belongs to no option: put values right behind their option, and text with spaces in quotes",
    "--spacing=even": "--spacing is 'even'; allowed are ",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_sentence(options: str, digits: str, picture: dict[str, str], tmp_path: Path, capsys) -> None:
    arguments = [part.format(**picture) for part in options.split()]
    command = ["sample", digits, "--steps=2", *([] if "--n" in options else ["--n=1"]), "--out", str(tmp_path / "out")]
    device = [] if "--device" in options else ["--device=cpu"]
    assert main([*command, *device, *arguments]) == 1
    said = capsys.readouterr().err
    assert MISTAKES[options] in said
    assert said.count("\n") == 1
    assert said.startswith("ldm sample: ")
    assert settings_in(tmp_path / "out" / "0.png") is None
