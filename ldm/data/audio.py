"""Sound as images: log-mel spectrograms of one channel, and back by Griffin-Lim."""

import math
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.datasets import Images, Record, require_folder
from ldm.errors import UserError

N_FFT = 1024
RANGE_DB = 80.0  # from silence, black, to full scale, white


@contextmanager
def opened(path: Path) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(str(path), "rb") as file:
            yield file
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path} is no WAV file of PCM samples: {error}") from error


def length(path: Path, rate: int) -> int:
    """Samples at `rate` Hz, by the file's header."""
    with opened(path) as file:
        return round(file.getnframes() * rate / file.getframerate())


def read_wav(path: Path, rate: int) -> Tensor:
    """PCM WAV file of 8 to 32 bits -> mono (N,) in [-1,1] at `rate` Hz, band-limited."""
    with opened(path) as file:
        width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
        data = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8).reshape(-1, width)
    padded = np.zeros((len(data), 4), dtype=np.uint8)
    padded[:, 4 - width :] = data ^ 0x80 if width == 1 else data  # 8 bits are unsigned
    samples = torch.from_numpy(padded.view("<i4")[:, 0].astype(np.float64) / 2**31).view(-1, channels).mean(1)
    if found == rate:
        return samples.float()
    count = round(len(samples) * rate / found)
    return (torch.fft.irfft(torch.fft.rfft(samples)[: count // 2 + 1], n=count) * (count / len(samples))).float()


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """(N,) in [-1,1], as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())


@cache
def mel_filters(count: int, rate: int) -> Tensor:
    """(count, N_FFT / 2 + 1) triangles, equally wide in mel = 2595 log10(1 + f / 700 Hz), each with the sum 1."""
    edges = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), count + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, N_FFT // 2 + 1, dtype=torch.float64)
    # no narrower than two bins, so that no filter is empty
    low = torch.minimum(edges[:-2], edges[1:-1] - rate / N_FFT)[:, None]
    high = torch.maximum(edges[2:], edges[1:-1] + rate / N_FFT)[:, None]
    centre = edges[1:-1, None]
    triangles = torch.minimum((frequencies - low) / (centre - low), (high - frequencies) / (high - centre)).clamp(min=0)
    return (triangles / triangles.sum(1, keepdim=True)).float()


def magnitudes(samples: Tensor, hop: int) -> Tensor:
    """(N,) -> (N_FFT / 2 + 1, frames); 1 is a sine at full scale."""
    window = torch.hann_window(N_FFT)
    return torch.stft(samples, N_FFT, hop, window=window, return_complex=True).abs() * (2 / window.sum())


def spectrogram(samples: Tensor, mels: int, rate: int, hop: int) -> Tensor:
    """(N,) -> uint8 (1, mels, frames), high frequencies above, 80 dB from black to white."""
    level = 20 * torch.log10((mel_filters(mels, rate) @ magnitudes(samples, hop)).clamp(min=1e-8))
    return ((level / RANGE_DB + 1).clamp(0, 1) * 255).round().to(torch.uint8).flip(0)[None]


def sound(pixels: Tensor, rate: int, hop: int, iterations: int = 60) -> Tensor:
    """uint8 (1, mels, frames) -> (N,): magnitudes by the filters' pseudo-inverse, phases by the fast Griffin-Lim algorithm
    (doi:10.1109/WASPAA.2013.6701851)."""
    bands, columns = pixels.shape[1:]
    least = N_FFT // 2 // hop + 2
    if bands < 2 or columns < least:
        raise UserError(f"the picture has {columns}x{bands} px; a spectrogram has at least {least} columns and 2 bands")
    levels = 10 ** ((pixels[0].flip(0).float() / 255 - 1) * RANGE_DB / 20) * (pixels[0].flip(0) > 0)
    wanted = (torch.linalg.pinv(mel_filters(len(levels), rate)) @ levels).clamp(min=0)
    window, count = torch.hann_window(N_FFT), (wanted.shape[1] - 1) * hop
    phases = 2 * math.pi * torch.rand(wanted.shape, generator=torch.Generator().manual_seed(0))
    state = before = torch.polar(wanted, phases)
    for _ in range(iterations):
        samples = torch.istft(torch.polar(wanted, state.angle()), N_FFT, hop, window=window, length=count)
        found = torch.stft(samples, N_FFT, hop, window=window, return_complex=True)
        state, before = found + 0.99 * (found - before), found
    return torch.istft(torch.polar(wanted, state.angle()), N_FFT, hop, window=window, length=count) * (window.sum() / 2)


class WaveImages(Images):
    """Spectrograms of size x size of all WAV files in a folder, cut into consecutive pieces, the last one filled with silence.

    One column is `hop` samples at `rate` Hz; the label is the name of the file's sub-folder.
    """

    channels = 1

    def __init__(self, path: str, size: int, rate: int, hop: int) -> None:
        root = Path(path).expanduser()
        require_folder(root, path, "WAV files")
        self.size, self.rate, self.hop = size, rate, hop
        self.pieces: list[tuple[Path, int]] = []
        for file in sorted(p for p in root.rglob("*") if p.suffix.lower() == ".wav"):
            self.pieces += [(file, start) for start in range(0, max(1, length(file, rate)), size * hop)]
        if not self.pieces:
            raise UserError(f"no WAV files in {path!r} or below it")
        names = [(file.relative_to(root), start) for file, start in self.pieces]
        self.records = [Record(f"{name.as_posix()}@{start}", name.parts[0] if len(name.parts) > 1 else None) for name, start in names]

    def pixels(self, index: int) -> Tensor:
        file, start = self.pieces[index]
        samples = read_wav(file, self.rate)[start : start + (self.size - 1) * self.hop]
        samples = torch.nn.functional.pad(samples, (0, (self.size - 1) * self.hop - len(samples)))
        return spectrogram(samples, self.size, self.rate, self.hop)
