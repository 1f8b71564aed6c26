"""Tasks without training: on the Gaussian oracle, and through `ldm sample` at toy size."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from PIL import Image
from test_diffusion import MU, C, close, flow, no_noise, normal, oracle, quick, replay
from torch import Tensor

from ldm import model_folder
from ldm.cli import main
from ldm.data.datasets import DigitImages, EmojiImages
from ldm.data.transforms import as_image
from ldm.degradations import Blurred, Grey, Smaller
from ldm.diffusion.samplers import Ancestral, Heun, RePaint
from ldm.diffusion.schedule import LinearSchedule
from ldm.diffusion.tasks import Between, Edit, ImageToImage, Inpaint, Outpaint, RemoveNoise, Restore, Style, slerp, windows
from ldm.interfaces import Given, Task
from ldm.stages.generation import Recipe, Request, generate

SCHEDULE = LinearSchedule()


def given(z0: Tensor, mask: Tensor | None = None, y: Tensor | None = None) -> Given:
    """Images that are their own latents."""
    return Given(z0 if y is None else y, z0, torch.ones_like(z0[:, :1]) if mask is None else mask, z0, oracle, lambda z: z)


def run(task: Task, known: Given, n: int = 50, sampler: Any = None, seed: int = 9) -> Tensor:
    noise = replay([normal(*known.z0.shape, seed=seed + i) for i in range(1000)])
    x, sigmas = task.start(known, noise, SCHEDULE, SCHEDULE.steps(n))
    return task.finish((sampler or Ancestral()).sample(task.wrap(oracle, known), x, sigmas, noise), known)


# ---------------------------------------------------------------------------------------------------------------------
# From an image
# ---------------------------------------------------------------------------------------------------------------------


def test_strength_0_is_the_image_and_strength_1_ignores_it() -> None:
    one, other = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    assert torch.equal(run(ImageToImage(0.0), given(one)), one)
    assert torch.equal(run(ImageToImage(1.0), given(one)), run(ImageToImage(1.0), given(other)))
    assert torch.equal(run(ImageToImage(1.0), given(one)), run(Task(), given(one)))
    distances = [float((run(ImageToImage(s), given(one)) - one).norm()) for s in (0.2, 0.5, 0.8)]
    assert distances == sorted(distances)
    with pytest.raises(ValueError, match=r"strength is 1\.2; allowed is 0"):
        ImageToImage(1.2)


@quick
@for_all(strength=st.floats(0.001, 1), n=st.integers(1, 60))
def test_the_share_of_the_steps_that_is_done(strength: float, n: int) -> None:
    calls = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return oracle(x, sigma)

    z0 = normal(1, 3, 2, 2)
    x, sigmas = ImageToImage(strength).start(given(z0), lambda: normal(1, 3, 2, 2), SCHEDULE, SCHEDULE.steps(n))
    Ancestral().sample(counted, x, sigmas, no_noise)
    assert strength * n <= len(calls) <= strength * n + 1


def test_noise_of_a_known_level_is_removed_along_the_flow() -> None:
    noisy, level = MU + normal(5, 3, 1, 1), 0.7
    found = run(RemoveNoise(level), given(noisy), n=400, sampler=Heun())
    close(found, flow(noisy, torch.tensor(level), torch.tensor(0.0)), 1e-3)


def test_from_one_image_to_another_both_come_back() -> None:
    one, other = MU + C * normal(3, 3, 1, 1), MU + C * normal(3, 3, 1, 1, seed=5)
    errors = {}
    for n in (50, 200):
        pair = given(one)._replace(other=other, share=torch.tensor([0.0, 1.0, 0.5]))
        found = run(Between(), pair, n)
        errors[n] = max(float((found[0] - one[0]).abs().max()), float((found[1] - other[1]).abs().max()))
    assert errors[200] < errors[50] / 3
    assert errors[200] < 0.2
    with pytest.raises(ValueError, match="needs a second image"):
        run(Between(), given(one), 4)


def test_inversion_finds_the_way_back_better_with_more_steps() -> None:
    z0 = MU + C * normal(4, 3, 1, 1)
    errors = [float((run(Edit(0.8), given(z0), n) - z0).abs().max()) for n in (25, 100, 400)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.06


def test_style_takes_over_the_statistics_of_the_image() -> None:
    z0 = 3 * normal(2, 3, 8, 8) + 1
    made = run(Style(until=0.0), given(z0))
    close(made.mean((2, 3)), z0.mean((2, 3)), 1e-6)
    close(made.std((2, 3)), z0.std((2, 3)), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Inpainting
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Ancestral(), Ancestral(1.0), RePaint(times=3)], ids=repr)
def test_what_is_known_stays_bit_for_bit(sampler: Any) -> None:
    z0, mask = normal(2, 3, 4, 4), (normal(2, 1, 4, 4, seed=1) > 0).double()
    for strength in (0.4, 1.0):
        made = run(Inpaint(strength), given(z0, mask), sampler=sampler)
        assert torch.equal(torch.where(mask == 0, made, 0), torch.where(mask == 0, z0, 0))
        assert ((made != z0) | (mask == 0)).all()


def test_a_latent_is_made_anew_where_any_of_its_pixels_is() -> None:
    x, mask = normal(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[..., 0, 5] = 1
    z0 = x[..., ::4, ::4]
    seen = Inpaint().wrap(lambda x, sigma: x * 0 + 7, Given(x, x, mask, z0, oracle, lambda z: z))(z0, torch.tensor(1.0))
    assert (seen[..., 0, 1] == 7).all()
    assert int((seen == 7).sum()) == 3


def test_outpainting_keeps_the_image_in_its_place() -> None:
    x = normal(1, 3, 4, 6)
    task = Outpaint(left=2, bottom=3)
    large, mask = task.canvas(x, torch.ones(1, 1, 4, 6))
    assert large.shape == (1, 3, 7, 8)
    assert torch.equal(large[..., :4, 2:], x)
    assert torch.equal(mask[..., :4, 2:], torch.zeros(1, 1, 4, 6))
    assert int(mask.sum()) == 7 * 8 - 4 * 6


def test_repeated_steps_keep_the_marginals() -> None:
    count, sigmas = 2000, SCHEDULE.steps(1000)
    draw = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(count, 3, 1, 1, generator=draw, dtype=torch.float64)  # noqa: E731
    made = RePaint(times=3).sample(oracle, SCHEDULE.prior(noise(), sigmas[0]), sigmas, noise)
    assert float(((made.mean(0) - MU[0]).abs() / (C[0] / count**0.5)).max()) < 4
    assert float((made.std(0) / C[0] - 1).abs().max()) < 4 / (2 * count) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degradation", [Smaller(4), Blurred(1.5), Grey()], ids=repr)
def test_a_restored_picture_fits_what_was_measured(degradation: Any) -> None:
    truth = MU + C * normal(3, 3, 16, 16)
    y = degradation(truth)
    task = Restore(degradation)
    x, _ = task.canvas(y, torch.ones_like(y[:, :1]))
    assert x.shape == truth.shape
    error = {}
    for name, chosen in {"restored": task, "sampled": Task()}.items():
        made = run(chosen, given(x, y=y), n=100)
        error[name] = float((degradation(made) - y).square().mean())
    assert error["restored"] < 0.02 * error["sampled"]


def test_degradations_keep_what_is_constant_and_grey_is_luma() -> None:
    flat = torch.full((1, 3, 16, 16), 0.3)
    for degradation in (Smaller(4), Blurred(2.0), Grey()):
        close(degradation(flat), torch.full_like(degradation(flat), 0.3), 1e-6)
    close(Grey()(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)), torch.full((1, 3, 1, 1), 0.299), 1e-6)
    impulse = torch.zeros(1, 3, 31, 31)
    impulse[..., 15, 15] = 1
    row = Blurred(2.0)(impulse)[0, 0, 15]
    spread = (row * (torch.arange(31) - 15) ** 2).sum() / row.sum()
    assert float(spread) == pytest.approx(4, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Windows, interpolation
# ---------------------------------------------------------------------------------------------------------------------


@quick
@for_all(height=st.integers(4, 15), width=st.integers(4, 15), overlap=st.floats(0, 0.9))
def test_windows_leave_a_local_d_alone(height: int, width: int, overlap: float) -> None:
    x, sigma, sizes = normal(2, 3, height, width), torch.tensor(0.7), set()

    def local(x: Tensor, sigma: Tensor) -> Tensor:
        sizes.add(tuple(x.shape[2:]))
        return oracle(x, sigma)

    close(windows(local, (4, 4), overlap)(x, sigma), oracle(x, sigma), 1e-12)
    assert sizes == {(4, 4)}


def test_windows_leave_no_seams_in_pictures() -> None:
    """The step in brightness where the middle window ends (columns 32 and 96), relative to the steps 4, 8 and 12 px beside it: windows
    that count everywhere alike had 2.7 and 3.0 in eight such pictures."""
    loaded = model_folder.load("emoji")
    recipe = replace(Recipe.of(loaded.card), steps=8, size=(64, 128), windows=True)
    requests = [Request(i, 0, name) for i, name in enumerate(loaded.card["classes"][::6])]
    steps = generate(loaded.model, requests, recipe, loaded.card["classes"]).diff(dim=3).abs().mean((0, 1, 2))
    for column in (32, 96):
        beside = torch.stack([steps[column - 1 + offset] for offset in (-12, -8, -4, 4, 8, 12)])
        assert steps[column - 1] < 1.3 * beside.mean()


@quick
@for_all(weight=st.floats(0, 1), seed=st.integers(0, 1000))
def test_slerp_goes_from_one_to_the_other_and_keeps_the_length(weight: float, seed: int) -> None:
    a, b = normal(3, 8, 8, seed=seed), normal(3, 8, 8, seed=seed + 5000)
    close(slerp(a, b, 0.0), a, 1e-12)
    close(slerp(a, b, 1.0), b, 1e-12)
    between = slerp(a, b, weight)
    assert 0.97 * min(a.norm(), b.norm()) <= between.norm() <= 1.03 * max(a.norm(), b.norm())
    close(slerp(a, a, weight), a, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> dict[str, str]:
    """A digit of 64x64 px, a mask of its right half."""
    as_image(DigitImages(64).pixels(3)).save(tmp_path / "three.png")
    as_image(DigitImages(8).pixels(3)).save(tmp_path / "small.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:32]).save(tmp_path / "half.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "three.png").read_bytes()[:200])
    (tmp_path / "film").mkdir()
    for name in ("three", "half"):
        shutil.copy(tmp_path / f"{name}.png", tmp_path / "film")
    files = {name: str(tmp_path / f"{name}.png") for name in ("three", "small", "mask", "half", "broken")}
    return {**files, "film": str(tmp_path / "film")}


def sample(model: Path, out: Path, *options: str) -> list[np.ndarray]:
    steps = [] if any(option.startswith("--steps") for option in options) else ["--steps=2"]
    assert main(["sample", str(model), *steps, "--n=2", "--out", str(out), "--device=cpu", *options]) == 0
    return [np.asarray(Image.open(out / f"{i}.png"), dtype=int) for i in range(2)]


CASES = {
    "image": ["--image={three}", "--strength=0.5"],
    "mask": ["--image={three}", "--mask={mask}"],
    "repaint": ["--image={three}", "--mask={mask}", "--repaint=2"],
    "outpaint": ["--image={three}", "--outpaint=[8,0,0,8]"],
    "edit": ["--image={three}", "--edit=3", "--class=8"],
    "upscale": ["--image={small}", "--upscale=4"],
    "deblur": ["--image={three}", "--deblur=2"],
    "colourise": ["--image={three}", "--colourise=true"],
    "denoise": ["--image={three}", "--denoise=0.3"],
    "style": ["--image={three}", "--style=true"],
    "towards": ["--image={three}", "--towards={half}", "--guidance=1"],
    "mix": ["--class=3", "--mix=8"],
    "size": ["--size=48x64"],
    "tile": ["--size=48x64", "--tile=32"],
    "between": ["--between=7"],
    "negative": ["--class=3", "--negative=8", "--guidance=4"],
}


@pytest.mark.parametrize("name", CASES)
def test_every_task_has_an_option_and_its_settings_are_kept(name: str, trained: Path, picture: dict[str, str], tmp_path: Path) -> None:
    options = [option.format(**picture) for option in CASES[name]]
    made = sample(trained / "diffusion" / "model", tmp_path / "out", *options)
    size = {"outpaint": (40, 40), "size": (64, 48), "tile": (64, 48)}.get(name, (32, 32))
    assert made[0].shape == (*size, 3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert ("image_sha256" in lines[0]) == ("image" in options[0])
    if name == "between":
        assert [(line["seed"], line["towards_seed"], line.get("share", 0.0)) for line in lines] == [(0, 7, 0.0), (0, 7, 1.0)]
    if name in ("mask", "repaint"):
        shown = np.asarray(Image.open(picture["three"]).resize((32, 32), Image.Resampling.LANCZOS), dtype=int)
        assert np.array_equal(made[0][:, :16], shown[:, :16]), "what is known has the given pixels"
    files = [option for option in options if option.split("=")[0] in ("--image", "--mask", "--towards")]
    again = ["again", str(tmp_path / "out" / "1.png"), str(trained / "diffusion" / "model"), *files, "--device=cpu"]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "1.png").read_bytes() == (tmp_path / "out" / "1.png").read_bytes()


def test_what_does_not_belong_to_a_picture_is_refused(trained: Path, picture: dict[str, str], tmp_path: Path, capsys) -> None:
    model = str(trained / "diffusion" / "model")
    sample(Path(model), tmp_path / "out", f"--image={picture['three']}")
    made = str(tmp_path / "out" / "0.png")
    cases = {
        (picture["three"], model): "carries no settings of ldm",
        (made, "emoji"): "was made by another model",
        (made, model): "was made from the image three.png: give it with --image",
        (made, model, f"--image={picture['half']}"): "made with another file as image",
        (made, model, f"--image={picture['three']}", f"--towards={picture['half']}"): "made with another file as towards, or with none",
    }
    for arguments, message in cases.items():
        assert main(["again", *arguments, "--device=cpu", "--out", str(tmp_path / "again")]) == 1
        assert message in capsys.readouterr().err


def test_how_a_picture_comes_about_is_shown(trained: Path, tmp_path: Path) -> None:
    model, out = trained / "diffusion" / "model", tmp_path / "out"
    made = sample(model, out, "--frames=3", "--steps=4", "--class=3,8", "--preview=true", "--watermark=false")
    preview = np.asarray(Image.open(out / "preview.png"), dtype=int)
    for i, start in enumerate((2, 36)):
        assert np.abs(preview[2:34, start : start + 32] - made[i]).max() <= 1, "after the last step"
    for i in range(2):
        strip = np.asarray(Image.open(out / f"{i}-steps.png"), dtype=int)
        assert strip.shape == (36, 2 + 3 * 34, 3)
        assert np.abs(strip[2:34, 2 + 2 * 34 : -2] - made[i]).max() <= 1, "the last D is the picture"
        with Image.open(out / f"{i}.gif") as animation:
            assert animation.n_frames >= 3


def test_interpolation_ends_in_the_pictures_of_both_seeds(trained: Path, tmp_path: Path) -> None:
    model = trained / "diffusion" / "model"
    ends = sample(model, tmp_path / "between", "--between=7", "--class=3")
    zero, seven = (sample(model, tmp_path / seed, f"--seed={seed}", "--class=3")[0] for seed in ("0", "7"))
    assert np.array_equal(ends[0], zero)
    assert np.array_equal(ends[1], seven)


def test_a_mixture_of_conditions_ends_in_both(tmp_path: Path) -> None:
    cat, flag = "--class=cat-face", "--class=country-flag"
    ends = sample(Path("emoji"), tmp_path / "mixed", cat, "--mix=country-flag", "--watermark=false")
    one, other = (sample(Path("emoji"), tmp_path / name[8:], name, "--watermark=false")[0] for name in (cat, flag))
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
    options = [f"--image={files[0]}", f"--towards={files[1]}", "--guidance=1", "--steps=25", *condition]
    ends = sample(Path("emoji"), tmp_path / "out", *options)
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert (line["class"] is None) == (not condition)
    for end, file in zip(ends, files, strict=True):
        assert psnr(end, np.asarray(Image.open(file))) > 25


def test_predict_makes_what_sample_makes(trained: Path, picture: dict[str, str], tmp_path: Path) -> None:
    model = trained / "diffusion" / "model"
    cases = {
        "between": (["--class=3", "--between=7"], ["--classes=3", "--between=7", "--num=2"]),
        "mix": (["--class=3", "--mix=8"], ["--classes=3", "--mix=8", "--num=2"]),
        "film": ([f"--image={picture['film']}"], [f"--image={picture['film']}", "--task=ImageToImage"]),
        "image": ([f"--image={picture['three']}", "--n=2"], [f"--image={picture['three']}", "--task=ImageToImage", "--num=2"]),
    }
    for name, (ours, theirs) in cases.items():
        numbers = ["--n=2"] if name in ("between", "mix") else []
        common = ["--steps=2", "--watermark=false"]
        assert main(["sample", str(model), *common, "--device=cpu", "--out", str(tmp_path / f"s-{name}"), *numbers, *ours]) == 0
        predicted = ["predict", "--model", str(model), *common, "--trainer.accelerator=cpu", "--out", str(tmp_path / f"p-{name}")]
        assert main([*predicted, *theirs]) == 0
        for i in range(2):
            assert (tmp_path / f"s-{name}" / f"{i}.png").read_bytes() == (tmp_path / f"p-{name}" / f"{i}.png").read_bytes()


def test_frames_share_their_noise_and_become_an_animation(trained: Path, picture: dict[str, str], tmp_path: Path) -> None:
    model, three = trained / "diffusion" / "model", Image.open(picture["three"]).convert("RGB")
    frames = [three, three, three.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{number}.png")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    common = ["--steps=2", "--device=cpu", "--class=3", "--strength=0.5"]
    for name in ("frames", "moving.gif"):
        out = tmp_path / f"out-{name}"
        assert main(["sample", str(model), "--image", str(tmp_path / name), "--out", str(out), *common]) == 0
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
    arguments = [str(third), str(model), f"--image={tmp_path / 'frames'}", "--device=cpu", "--out", str(tmp_path / "folder")]
    assert main(["again", *arguments]) == 0
    assert (tmp_path / "folder" / "2.png").read_bytes() == third.read_bytes()
    last = str(tmp_path / "out-moving.gif" / f"{len(made) - 1}.png")
    image = f"--image={tmp_path / 'moving.gif'}"
    assert main(["again", last, str(model), image, "--device=cpu", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / Path(last).name).read_bytes() == Path(last).read_bytes()


MISTAKES = {
    "--mask={mask}": "--mask needs an image: give --image FILE",
    "--image={three} --mask={half}": "has 64x32 px, the image 64x64: make them alike",
    "--image={three} --strength=1.5": "strength is 1.5; allowed is 0",
    "--image={three} --upscale=2 --deblur=1": "choose one task",
    "--class=ten": "class 'ten' is unknown; allowed: 0, 1",
    "--image=nothing.png": "No such file or directory: nothing.png",
    "--image=pyproject.toml": "cannot identify image file",
    "--image={three} --upscale=2 --strength=0.5": "--strength means nothing to --upscale: leave it out",
    "--size=30x30": "both must be multiples of the autoencoder's factor 4",
    "--size=large": "give WIDTHxHEIGHT",
    "--towards={three}": "--towards needs an image: give --image FILE",
    "--class=3 --mix=ten": "class 'ten' is unknown; allowed: 0, 1",
    "--tile=30": "tiles of 30 px with an overlap of 4: both must be multiples",
    "--n=0": "n is 0; allowed is 1 or more",
    "--image={three} --outpaint=[8,8]": "outpaint is [8, 8]; give 4 numbers",
    "--image={three} --upscale=0": "is 0; allowed is 1 or more",
    "--image={three} --deblur=-1": "the blur is -1.0 px; allowed is more than 0",
    "--image={three} --denoise=-1": "the level of noise to remove is -1.0; allowed is 0 or more",
    "--image={three} --mask={mask} --repaint=0": "times is 0; allowed is 1 or more",
    "--image={three} --repaint=5": "--repaint means nothing without --mask or --outpaint: leave it out",
    "--strength=0.5": "--strength needs an image: give --image FILE",
    "--steps=0": "0 sampling steps were asked for; this schedule allows 1 to 1000",
    "--frames=-1": "frames is -1; allowed is 0 (none) or more",
    "--device=tpu": "device",
    **({} if torch.cuda.is_available() else {"--device=gpu": "No supported gpu backend found"}),
    "--image={three} --upscale=100": "upscale is 100, which does not divide the 32x32 px of the picture",
    "--image={three} --outpaint=[30,0,0,0]": "outpaint is [30, 0, 0, 0]; each side must be a multiple of 4 px",
    "--seed=-1": "seed is -1; allowed is 0 or more",
    "--between=-7": "between is -7; allowed is 0 or more",
    "--image={broken}": "broken.png' cannot be read: ",
    "--image={three} --towards={broken}": "broken.png' cannot be read: ",
    "--image={film} --strength=0.5": "has 2 frames, each of which becomes a picture: leave the number 1 out",
    "--class=3,8 --between=7 --n=2": "have one class or prompt, 2 were given: choose one",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_sentence(options: str, trained: Path, picture: dict[str, str], tmp_path: Path, capsys) -> None:
    arguments = [part.format(**picture) for part in options.split()]
    command = [
        "sample",
        str(trained / "diffusion" / "model"),
        "--steps=2",
        *([] if "--n" in options else ["--n=1"]),
        "--out",
        str(tmp_path / "out"),
        "--device=cpu",
    ]
    assert main([*command, *arguments]) == 1
    said = capsys.readouterr().err
    assert MISTAKES[options] in said
    assert said.count("\n") == 1
