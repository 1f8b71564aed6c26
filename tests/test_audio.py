"""Sound as mel spectrograms and back, and slices of 16 bits."""

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stage1, stage2
from PIL import Image
from torch import Tensor

from ldm import model_folder
from ldm.cli import main
from ldm.data.audio import N_FFT, WaveImages, magnitudes, mel_filters, read_wav, sound, spectrogram, write_wav
from ldm.data.images import SourceImages
from ldm.ranges import to_float
from ldm.sampling.inputs import read_images
from ldm.sampling.plan import image_format

RATE, HOP = 16000, 256


def chirp(seconds: float, rate: int = RATE) -> Tensor:
    """From 200 Hz up to 3 kHz, with two overtones."""
    t = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    phase = 2 * torch.pi * (200 * t + 1400 * t**2 / seconds)
    return (0.4 * phase.sin() + 0.2 * (2 * phase).sin() + 0.1 * (2.5 * phase).sin()).float()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_all_widths(width: int, tmp_path: Path) -> None:
    values, scale = [0.0, 0.5, -0.5, 0.25], 2 ** (8 * width - 1)
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(RATE)
        for value in values:
            number = round(value * scale)
            one = bytes([number + 128]) if width == 1 else struct.pack("<i", number)[:width]
            file.writeframes(one + (bytes([128]) if width == 1 else bytes(width)))  # the other channel is silent
    torch.testing.assert_close(read_wav(tmp_path / "x.wav", RATE), torch.tensor(values) / 2)


def test_resampling_keeps_what_both_rates_have(tmp_path: Path) -> None:
    for rate in (8000, 22050, 44100):
        t = torch.arange(rate) / rate
        write_wav(tmp_path / "x.wav", 0.5 * (2 * torch.pi * 440 * t).sin(), rate)
        wanted = 0.5 * (2 * torch.pi * 440 * torch.arange(RATE) / RATE).sin()
        torch.testing.assert_close(read_wav(tmp_path / "x.wav", RATE), wanted, rtol=0, atol=2e-4)


def test_a_sine_at_full_scale_is_white_at_its_frequency() -> None:
    tone = (2 * torch.pi * 1000 * torch.arange(RATE) / RATE).sin()
    assert float(magnitudes(tone, HOP)[64, 20]) == pytest.approx(1, abs=1e-3)  # 1,000 Hz is bin 64 of 512 over 8 kHz
    filters = mel_filters(64, RATE)
    torch.testing.assert_close(filters.sum(1), torch.ones(64))
    assert filters.shape == (64, N_FFT // 2 + 1)
    pixels = spectrogram(tone, 64, RATE, HOP)
    brightest = 63 - int(pixels[0, :, 20].argmax())
    assert abs(float(filters[brightest] @ torch.linspace(0, RATE / 2, N_FFT // 2 + 1)) - 1000) < 40
    assert pixels[0, :, 20].max() > 225
    assert (spectrogram(torch.zeros(RATE), 64, RATE, HOP) == 0).all()


def test_there_and_back_sounds_alike() -> None:
    """Spectral convergence in the mel bands, which are all that a spectrogram keeps."""
    wanted = spectrogram(chirp(1.0), 80, RATE, HOP)
    back = sound(wanted, RATE, HOP)
    again = spectrogram(back, 80, RATE, HOP)
    loud = wanted > 100
    assert (again.float() - wanted.float())[loud].abs().mean() * 80 / 255 < 2.0, "dB"
    assert 0.5 < float(back.norm() / chirp(1.0).norm()) < 1.5


def test_files_are_cut_into_pieces(tmp_path: Path) -> None:
    (tmp_path / "bells").mkdir()
    write_wav(tmp_path / "bells" / "a.wav", chirp(2.5), RATE)
    write_wav(tmp_path / "b.wav", chirp(0.1), RATE)
    images = WaveImages(str(tmp_path), 64, RATE, HOP)
    assert [record.id for record in images.records] == ["b.wav@0", "bells/a.wav@0", "bells/a.wav@16384", "bells/a.wav@32768"]
    assert [record.label for record in images.records] == [None, "bells", "bells", "bells"]
    assert images.pixels(1).shape == (1, 64, 64)
    assert (images.pixels(0)[0, :, 20:] == 0).all(), "silence after the end"
    (tmp_path / "c.wav").write_bytes(b"no sound")
    images = WaveImages(str(tmp_path), 64, RATE, HOP)
    assert len(images) == 4
    assert images.report.left_out["cannot be read"].number == 1
    assert "c.wav" in images.report.words()
    with pytest.raises(ValueError, match="no WAV files in"):
        WaveImages(str(Path(__file__).parent), 64, RATE, HOP)


def test_both_stages_learn_sound_and_a_picture_becomes_sound(tmp_path: Path, capsys) -> None:
    for index in range(6):
        write_wav(tmp_path / f"{index}.wav", chirp(1.2), RATE)
    config = str(Path(__file__).parent.parent / "configs" / "data" / "audio.yaml")
    data = ["-c", config, "--data.path", str(tmp_path), "--data.batch_size=2", "--model.init_args.seed=1"]
    assert main([*stage1(tmp_path / "run"), *data, "--model.autoencoder.image_channels=1"]) == 0
    unconditional = ["--model.conditioner=Unconditional", "--model.network.vector_dim=0"]
    assert main([*stage2(tmp_path / "run"), *data, *unconditional]) == 0
    out = tmp_path / "out"
    assert main(["sample", str(tmp_path / "run" / "diffusion" / "model"), "--n=1", "--steps=2", "--device=cpu", "--out", str(out)]) == 0
    assert Image.open(out / "0.png").mode == "L"
    assert main(["wav", str(out / "0.png")]) == 0
    assert "1.01 s" in capsys.readouterr().out
    assert len(read_wav(out / "0.wav", RATE)) == 63 * HOP


def test_a_window_chooses_the_values_of_16_bits(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 2000, 3000, 5000]] * 5, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "slice.png")
    pixels = SourceImages(str(tmp_path), 5, 1, (1000, 3000)).pixels(0)
    assert pixels.dtype == torch.uint16
    assert pixels[0, 0].tolist() == [0, 0, 32768, 65535, 65535]
    with pytest.raises(ValueError, match=r"data.window is \[3, 1\]"):
        SourceImages(str(tmp_path), 5, 1, (3, 1))


def test_a_model_of_16_bit_slices_works_on_them(tmp_path: Path) -> None:
    for index in range(6):
        values = np.random.default_rng(index).integers(0, 4000, (40, 40), dtype=np.uint16)
        Image.fromarray(values).resize((64, 64)).save(tmp_path / f"{index}.png")
    config = str(Path(__file__).parent.parent / "configs" / "data" / "slices.yaml")
    data = ["-c", config, "--data.path", str(tmp_path), "--data.size=32", "--data.batch_size=2", "--data.window=[1000,3000]"]
    assert main([*stage1(tmp_path / "run"), *data, "--model.autoencoder.image_channels=1"]) == 0
    assert main([*stage2(tmp_path / "run"), *data, "--model.conditioner=Unconditional", "--model.network.vector_dim=0"]) == 0
    model = str(tmp_path / "run" / "diffusion" / "model")
    kind = image_format(model_folder.load(model))
    assert kind == (1, 1, (1000, 3000), True)
    (image,), notes = read_images(tmp_path / "0.png", kind, size=(32, 32))
    wanted = to_float(SourceImages(str(tmp_path), 32, 1, (1000, 3000)).pixels(0))
    torch.testing.assert_close(image.pixels, wanted, atol=1e-4, rtol=0)
    assert notes == [], "nothing is cut off"
    assert (float(wanted.min()), float(wanted.max())) == (-1, 1), "some values are beyond the window"
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.where(np.arange(64) < 32, 0, 65535).astype(np.uint16)[None].repeat(64, 0)).save(tmp_path / "masks" / "deep.png")
    masked = [f"--mask={tmp_path / 'masks' / 'deep.png'}"]
    for name, options in {"like": ["--strength=0.5"], "mask": masked, "denoise": ["--denoise=0.3"]}.items():
        out = tmp_path / name
        command = ["sample", model, "--image", str(tmp_path / "0.png"), *options, "--n=1", "--steps=2", "--device=cpu", "--out", str(out)]
        assert main(command) == 0
        made = Image.open(out / "0.png")
        assert (made.mode, made.size) == ("I;16", (64, 64)), "of the image's size"
    assert main(["again", str(out / "0.png"), model, "--image", str(tmp_path / "0.png"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "0.png").read_bytes() == (out / "0.png").read_bytes()
