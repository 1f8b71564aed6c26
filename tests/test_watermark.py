"""The invisible watermark: found where it was put, also after JPEG and cropping, and not found where it was not."""

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
from ldm.commands.predict import settings_in
from ldm.data.datasets import EmojiImages
from ldm.data.transforms import as_image, as_tensor
from ldm.data.watermark import BITS, THRESHOLD, _patterns, check, mark

datasets = pytest.importorskip("sklearn.datasets")
PHOTOS = [as_tensor(Image.fromarray(pixels)) for pixels in datasets.load_sample_images().images]


def patch(number: int, size: int) -> Tensor:
    generator = np.random.default_rng(number)
    photo = PHOTOS[number % len(PHOTOS)]
    row, column = (int(generator.integers(side - size + 1)) for side in photo.shape[1:])
    return photo[:, row : row + size, column : column + size]


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    data = io.BytesIO()
    as_image(pixels).save(data, "JPEG", quality=quality)
    return as_tensor(Image.open(data))


def test_the_patterns_are_orthonormal_and_in_their_band() -> None:
    patterns, band = _patterns()
    torch.testing.assert_close(torch.einsum("aij,bij->ab", patterns, patterns), torch.eye(len(BITS), dtype=torch.float64))
    assert (torch.fft.fft2(patterns).abs()[:, ~band] < 1e-9).all()
    assert float(patterns[5, 3, 7]) == pytest.approx(-0.0135435, abs=1e-6), (
        "other patterns would not find the watermarks of earlier versions"
    )


@given(number=st.integers(0, 500), row=st.integers(0, 25), column=st.integers(0, 25))
@settings(max_examples=10, deadline=None)
def test_photographs_keep_it_and_have_none_of_their_own(number: int, row: int, column: int) -> None:
    pixels = patch(number, 256)
    marked = mark(pixels)
    assert (marked.int() - pixels.int()).abs().max() <= 30
    psnr = 10 * torch.log10(255**2 / (marked.float() - pixels.float()).square().mean())
    assert psnr > 35
    assert not check(pixels).marked
    found = check(marked)
    assert found.marked
    assert found.right == len(BITS)
    cropped = marked[:, row : row + 230, column : column + 230]
    for changed in (cropped, jpeg(marked, 80), jpeg(cropped, 80)):
        assert check(changed).marked


def test_small_pictures_on_white_carry_it_too() -> None:
    emoji = EmojiImages()
    pictures = [emoji.pixels(index) for index in range(0, len(emoji), 95)]
    before, after = ([check(p) for p in shown] for shown in (pictures, [mark(p) for p in pictures]))
    assert not any(found.marked for found in before)
    assert sum(found.marked for found in after) >= len(pictures) - 1
    assert sum(found.right for found in after) >= 0.98 * len(BITS) * len(pictures)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    pixels = torch.cat([patch(1, 128), torch.full((1, 128, 128), 200, dtype=torch.uint8)])[:channels]
    pixels = patch(1, 128)[1:2] if channels == 1 else pixels
    marked = mark(pixels)
    assert marked.shape == pixels.shape
    assert check(marked).score > THRESHOLD
    assert torch.equal(marked[3:], pixels[3:]), "alpha stays"


def test_a_flat_picture_and_one_that_is_too_small() -> None:
    assert check(torch.zeros(3, 64, 64, dtype=torch.uint8)).score == 0
    assert check(mark(torch.full((3, 64, 64), 128, dtype=torch.uint8))).right == len(BITS)
    with pytest.raises(ValueError, match="64x40 px is too small for a watermark: it needs 48"):
        mark(torch.zeros(3, 40, 64, dtype=torch.uint8))


def test_sample_marks_its_pictures_and_predict_does_not(tmp_path: Path, capsys) -> None:
    common = ["--steps=2", "--out"]
    assert main(["sample", "emoji", "--n=2", "--device=cpu", *common, str(tmp_path / "sample")]) == 0
    assert main(["sample", "emoji", "--n=2", "--device=cpu", "--watermark=false", *common, str(tmp_path / "plain")]) == 0
    assert main(["predict", "--model=emoji", "--num=2", "--trainer.accelerator=cpu", *common, str(tmp_path / "predict")]) == 0
    for folder, has in (("sample", True), ("plain", False), ("predict", False)):
        capsys.readouterr()
        files = [str(tmp_path / folder / f"{index}.png") for index in range(2)]
        assert main(["watermark", "check", *files]) == (0 if has else 3)
        assert capsys.readouterr().out.count("watermark of ldm") == (2 if has else 0)
        stored = settings_in(Path(files[0]))
        assert stored is not None
        assert stored["watermark"] == has
    assert main(["watermark"]) == 2
    assert main(["watermark", "check", str(tmp_path / "none.png")]) == 1
    assert "none.png" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    assert main(["watermark", "check", str(tmp_path / "text.png")]) == 1


def test_pictures_too_small_for_it_say_so(trained: Path, tmp_path: Path, capsys) -> None:
    assert main(["sample", str(trained / "diffusion" / "model"), "--n=1", "--steps=2", "--device=cpu", "--out", str(tmp_path)]) == 0
    assert "32x32 px are too small for a watermark" in capsys.readouterr().out
