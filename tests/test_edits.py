"""What edits promise: the input's shape, the pixels that were not asked for, what was measured, strength as a level of time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal
from PIL import Image

from ldm.cli import main
from ldm.data.images import EmojiImages
from ldm.data.transforms import as_image
from ldm.degradations import Degradation, Downscale, GaussianBlur, Grayscale
from ldm.diffusion.schedule import CosineSchedule, LDMSchedule
from ldm.ranges import to_float, to_uint8
from ldm.sampling.pipeline import cropped, padded_to
from ldm.sampling.request import SeedNoise
from ldm.sampling.tasks import levels_below

FEW = ["--steps=2", "--n=1", "--device=cpu"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A face, a wide picture of two emoji, a mask of the face's centre, as PNG files."""
    emoji, wide = EmojiImages(), Image.new("RGB", (96, 48), "white")
    as_image(emoji.pixels(0)).save(tmp_path / "face.png")
    for place, index in ((0, 40), (48, 900)):
        wide.paste(as_image(emoji.pixels(index)).resize((48, 48)), (place, 0))
    wide.save(tmp_path / "wide.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def sample(out: Path, *options: str, model: str = "emoji") -> np.ndarray:
    assert main(["sample", model, *FEW, "--out", str(out), *options]) == 0
    return pixels(out / "0.png")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


# ---------------------------------------------------------------------------------------------------------------------
# The input's shape, and its pixels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--strength=0.3"], (96, 48)),
        (["--outpaint=30,0,5,0"], (126, 53)),
        (["--upscale=2"], (192, 96)),
        (["--deblur=1"], (96, 48)),
        (["--colourise"], (96, 48)),
        (["--style", "--class=cat-face"], (96, 48)),
        (["--denoise=0.3"], (96, 48)),
        (["--strength=0.3", "--size=48x24"], (48, 24)),
    ],
    ids=lambda value: str(value),
)
def test_the_picture_has_the_shape_of_the_image(options: list[str], size: tuple[int, int], pictures: Path) -> None:
    made = sample(pictures / "out", f"--image={pictures / 'wide.png'}", *options)
    assert made.shape == (size[1], size[0], 3)


def test_what_resizing_cuts_off_is_said(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(pictures / "out", f"--image={pictures / 'wide.png'}", "--strength=0.3", "--size=64x64")
    assert "wide.png has 96x48 px: 48 px of its width are cut off for the shape 64x64" in capsys.readouterr().err


def test_a_picture_is_outpainted_again_and_again(pictures: Path) -> None:
    source, first = pictures / "wide.png", pixels(pictures / "wide.png")
    for round_ in range(3):
        made = sample(pictures / f"out{round_}", f"--image={source}", "--outpaint=0,20,0,0")
        assert made.shape == (48, 96 + 20 * (round_ + 1), 3)
        assert np.array_equal(made[:, :96], first), "with the watermark, too"
        source = pictures / f"out{round_}" / "0.png"


def test_ten_edits_in_a_row_leave_unmasked_pixels_bit_equal(pictures: Path) -> None:
    face, keep = pixels(pictures / "face.png"), pixels(pictures / "mask.png")[..., 0] == 0
    source = pictures / "face.png"
    for k in range(10):
        mask = ["--mask", str(pictures / "mask.png"), "--class=face-smiling", f"--seed={k}"]
        made = sample(pictures / "out", f"--image={source}", *mask, "--overwrite")
        assert np.array_equal(made[keep], face[keep])
        assert not np.array_equal(made[~keep], face[~keep])
        source = pictures / "out" / "0.png"


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), multiple=st.integers(1, 17))
def test_padding_is_undone_by_cropping(height: int, width: int, multiple: int) -> None:
    x = normal(1, 2, height, width)
    padded = padded_to(x, multiple)
    assert padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    assert padded.shape[2] < height + multiple
    assert torch.equal(cropped(padded, (height, width)), x)


def test_a_label_mask_of_another_size_and_orientation_is_used(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values 0 and 1, half the size, and both files turned by EXIF as a phone's editor saves them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image, turned = Image.open(pictures / "wide.png"), np.zeros((24, 48), dtype=np.uint8)
    image.save(pictures / "turned.png", exif=exif)
    turned[:, 30:] = 1
    Image.fromarray(turned).save(pictures / "labels.png", exif=exif)
    made = sample(pictures / "out", f"--image={pictures / 'turned.png'}", f"--mask={pictures / 'labels.png'}", "--no-watermark")
    before = np.rot90(pixels(pictures / "wide.png"), -1)
    assert made.shape == before.shape == (96, 48, 3)
    assert np.array_equal(made[:60], before[:60])
    assert not np.array_equal(made[60:], before[60:])
    assert "1 is taken for white" in capsys.readouterr().err


def test_a_thin_stroke_is_not_lost_where_the_image_is_shrunk(pictures: Path) -> None:
    Image.new("RGB", (640, 640), "orange").save(pictures / "large.png")
    stroke = np.zeros((640, 640), dtype=np.uint8)
    stroke[318:322] = 255
    Image.fromarray(stroke).save(pictures / "stroke.png")
    files = [f"--image={pictures / 'large.png'}", f"--mask={pictures / 'stroke.png'}", "--size=64x64", "--no-watermark"]
    made = sample(pictures / "out", *files)
    flat = pixels(pictures / "large.png")[0, 0]
    changed = (made != flat).any(axis=(1, 2))
    assert changed[31:33].all()
    assert not changed[:31].any()
    assert not changed[33:].any()


def test_a_mask_without_white_is_refused_before_sampling(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (64, 64)).save(pictures / "black.png")
    files = ["--image", str(pictures / "face.png"), "--mask", str(pictures / "black.png")]
    assert main(["sample", "emoji", *FEW, *files, "--out", str(pictures / "out")]) == 1
    assert "black.png' has no white part" in capsys.readouterr().err
    assert not (pictures / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What was measured stays
# ---------------------------------------------------------------------------------------------------------------------


def test_a_colourised_picture_has_the_luminance_that_was_given(pictures: Path) -> None:
    grey = Image.open(pictures / "face.png").convert("L")
    grey.save(pictures / "grey.png")
    made = sample(pictures / "out", f"--image={pictures / 'grey.png'}", "--colourise", "--no-watermark")
    assert np.abs(np.asarray(Image.fromarray(made.astype(np.uint8)).convert("L"), dtype=int) - np.asarray(grey, dtype=int)).max() <= 1
    assert np.ptp(made, axis=2).max() > 20, "with colours"


@pytest.mark.parametrize(("option", "degradation"), [("--upscale=4", Downscale(4)), ("--deblur=2", GaussianBlur(2.0))], ids=str)
def test_a_restored_picture_degrades_to_what_was_given(option: str, degradation: Degradation, pictures: Path) -> None:
    truth = to_float(EmojiImages().pixels(0))[None]
    given = to_uint8(degradation(truth))[0]
    as_image(given).save(pictures / "given.png")
    made = sample(pictures / "out", f"--image={pictures / 'given.png'}", option, "--no-watermark")
    again = degradation(to_float(torch.from_numpy(made.astype(np.uint8)).permute(2, 0, 1))[None])
    assert (again - to_float(given)).abs().max() * 127.5 < 1.0, "less than a level"


@pytest.mark.parametrize("degradation", [Downscale(4), GaussianBlur(1.5), Grayscale()], ids=str)
def test_fitting_reaches_what_was_measured_and_keeps_what_fits(degradation: Degradation) -> None:
    truth = normal(2, 3, 16, 16).clamp(-1, 1).float()
    y = degradation(truth)
    found = degradation.fit(normal(2, 3, 16, 16, seed=1).clamp(-1, 1).float(), y, 600)
    assert found.min() >= -1
    assert found.max() <= 1
    assert (degradation(found) - y).abs().max() * 127.5 < 0.6
    kept = 5 if isinstance(degradation, Grayscale) else 0.6  # levels: to be exact in 8 bits, luma moves blue by up to 4
    assert (degradation.fit(truth, y, 600) - truth).abs().max() * 127.5 < kept


@settings(deadline=None, max_examples=60)
@given(colour=st.tuples(*[st.integers(0, 255)] * 3), luma=st.integers(0, 255))
def test_any_colour_takes_any_luminance(colour: tuple[int, int, int], luma: int) -> None:
    x = to_float(torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1))
    y = to_float(torch.full((1, 3, 1, 1), luma, dtype=torch.uint8))
    fitted = to_uint8(Grayscale().fit(x, y))
    shown = Image.fromarray(fitted[0].permute(1, 2, 0).numpy()).convert("L")
    assert abs(shown.getpixel((0, 0)) - luma) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Strength, seeds
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(strength=st.floats(0.01, 1), n=st.integers(1, 50))
def test_strength_is_the_time_at_which_sampling_starts(strength: float, n: int) -> None:
    for schedule in (LDMSchedule(), CosineSchedule()):
        sigmas = schedule.steps(n)
        below = levels_below(schedule, sigmas, strength)
        assert len(below) == len(sigmas), "all steps are done"
        assert float(schedule.t(below[0])) == pytest.approx(strength * float(schedule.t(sigmas[0])), abs=1e-6)
        assert float(below[-1]) == 0
        assert (below.diff() <= 0).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_strengths_differ_with_few_steps(steps: int, pictures: Path) -> None:
    face = pixels(pictures / "face.png")
    common = [f"--image={pictures / 'face.png'}", "--class=face-smiling", f"--steps={steps}", "--no-watermark"]
    far = [float(np.abs(sample(pictures / str(s), *common, f"--strength={s}") - face).mean()) for s in (0.1, 0.3, 0.6)]
    assert far == sorted(far)
    assert far[2] > 1.3 * far[0]


seeds = st.integers(0, 2**64 - 1)
indices = st.integers(0, 2**40)


@settings(deadline=None, max_examples=200)
@given(a=st.tuples(seeds, indices), b=st.tuples(seeds, indices))
def test_no_two_pictures_share_their_noise(a: tuple[int, int], b: tuple[int, int]) -> None:
    one, other = (SeedNoise(*each).draws((8,))() for each in (a, b))
    assert torch.equal(one, other) == (a == b)


@pytest.mark.parametrize("seed", [5, 2**32 - 1])
def test_small_seeds_keep_their_noise_and_large_ones_have_their_own(seed: int) -> None:
    before = np.random.default_rng([seed, 7]).standard_normal((4,), dtype=np.float32)
    assert np.array_equal(SeedNoise(seed, 7).draws((4,))().numpy(), before)
    large = SeedNoise(seed + 7 * 2**32, 0).draws((4,))()
    assert not np.array_equal(large.numpy(), before), "[seed + 7 * 2^32, 0] is [seed, 7, 0] to numpy"


def test_what_is_not_finite_is_an_error(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "emoji", *FEW, "--class=face-smiling", "--guidance=1e30", "--out", str(pictures / "out")]
    assert main(command) == 1
    assert "picture 0 is not finite, nothing was written for it: lower --guidance" in capsys.readouterr().err
    assert not (pictures / "out" / "0.png").exists()


def test_a_task_without_noise_makes_one_picture_and_says_so(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make: Callable[..., np.ndarray] = sample
    make(pictures / "out", f"--image={pictures / 'face.png'}", "--denoise=0.3", "--n=3")
    assert "one picture is made, not 3" in capsys.readouterr().err
    assert not (pictures / "out" / "1.png").exists()
