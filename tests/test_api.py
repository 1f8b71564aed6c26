"""The Python API: `ldm.load(...)`, what it makes of images in any usual form, and plain DataLoaders in training."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ldm
from ldm import model_folder
from ldm.cli import main
from ldm.data.images import EmojiImages
from ldm.data.transforms import as_image
from ldm.diffusion.guidance import CFG
from ldm.diffusion.objective import Simple
from ldm.diffusion.samplers import DDIM
from ldm.errors import UserError
from ldm.sampling.inputs import to_pil
from ldm.stages.diffusion import DiffusionStage
from ldm.stages.plain import as_batch


@pytest.fixture(scope="module")
def emoji() -> ldm.Model:
    return ldm.load("emoji", device="cpu")


def test_sampling_gives_what_the_command_line_writes(emoji: ldm.Model, tmp_path: Path) -> None:
    pictures = emoji.sample(classes=["cat-face"], n=2, steps=2, guidance=3, seed=5, progress=False)
    command = ["sample", "emoji", "--class=cat-face", "--n=2", "--steps=2", "--guidance=3", "--seed=5", "--no-watermark", "--device=cpu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    for i, picture in enumerate(pictures):
        written = np.asarray(Image.open(tmp_path / "out" / f"{i}.png"))
        assert np.array_equal(np.asarray(picture.pil), written)
        assert torch.equal(picture.tensor, torch.from_numpy(written.copy()).permute(2, 0, 1) / 255)
        assert picture.settings["condition"] == {"class": "Smileys & Emotion/cat-face"}
    assert pictures.tensor.shape == (2, 3, 64, 64)
    assert pictures[:1][0].settings == pictures[0].settings
    assert pictures._repr_png_().startswith(b"\x89PNG")
    pictures.save(tmp_path / "saved")
    assert main(["again", str(tmp_path / "saved" / "1.png"), "emoji", "--device=cpu", "--out", str(tmp_path / "again")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "1.png")), np.asarray(pictures[1].pil))


def test_every_method_keeps_the_image_s_shape(emoji: ldm.Model) -> None:
    image = as_image(EmojiImages().pixels(0))
    mask = np.zeros((64, 64), dtype=bool)
    mask[:, 40:] = True
    few: dict[str, Any] = {"n": 1, "steps": 2, "progress": False}
    assert emoji.image_to_image(image, 0.5, **few)[0].pil.size == (64, 64)
    inpainted = emoji.inpaint(image, mask, classes="face-smiling", **few)[0].pil
    assert np.array_equal(np.asarray(inpainted)[:, :40], np.asarray(image)[:, :40])
    assert emoji.outpaint(image, left=10, top=3, **few)[0].pil.size == (74, 67)
    assert emoji.upscale(image.resize((20, 12)), 2, **few)[0].pil.size == (40, 24)
    ends = emoji.interpolate(seeds=(0, 7), classes=["cat-face"], n=2, steps=2, progress=False)
    assert torch.equal(ends[1].pixels, emoji.sample(classes=["cat-face"], seed=7, **few)[0].pixels)
    with pytest.raises(UserError, match="give one of these pairs"):
        emoji.interpolate(n=2)


def test_encode_and_decode_are_the_first_stage(emoji: ldm.Model, tmp_path: Path) -> None:
    image = as_image(EmojiImages().pixels(0))
    image.save(tmp_path / "face.png")
    forms = [
        image,
        np.asarray(image),
        torch.from_numpy(np.array(image)).permute(2, 0, 1),
        tmp_path / "face.png",
        str(tmp_path / "face.png"),
    ]
    latents = emoji.encode(forms)
    assert latents.shape == (5, 4, 16, 16)
    assert all(torch.equal(latents[0], other) for other in latents[1:])
    decoded = emoji.decode(latents[:1])[0].tensor
    error = (decoded - torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255).square().mean()
    assert 10 * torch.log10(1 / error) > 28, "dB"
    null = emoji.network.conditioner.null({"label": torch.zeros(5, dtype=torch.long)})
    denoised = emoji.denoiser.predict(latents, emoji.denoiser.schedule.sigmas[0], null)
    assert (denoised - latents).abs().max() < 0.2, "with hardly any noise D is the image"


def test_a_callback_sees_the_pictures_in_work(emoji: ldm.Model) -> None:
    seen: list[tuple[float, Tensor]] = []
    emoji.sample(classes="cat-face", n=1, steps=3, progress=False, callback=lambda done, images: seen.append((done, images)))
    assert len(seen) == 3
    assert all(images.shape == (1, 3, 64, 64) and float(images.min()) >= 0 and float(images.max()) <= 1 for _, images in seen)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 8, 9)), r"looks like \(C,H,W\).*image.transpose\(1, 2, 0\)"),
        (torch.zeros(8, 9, 3), r"looks like \(H,W,C\).*permute\(2, 0, 1\)"),
        (np.full((4, 4), -0.5), r"values from -0.5 to 0.*give \(x \+ 1\) / 2"),
        (np.full((4, 4), 200.0), "values from 0 to 200; floats are in 0..1: divide them by 255"),
        (np.zeros((4, 4), dtype=np.int64), "an image of int64 values"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"shape \[4, 4, 2\]"),
        (np.full((2, 2), np.nan), "values from nan"),
        (3, "int was given"),
    ],
)
def test_what_is_ambiguous_is_said(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_pil(image)


@settings(deadline=None, max_examples=50)
@given(height=st.integers(5, 9), width=st.integers(5, 9), channels=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
def test_images_in_memory_are_what_they_were(height: int, width: int, channels: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    forms = [pixels, pixels / 255, (pixels.astype(np.uint16) * 257), torch.from_numpy(pixels).permute(2, 0, 1)]
    for form in forms:
        assert np.array_equal(np.atleast_3d(np.asarray(to_pil(form))), pixels)


def test_arguments_are_checked_with_the_nearest_name(emoji: ldm.Model) -> None:
    with pytest.raises(UserError, match="there is no argument 'guidence'; allowed are guidance"):
        emoji.sample(guidence=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"sampler is 'DIM'; allowed are DDIM"):
        emoji.sample(sampler="DIM")
    with pytest.raises(UserError, match="device is 'tpu'; allowed are auto, cpu, cuda, mps"):
        ldm.load("emoji", device="tpu")


def stage(trained: Path) -> DiffusionStage:
    """The toy model as a stage that goes on training."""
    found = model_folder.load(trained / "diffusion" / "model")
    network, conditioner = (type(part)(**part.init_args) for part in (found.model.denoiser.network, found.model.conditioner))
    first, denoiser = str(trained / "autoencoder" / "model"), found.model.denoiser
    return DiffusionStage(first, network, conditioner, denoiser.schedule, Simple(), DDIM(), CFG(), denoiser.prediction, 2)


class Dictionaries(TensorDataset):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = super().__getitem__(index)
        return {"image": image, "label": label}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pairs", "dictionaries", "floats"])
def test_a_plain_loader_trains(kind: str, trained: Path) -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 10
    data = {
        "pairs": TensorDataset(images, labels),
        "dictionaries": Dictionaries(images, labels),
        "floats": TensorDataset(images / 255, labels),
    }[kind]
    trainer = L.Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    module = stage(trained)
    trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
    assert module.model.latents.measured
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert module.card()["classes"] == [str(i) for i in range(10)]


def test_a_loader_of_something_else_is_refused() -> None:
    for wrong, message in (
        (torch.zeros(3, 8, 8), r"a tensor of shape \[3, 8, 8\]"),
        ({"x": 1}, "NoneType"),
        (torch.full((1, 3, 4, 4), -1.0), "from -1"),
    ):
        with pytest.raises(UserError, match=message):
            as_batch(wrong)
    image = torch.rand(2, 3, 4, 4)
    assert torch.equal(as_batch([image, torch.tensor([1, 2])])["label"], torch.tensor([1, 2]))
    assert torch.equal(as_batch(image)["image"], image * 255 / 127.5 - 1)
