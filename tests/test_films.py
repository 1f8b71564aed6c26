"""Clips: films in and out, the autoencoder and the UNet of frames, and models of clips from the command line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_DIFFUSION, normal, randomise
from PIL import Image
from torch import nn

from ldm import model_folder
from ldm.autoencoder.bottleneck import KL
from ldm.autoencoder.conv import ConvAutoencoder
from ldm.callbacks.writer import frames_in, settings_in
from ldm.cli import main
from ldm.data.films import ClipImages, count_frames, frames_of, milliseconds_of, write_film
from ldm.degradations import LUMA, Grey
from ldm.frames import apart, strip, together
from ldm.interfaces import Cond
from ldm.nn.attention import attend, attend_within
from ldm.nn.frames import FrameMixing
from ldm.nn.unet import UNet
from ldm.stages.clips import FrameStack
from ldm.stages.diffusion import start_from
from ldm.stages.model import LatentDiffusion


def film(count: int, size: int = 64, seed: int = 0) -> list[Image.Image]:
    """A bright square that moves to the right, on a ground of its own colour."""
    ground = np.random.default_rng(seed).integers(0, 100, 3)
    frames = np.broadcast_to(ground, (count, size, size, 3)).astype(np.uint8).copy()
    for number, frame in enumerate(frames):
        frame[size // 4 : size // 2, 4 * number : 4 * number + size // 4] = 250 - ground
    return [Image.fromarray(frame) for frame in frames]


def pixels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames])


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven films of 7 frames: animated WebP, GIF, folders, and one that is too short."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(6):
        write_film(film(7, seed=number), folder / f"film{number}.webp")
    for number in range(6, 10):
        (folder / "stills" / f"film{number}").mkdir(parents=True)
        for index, frame in enumerate(film(7, seed=number)):
            frame.save(folder / "stills" / f"film{number}" / f"{index}.png")
    write_film(film(7, seed=10), folder / "film10.gif")
    write_film(film(2), folder / "short.webp")
    return folder


def test_apart_and_together_are_inverse_and_a_strip_shows_the_frames_in_order() -> None:
    clips = normal(2, 12, 4, 5)
    assert torch.equal(together(apart(clips, 4), 4), clips)
    assert torch.equal(apart(clips, 4)[5], clips[1, 3:6])
    assert torch.equal(strip(clips, 4)[1, :, :, 10:15], clips[1, 6:9])
    assert torch.equal(strip(clips, 1), clips)


@pytest.mark.parametrize("suffix", [".webp", ".mp4"])
def test_films_come_back_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    path, written = tmp_path / f"film{suffix}", film(9)
    write_film(written, path, 40)
    read = list(frames_of(path))
    assert [frame.number for frame in read] == list(range(9))
    assert count_frames(path) == 9
    assert milliseconds_of(path) == pytest.approx(40)
    error = np.abs(pixels([frame.image for frame in read]).astype(int) - pixels(written))
    assert error.max() == 0 if suffix == ".webp" else np.percentile(error, 90) <= 3, "H.264 keeps colour at half the size"


def test_clips_are_cut_from_films_one_after_the_other(films: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 12 films have fewer than 3 frames and are left out"):
        images = ClipImages(str(films), 32, frames=3)
    assert len(images) == 22, "two clips of each film of 7 frames"
    assert images.channels == 9
    by_id = {record.id: index for index, record in enumerate(images.records)}
    assert images.names == ["stills"], "a film's label is its sub-folder"
    for name, seed in (("film2.webp", 2), ("stills/film7", 7)):
        clip = images.pixels(by_id[f"{name}#3"])
        wanted = [frame.resize((32, 32), Image.Resampling.LANCZOS) for frame in film(7, seed=seed)[3:6]]
        assert np.array_equal(apart(clip[None], 3).permute(0, 2, 3, 1).numpy(), pixels(wanted))
    with pytest.warns(UserWarning, match="fewer than 7 frames"):
        strided = ClipImages(str(films), 32, frames=3, stride=3)
    assert len(strided) == 11
    assert torch.equal(apart(strided.pixels(1)[None], 3)[1], apart(images.pixels(by_id[f"{strided.records[1].id[:-1]}3"])[None], 3)[0])
    assert strided.fingerprint() != images.fingerprint()


def test_bad_films(films: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a clip of 9 frames, every 1\., needs 9 frames; in .* the longest of 12 films has 7"):
        ClipImages(str(films), 32, frames=9)
    with pytest.raises(ValueError, match="there are no films"):
        ClipImages(str(tmp_path), 32, frames=2)
    with pytest.raises(ValueError, match=r"data.frames is 0, data.stride 1; both must be at least 1"):
        ClipImages(str(films), 32, frames=0)
    pytest.importorskip("av")
    (tmp_path / "no.mp4").write_bytes(b"no film")
    for use in (lambda path: list(frames_of(path)), count_frames, milliseconds_of, lambda path: ClipImages(str(path.parent), 32, frames=2)):
        with pytest.raises(ValueError, match=r"no.mp4' cannot be read as a video .*: repair it, or take it away"):
            use(tmp_path / "no.mp4")


def test_a_stack_is_the_autoencoder_of_images_on_every_frame() -> None:
    images = randomise(ConvAutoencoder(KL(2), channels=16, multipliers=[1, 2], num_blocks=1)).eval()
    stack, x, noise = FrameStack(images, 3), normal(2, 9, 16, 16), normal(2, 6, 8, 8)
    with torch.no_grad():
        posterior = stack.encode(x)
        for frame in range(3):
            mine, z = slice(3 * frame, 3 * frame + 3), slice(2 * frame, 2 * frame + 2)
            wanted = images.encode(x[:, mine])
            torch.testing.assert_close(posterior.mode()[:, z], wanted.mode(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(posterior.sample(noise)[:, z], wanted.sample(noise[:, z]), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stack.decode(noise)[:, mine], images.decode(noise[:, z]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("token_dim", "learn_variance"), [(0, False), (6, True)])
def test_a_unet_of_clips_begins_as_that_of_images_where_frames_are_alike(token_dim: int, learn_variance: bool) -> None:
    arguments = {"in_channels": 2, "channels": 16, "multipliers": [1, 2], "num_blocks": 1, "attention_levels": [1], "vector_dim": 8}
    arguments |= {"token_dim": token_dim, "learn_variance": learn_variance, "concat_channels": 1}
    images, clips = randomise(UNet(**arguments)), UNet(**arguments, frames=3)
    assert (clips.in_channels, clips.concat_channels) == (6, 3)
    assert not clips.load_state_dict(images.state_dict(), strict=False).unexpected_keys
    x, t, concat = normal(2, 2, 8, 8), torch.tensor([3.0, 700.0]), normal(2, 1, 8, 8, seed=1)
    known = Cond(normal(2, 8), normal(2, 4, 6) if token_dim else None, torch.ones(2, 4, dtype=torch.bool) if token_dim else None)
    wanted = images(x, t, replace(known, concat=concat)).chunk(1 + learn_variance, dim=1)
    known = replace(known, concat=concat.repeat(1, 3, 1, 1))
    alike = clips(x.repeat(1, 3, 1, 1), t, known)
    torch.testing.assert_close(alike, torch.cat([part.repeat(1, 3, 1, 1) for part in wanted], dim=1), rtol=1e-5, atol=1e-5)
    moved = clips(torch.cat([x, x, normal(2, 2, 8, 8, seed=2)], dim=1), t, known)
    assert (moved - alike)[:, :2].abs().max() > 1e-4, "frames know of each other from the start"
    randomise(clips)
    frames = clips(x.repeat(1, 3, 1, 1), t, known)[:, :6].unflatten(1, (3, 2))
    assert (frames[:, 1:] - frames[:, :1]).abs().amax((0, 2, 3, 4)).min() > 1e-4, "a trained one knows which frame it makes"
    with pytest.raises(ValueError, match="frames is 0; allowed is 1"):
        UNet(**arguments, frames=0)


def test_grey_is_that_of_each_frame() -> None:
    clips = normal(2, 9, 4, 4)
    wanted = together(Grey()(apart(clips, 3)), 3)
    torch.testing.assert_close(Grey()(clips), wanted)
    torch.testing.assert_close(wanted[:, 4], (clips[:, 3:6] * torch.tensor(LUMA).view(3, 1, 1)).sum(1))
    assert torch.equal(Grey()(clips[:, :1]).round(decimals=5), clips[:, :1].round(decimals=5))


def test_frames_are_mixed_with_their_neighbours_at_each_position_by_itself() -> None:
    mixing, x = randomise(FrameMixing(8, 4, 1e-5)), normal(8, 8, 3, 5)
    mixing.norm = nn.Identity()
    changed = x.clone()
    changed[2, 0, 1, 2] += 1  # the third frame of the first clip at one place
    differs = (mixing(changed) - mixing(x)).abs().amax(1) > 1e-6
    reached = torch.zeros(8, 3, 5, dtype=torch.bool)
    reached[1:4, 1, 2] = True
    assert torch.equal(differs, reached)
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    assert (mixing(x[order]) - mixing(x)[order]).abs().max() > 1e-3


def test_attention_within_a_clip_is_that_of_one_long_image() -> None:
    qkv = normal(6, 5, 24)
    wanted = attend(*qkv.unflatten(0, (2, 3)).flatten(1, 2).chunk(3, dim=2), heads=2)
    torch.testing.assert_close(attend_within(qkv, 2, frames=3).reshape(2, 15, 8), wanted)
    torch.testing.assert_close(attend_within(qkv, 2), attend(*qkv.chunk(3, dim=2), heads=2))


def test_a_model_of_clips_starts_as_the_model_of_images(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "diffusion" / "model"
    old = model_folder.load(path).model
    arguments = {**old.denoiser.network.init_args, "frames": 4}
    stack = FrameStack(model_folder.load(path).model.latents.autoencoder, 4)
    new = LatentDiffusion(stack, UNet(**arguments), old.conditioner, old.denoiser.schedule, old.denoiser.prediction)
    start_from(new, str(path))
    told = capsys.readouterr().out
    assert "more; not used of it: nothing" in told
    assert all("frame" in name for name in told.split("not in it: ")[1].split(" and ")[0].split(", "))
    x, sigma = normal(1, 3, 16, 16).repeat(1, 4, 1, 1), torch.tensor(2.0)
    z = new.latents.to_latents(x)
    torch.testing.assert_close(z[:, 2:4], old.latents.to_latents(x[:, 3:6]))
    cond = Cond(normal(1, old.conditioner.vector_dim))
    torch.testing.assert_close(
        new.denoiser.predict(z, sigma, cond)[:, 2:4], old.denoiser.predict(z[:, 2:4], sigma, cond), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:1 of 12 films")
def test_clips_from_the_command_line(trained: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, folder = str(trained / "diffusion" / "model"), tmp_path / "run"
    command = ["fit", "-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/clips.yaml", "-c", "diffusion/digits.yaml"]
    command += ["-c", "finetune/video.yaml", *TINY_DIFFUSION, "--trainer.enable_model_summary=false", "--trainer.max_steps=2"]
    command += [f"--model.first_stage={start}", f"--model.init={start}", "--run", str(folder), f"--data.path={films}", "--data.size=32"]
    command += ["--data.batch_size=2", "--trainer.val_check_interval=2", "--data.frames=3"]
    assert main([*command, "--model.network.frames=4"]) == 1
    assert "makes clips of 4 frames: use -c data/clips.yaml with --data.frames 4" in capsys.readouterr().err
    assert main([*command, "--model.network.frames=3"]) == 0
    shown = next((folder / "video" / "pictures").glob("samples_*.png"))
    assert Image.open(shown).size == (2 * (3 * 32 + 2) + 2, 3 * (32 + 2) + 2), "five clips, two in a row"
    model, out = str(folder / "video" / "model"), tmp_path / "out"
    assert main(["sample", model, "--n=2", "--steps=2", "--device=cpu", "--out", str(out)]) == 0
    made = Image.open(out / "1.png")
    assert made.size == (96, 32)
    with Image.open(out / "1.webp") as moving:
        assert moving.n_frames == 3
        moving.seek(2)
        assert np.array_equal(np.asarray(moving.convert("RGB")), np.asarray(made.crop((64, 0, 96, 32))))
    assert main(["again", str(out / "1.png"), model, "--device=cpu", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "1.png").read_bytes() == (out / "1.png").read_bytes()

    write_film(film(6), tmp_path / "six.gif")
    write_film(film(7), tmp_path / "seven.gif")
    edit = ["sample", model, "--strength=0.5", "--steps=2", "--device=cpu", "--out", str(tmp_path / "film")]
    assert main([*edit, "--image", str(tmp_path / "seven.gif")]) == 1
    assert "clips of 3 frames" in capsys.readouterr().err
    assert main([*edit, "--image", str(tmp_path / "six.gif")]) == 0
    with Image.open(tmp_path / "film" / "animation.webp") as moving:
        assert moving.n_frames == 6
    second = settings_in(tmp_path / "film" / "1.png")
    assert second is not None
    assert second["frame"] == 3
    arguments = [str(tmp_path / "film" / "1.png"), model, "--image", str(tmp_path / "six.gif"), "--device=cpu"]
    assert main(["again", *arguments, "--out", str(tmp_path / "again2")]) == 0
    assert (tmp_path / "again2" / "1.png").read_bytes() == (tmp_path / "film" / "1.png").read_bytes()


@pytest.mark.filterwarnings("ignore:1 of 12 films")
def test_a_film_is_inpainted_by_a_model_of_clips(trained: Path, films: Path, tmp_path: Path) -> None:
    start = str(trained / "diffusion" / "model")
    command = ["fit", "-c", "trainer/cpu.yaml", "-c", "trainer/csv.yaml", "-c", "data/clips.yaml", "-c", "diffusion/digits.yaml"]
    command += ["-c", "finetune/video.yaml", "-c", "task/inpainting.yaml", *TINY_DIFFUSION, "--trainer.enable_model_summary=false"]
    command += [f"--model.first_stage={start}", f"--model.init={start}", "--run", str(tmp_path), f"--data.path={films}", "--data.size=32"]
    command += ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.batch_size=2", "--data.frames=3", "--data.cache=null"]
    command += ["--model.network.frames=3", "--model.network.concat_channels=3", "--model.conditioner.frames=3"]
    assert main([*command, "--model.conditioner.channels=2", "--trainer.limit_val_batches=1"]) == 0
    write_film(film(3, 32), tmp_path / "film.gif")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = ["--image", str(tmp_path / "film.gif"), "--mask", str(tmp_path / "mask.png"), "--watermark=false"]
    sample = ["sample", str(tmp_path / "inpainting" / "model"), *files, "--steps=2", "--device=cpu", "--out", str(tmp_path / "out")]
    assert main([*sample, "--n=2"]) == 0
    for made in (pixels(frames_in(tmp_path / "out" / f"{i}.png", 3)) for i in range(2)):
        shown = pixels([frame.image for frame in frames_of(tmp_path / "film.gif")])
        assert np.array_equal(made[:, :, :16], shown[:, :, :16]), "what is known has the given pixels in every frame"


def test_a_video_goes_in_and_a_video_of_the_same_pace_comes_out(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_film(film(3), tmp_path / "in.mp4", 50)
    command = ["sample", str(trained / "diffusion" / "model"), "--image", str(tmp_path / "in.mp4"), "--strength=0.5", "--steps=2"]
    assert main([*command, "--device=cpu", "--out", str(tmp_path / "out")]) == 0
    made = tmp_path / "out" / "animation.mp4"
    assert milliseconds_of(made) == pytest.approx(50)
    shown = pixels([frame.image.convert("L") for frame in frames_of(made)]).astype(int)
    wanted = pixels([Image.open(tmp_path / "out" / f"{i}.png").convert("L") for i in range(3)])
    assert shown.shape == wanted.shape == (3, 32, 32)
    assert np.abs(shown - wanted).mean() < 4, "brightness; H.264 keeps colour at half the size, and this model makes noise"
