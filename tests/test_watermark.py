"""The invisible watermark: found where it was put, nowhere else, not seen, and pixels that are kept stay."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ldm.cli import main
from ldm.data.images import EmojiImages
from ldm.data.modes import as_tensor
from ldm.data.transforms import as_image
from ldm.errors import UserError
from ldm.sampling.settings import settings_in
from ldm.sampling.watermark import (
    BITS,
    MIN_RIGHT,
    ORIGIN_THRESHOLD,
    PERIOD,
    SMALLEST,
    THRESHOLD,
    Found,
    _patterns,
    check,
    mark,
)

datasets = pytest.importorskip("sklearn.datasets")
PHOTOS = [as_tensor(Image.fromarray(pixels)) for pixels in datasets.load_sample_images().images]
EMOJI = EmojiImages()
few = settings(max_examples=10, deadline=None)
some = settings(max_examples=25, deadline=None)
chance = settings(max_examples=60, deadline=None, derandomize=True)  # what is rare, not impossible


def patch(number: int, height: int, width: int | None = None) -> Tensor:
    """Part of a photograph, uint8 (3,height,width)."""
    generator, photo = np.random.default_rng(number), PHOTOS[number % len(PHOTOS)]
    sides = (height, height if width is None else width)
    row, column = (int(generator.integers(full - side + 1)) for full, side in zip(photo.shape[1:], sides, strict=True))
    return photo[:, row : row + sides[0], column : column + sides[1]]


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    data = io.BytesIO()
    as_image(pixels).save(data, "JPEG", quality=quality)
    return as_tensor(Image.open(data))


def change(before: Tensor, after: Tensor) -> Tensor:
    """Change of each pixel in levels, (H,W)."""
    return (after.int() - before.int()).abs().amax(0)


def psnr(before: Tensor, after: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (after.float() - before.float()).square().mean()))


def area(kind: str, height: int, width: int, seed: int) -> Tensor:
    """What is made anew, bool (H,W)."""
    random = np.random.default_rng(seed)
    if kind == "speckles":
        return torch.from_numpy(random.random((height, width)) < random.uniform(0.05, 0.9))
    if kind in ("nothing", "everything"):
        return torch.full((height, width), kind == "everything")
    row, column = (int(random.integers(side * 3 // 4)) for side in (height, width))
    rows, columns = (
        height // 4 + int(random.integers(height // 2)),
        width // 4 + int(random.integers(width // 2)),
    )
    if kind == "rectangle":
        where = torch.zeros(height, width, dtype=torch.bool)
        where[row : row + rows, column : column + columns] = True
        return where
    if kind == "border":
        where = torch.ones(height, width, dtype=torch.bool)
        where[row // 2 : row // 2 + rows, column // 2 : column // 2 + columns] = False
        return where
    y, x = torch.arange(height)[:, None], torch.arange(width)
    return ((y - row) / rows).square() + ((x - column) / columns).square() < 1


KINDS = ("rectangle", "ellipse", "border", "speckles", "nothing", "everything")

# ----------------------------------------------------------------------------------------------------
# Found where it is
# ----------------------------------------------------------------------------------------------------


def test_the_patterns_are_orthonormal_cosines_in_blocks() -> None:
    patterns = _patterns()
    torch.testing.assert_close(torch.einsum("aij,bij->ab", patterns, patterns), torch.eye(len(BITS)))
    assert all((pattern.unfold(0, 8, 8).unfold(1, 8, 8).square().sum((2, 3)) > 0).sum() == 1 for pattern in patterns)
    assert float(patterns[5, 11, 12]) == pytest.approx(-0.163320, abs=1e-6), (
        "other patterns would not find the watermarks of earlier versions"
    )


def test_the_pattern_is_unlike_itself_elsewhere() -> None:
    """What the order of the cosines was chosen by: shifts by blocks, by 2 px or more, the strongest wave."""
    pattern = torch.einsum("k,kij->ij", torch.tensor(BITS).float(), _patterns()) / len(BITS) ** 0.5
    power = torch.fft.fft2(pattern).abs().square()
    cosines = torch.fft.ifft2(power).real.abs()
    assert cosines[0, 0] == pytest.approx(1)
    assert cosines[::8, ::8].flatten()[1:].max() < 0.07
    cosines[[0, 0, 0, 1, 1, 1, -1, -1, -1], [0, 1, -1, 0, 1, -1, 0, 1, -1]] = 0
    assert cosines.max() < 0.3
    assert 2 * power.max() / power.sum() < 0.05


def test_photographs_keep_it_and_have_none_of_their_own() -> None:
    random, lost = np.random.default_rng(0), 0
    for number in range(16):
        pixels = patch(number, 256)
        marked = mark(pixels)
        assert not check(pixels).marked
        assert psnr(pixels, marked) > 36
        assert check(marked).right == len(BITS)
        row, column = (int(offset) for offset in random.integers(26, size=2))
        cropped = marked[:, row : row + 230, column : column + 230]
        assert check(cropped).place == (-row % PERIOD, -column % PERIOD)
        assert check(jpeg(marked, 80)).marked
        assert check(cropped).marked
        lost += not check(jpeg(cropped, 80)).marked
    assert lost <= 1


def test_small_pictures_on_white_carry_it_too() -> None:
    pictures = [EMOJI.pixels(index) for index in range(0, len(EMOJI), 60)]
    marked = [mark(pixels) for pixels in pictures]
    before, after, compressed = ([check(p) for p in shown] for shown in (pictures, marked, [jpeg(p, 80) for p in marked]))
    assert not any(result.marked for result in before)
    assert all(result.marked for result in after)
    assert sum(result.right for result in after) >= 0.98 * len(BITS) * len(pictures)
    assert sum(result.marked for result in compressed) >= 0.85 * len(pictures)  # docs/watermark.md
    assert min(psnr(*pair) for pair in zip(pictures, marked, strict=True)) > 33


def test_enlarged_emoji_carry_it_in_half_a_level() -> None:
    large = EmojiImages(256)
    for index in range(0, len(large), 400):
        pixels = large.pixels(index)
        marked = mark(pixels)
        assert all(check(shown).marked for shown in (marked, jpeg(marked, 80), marked[:, 11:240, 5:236]))
        assert (change(pixels, marked) <= 1).float().mean() > 0.98
        assert psnr(pixels, marked) > 49


@given(
    height=st.integers(SMALLEST, 300),
    width=st.integers(SMALLEST, 300),
    channels=st.sampled_from([1, 3, 4]),
    number=st.integers(0, 99),
)
@some
def test_any_shape_and_number_of_channels(height: int, width: int, channels: int, number: int) -> None:
    photo = patch(number, height, width)
    alpha = torch.randint(0, 256, (1, height, width), dtype=torch.uint8)
    pixels = photo[1:2] if channels == 1 else torch.cat([photo, alpha])[:channels]
    marked = mark(pixels)
    assert (marked.shape, marked.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(marked[3:], pixels[3:]), "alpha stays"
    assert check(marked).marked or torch.equal(marked, pixels), "found, or left alone"
    assert torch.equal(mark(marked), marked)


@pytest.mark.parametrize(("height", "width"), [(48, 600), (400, 49), (128, 128)])
def test_extreme_shapes_carry_it(height: int, width: int) -> None:
    assert check(mark(patch(1, height, width))).marked


def test_pictures_that_are_too_small_and_areas_of_another_shape() -> None:
    with pytest.raises(UserError, match="64x40 px is too small for a watermark: it needs 48"):
        mark(torch.zeros(3, 40, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"where has the shape \(64, 1\), the picture has 64x64 px"):
        mark(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.ones(64, 1, dtype=torch.bool))
    for shape in ((3, 1, 1), (1, 2, 90), (4, 31, 7)):
        assert not check(torch.randint(0, 256, shape, dtype=torch.uint8)).marked


# ----------------------------------------------------------------------------------------------------
# Not seen
# ----------------------------------------------------------------------------------------------------


@given(
    level=st.integers(0, 255),
    height=st.integers(SMALLEST, 260),
    width=st.integers(SMALLEST, 260),
    channels=st.sampled_from([1, 3, 4]),
)
@some
def test_flat_pictures_change_by_one_level_and_carry_all_bits(level: int, height: int, width: int, channels: int) -> None:
    pixels = torch.full((channels, height, width), level, dtype=torch.uint8)
    assert check(pixels).score == 0
    marked = mark(pixels)
    assert change(pixels, marked).max() == 1
    result = check(marked)
    assert result.marked
    assert result.right == len(BITS)
    assert len(marked[0].unique()) == 2, "neighbours differ by one level, as little as possible"


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0), (255, 255, 0), (0, 0, 255), (250, 128, 5)])
@pytest.mark.parametrize("size", [64, 256])
def test_saturated_colours_too(colour: tuple[int, int, int], size: int) -> None:
    pixels = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, size, size)
    marked = mark(pixels)
    assert change(pixels, marked).max() == 1
    assert check(marked).right == len(BITS)
    assert check(jpeg(marked, 90)).marked


def test_white_around_emoji_changes_by_one_level_at_most() -> None:
    for index in range(0, len(EMOJI), 60):
        pixels = EMOJI.pixels(index)
        dark = (pixels.amin(0, keepdim=True) < 255).float()
        white = torch.nn.functional.max_pool2d(dark, 7, 1, 3)[0] == 0
        assert not white.any() or change(pixels, mark(pixels))[white].max() <= 1


def test_the_flat_sides_of_an_edge_are_as_quiet_as_flat_ground_and_texture_hides_more() -> None:
    edge = torch.full((3, 96, 96), 30, dtype=torch.uint8)
    edge[:, :, 48:] = 255
    edge[:, 60:62] = 120
    assert change(edge, mark(edge)).max() == 1
    rough = (128 + 40 * torch.randn(1, 96, 96, generator=torch.Generator().manual_seed(0))).clamp(0, 255).to(torch.uint8)
    both = torch.cat([rough.expand(3, -1, -1), torch.full((3, 96, 96), 200, dtype=torch.uint8)], dim=2)
    difference = change(both, mark(both))
    assert difference[:, 100:].max() == 1
    assert 1 < difference[:, :90].max() <= 8


# ----------------------------------------------------------------------------------------------------
# Never twice, and nowhere else
# ----------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
    quality=st.sampled_from([0, 60, 90]),
    ours=st.booleans(),
)
@some
def test_kept_pixels_stay_and_what_is_marked_is_not_marked_again(kind: str, seed: int, quality: int, ours: bool) -> None:
    pixels = patch(seed, 96, 130) if seed % 2 else EMOJI.pixels(seed)
    pixels = mark(pixels) if ours else pixels
    pixels = jpeg(pixels, quality) if quality else pixels
    where = area(kind, *pixels.shape[1:], seed)
    marked = mark(pixels, where)
    assert torch.equal(marked[:, ~where], pixels[:, ~where])
    assert check(marked).marked or torch.equal(marked, pixels)
    assert torch.equal(mark(marked, where), marked)
    if check(pixels).marked:
        assert torch.equal(marked, pixels)
        assert torch.equal(mark(pixels), pixels)
    if kind == "everything":
        assert torch.equal(marked, mark(pixels))


@given(
    seed=st.integers(0, 999),
    quality=st.sampled_from([0, 80]),
    size=st.sampled_from([64, 192]),
    ours=st.booleans(),
)
@few
def test_ten_edits_in_a_row_keep_what_was_not_edited(seed: int, quality: int, size: int, ours: bool) -> None:
    picture = patch if size > 64 else lambda number, _: EMOJI.pixels(number)
    pixels = mark(picture(seed, size)) if ours else picture(seed, size)
    pixels = jpeg(pixels, quality) if quality else pixels
    first, touched = pixels, torch.zeros(size, size, dtype=torch.bool)
    for number in range(10):
        where = area(KINDS[(seed + number) % 4], size, size, seed + number)
        before = torch.where(where, picture((seed + 7 * number + 1) % 999, size), pixels)
        pixels, touched = mark(before, where), touched | where
        assert torch.equal(pixels[:, ~where], before[:, ~where])
        assert torch.equal(pixels[:, ~touched], first[:, ~touched])
        assert check(pixels).marked or torch.equal(pixels, before)


def test_the_same_area_made_anew_ten_times() -> None:
    """F1: the rest of a face was covered with the pattern after ten rounds (22 dB)."""
    face, where = mark(EMOJI.pixels(0)), torch.zeros(64, 64, dtype=torch.bool)
    where[16:48, 16:48] = True
    pixels = face
    for number in range(10):
        pixels = mark(torch.where(where, EMOJI.pixels(50 * number + 1), pixels), where)
        assert check(pixels).marked
    assert torch.equal(pixels[:, ~where], face[:, ~where])


def test_after_ten_edits_it_is_still_found() -> None:
    """Also where every pixel of the first picture is gone."""
    for seed in range(6):
        pixels = mark(patch(seed, 192))
        for number in range(10):
            where = area(KINDS[(seed + number) % 4], 192, 192, seed + number)
            pixels = mark(torch.where(where, patch(seed + 7 * number + 1, 192), pixels), where)
        assert check(pixels).marked


def test_what_is_made_anew_carries_it_alone_where_it_is_large_enough() -> None:
    found = []
    for number in range(12):
        pixels, where = patch(number, 192), torch.zeros(192, 192, dtype=torch.bool)
        where[:, 72:] = True
        marked = mark(pixels, where)
        found.append(check(marked).marked)
        assert torch.equal(marked[:, :, :72], pixels[:, :, :72])
    assert all(found)
    tiny = torch.zeros(192, 192, dtype=torch.bool)
    tiny[90:100, 90:100] = True
    assert torch.equal(mark(patch(3, 192), tiny), patch(3, 192)), "too small to carry it"


@pytest.mark.parametrize("step", [20, 32])
def test_outpainted_again_and_again_it_is_continued(step: int) -> None:
    """On the left, where what is there moves against the period."""
    pixels, places = mark(EMOJI.pixels(0)), []
    for number in range(1, 11):
        pixels = torch.cat([EMOJI.pixels(60 * number)[:, :, 20 : 20 + step], pixels], dim=2)
        where = (torch.arange(pixels.shape[2]) < step).expand(64, -1)
        before, pixels = pixels, mark(pixels, where)
        assert torch.equal(pixels[:, :, step:], before[:, :, step:])
        assert check(pixels).marked
        places.append(check(pixels).place[1] == number * step % PERIOD)
    assert all(places)


# ----------------------------------------------------------------------------------------------------
# Not found where it is not
# ----------------------------------------------------------------------------------------------------


def test_both_the_score_and_the_bits_decide() -> None:
    assert Found(THRESHOLD, MIN_RIGHT, (3, 0)).marked
    assert Found(ORIGIN_THRESHOLD, MIN_RIGHT, (0, 0)).marked
    assert not Found(THRESHOLD - 0.01, 16, (3, 0)).marked
    assert not Found(ORIGIN_THRESHOLD - 0.01, 16, (0, 0)).marked
    assert not Found(0.9, MIN_RIGHT - 1, (0, 0)).marked


@given(
    seed=st.integers(0, 2**32 - 1),
    amplitude=st.sampled_from([1, 5, 20]),
    quality=st.sampled_from([0, 50, 90]),
)
@chance
def test_tiles_of_its_own_period_are_not_taken_for_it(seed: int, amplitude: int, quality: int) -> None:
    tile = np.random.default_rng(seed).normal(0, amplitude, (PERIOD, PERIOD))
    pixels = torch.from_numpy(np.clip(np.tile(tile, (4, 4)) + 128, 0, 255).astype(np.uint8)).expand(3, -1, -1)
    assert not check(jpeg(pixels, quality) if quality else pixels).marked


@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 16))
@chance
def test_a_few_cosines_on_flat_ground_are_not_taken_for_it(seed: int, blocks: int) -> None:
    """What JPEG leaves of noise: two or three of them reach the score, not the bits."""
    random, pixels = np.random.default_rng(seed), np.full((96, 96), 200.0)
    for _ in range(blocks):
        row, column = 8 * random.integers(12, size=2)
        v, u = (np.cos(np.pi / 8 * index * (np.arange(8) + 0.5)) for index in random.integers(0, 4, 2))
        pixels[row : row + 8, column : column + 8] += random.choice([-3, 3]) * v[:, None] * u
    assert not check(torch.from_numpy(pixels.round().astype(np.uint8))[None]).marked


@pytest.mark.parametrize("period", [4, 5, 6.4, 8, 10, 32 / 3, 16, 32])
def test_gratings_stripes_and_squares_are_not_taken_for_it(period: float) -> None:
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    for angle in torch.arange(0, torch.pi, torch.pi / 8):
        wave = torch.cos(2 * torch.pi / period * (x * angle.cos() + y * angle.sin()))
        squares = 255.0 * ((x % round(period) < 1) | (y % round(period) < 1))
        for levels in (128 + 2 * wave, 128 + 60 * wave, 128 + 60 * wave.sign(), squares):
            pixels = levels.to(torch.uint8)[None]
            assert not check(pixels).marked
            assert not check(jpeg(pixels, 80)).marked


# ----------------------------------------------------------------------------------------------------
# Through the command line
# ----------------------------------------------------------------------------------------------------


def test_sample_marks_its_pictures_unless_told_not_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--n=2", "--device=cpu", "--steps=2", "--out"]
    assert main(["sample", "emoji", *common, str(tmp_path / "sample")]) == 0
    assert main(["sample", "emoji", "--no-watermark", *common, str(tmp_path / "plain")]) == 0
    for folder, has in (("sample", True), ("plain", False)):
        capsys.readouterr()
        files = [str(tmp_path / folder / f"{index}.png") for index in range(2)]
        assert main(["watermark", "check", *files]) == (0 if has else 3)
        assert capsys.readouterr().out.count("watermark of ldm") == (2 if has else 0)
        stored = settings_in(Path(files[0]))
        assert stored is not None
        assert stored["watermark"] == has
    assert main(["watermark"]) == 1
    assert main(["watermark", "check", str(tmp_path / "none.png")]) == 1
    assert "none.png" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    assert main(["watermark", "check", str(tmp_path / "text.png")]) == 1


def test_pictures_too_small_for_it_are_made_without(tmp_path: Path) -> None:
    options = ["--n=1", "--steps=2", "--size=32x32", "--device=cpu", "--out", str(tmp_path)]
    assert main(["sample", "emoji", *options]) == 0
    assert main(["watermark", "check", str(tmp_path / "0.png")]) == 3
