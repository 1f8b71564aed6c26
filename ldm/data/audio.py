"""Sound as images: log-mel spectrograms of one channel, and back by Griffin-Lim."""

import math
import warnings
import wave
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor

from ldm.data.decode import naming
from ldm.data.images import Images
from ldm.data.open import folder_of
from ldm.data.records import Record, Records
from ldm.data.sources.trees import Folder
from ldm.errors import UserError

N_FFT = 1024
RANGE_DB = 80.0  # from silence, black, to full scale, white


def _samples(path: Path) -> tuple[int, np.ndarray]:
    """Rate in Hz and samples (N,) or (N, channels) as they are stored.  UserError where they cannot be read."""
    with naming(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # on chunks of titles and cues, and on a cut end
        try:
            rate, data = wavfile.read(path, mmap=True)
        except ValueError:  # of 24 bits, which cannot be mapped into memory, or damaged
            rate, data = wavfile.read(path)
        if rate < 1 or not len(data):
            raise ValueError(f"it has {len(data)} samples at {rate} Hz")
        return rate, data


def length(path: Path, rate: int) -> int:
    """Samples at `rate` Hz.  UserError where there are none."""
    found, data = _samples(path)
    return round(len(data) * rate / found)


def read_wav(path: Path, rate: int) -> Tensor:
    """WAV file of 8 to 32 bits or floats -> mono (N,) in [-1,1] at `rate` Hz, band-limited.

    Mono is the mean of the channels; the first of them where the mean is silent and they are not (of opposite phases).
    """
    found, data = _samples(path)
    if data.dtype.kind == "f":
        values = np.asarray(data, np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{str(path)!r} has samples that are not finite numbers: repair it, or take it away")
        values = np.clip(values, -1, 1)
    else:
        middle = 128 if data.dtype == np.uint8 else 0
        values = (data.astype(np.float64) - middle) / 2.0 ** (8 * data.dtype.itemsize - 1)
    samples = torch.from_numpy(values).view(len(values), -1)
    mono = samples.mean(1)
    if mono.abs().max() < 1e-3 * samples.abs().max():
        mono = samples[:, 0]
    if found == rate:
        return mono.float()
    count = round(len(mono) * rate / found)
    return (torch.fft.irfft(torch.fft.rfft(mono)[: count // 2 + 1], n=count) * (count / len(mono))).float()


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
        tree = Folder(folder_of(path, "WAV files"))
        self.size, self.rate, self.hop, self.report = size, rate, hop, tree.report
        self.pieces = list[tuple[Path, int]]()
        records = list[Record]()
        for index, name in enumerate(tree.names):
            if not name.lower().endswith(".wav"):
                continue
            file, label = tree.read(index), name.split("/")[0] if "/" in name else None
            try:
                starts = range(0, length(file, rate), size * hop)
            except UserError as error:
                self.report.leave_out("cannot be read", str(error))
                continue
            self.pieces += [(file, start) for start in starts]
            records += [Record(f"{name}@{start}", label) for start in starts]
        if not self.pieces:
            raise UserError(f"no WAV files in {path!r} or below it{self.report.words()}")
        self.report.what, self.records = "a folder of sounds", Records(records)

    def pixels(self, index: int, draw: int = 0) -> Tensor:
        file, start = self.pieces[index]
        samples = read_wav(file, self.rate)[start : start + (self.size - 1) * self.hop]
        samples = torch.nn.functional.pad(samples, (0, (self.size - 1) * self.hop - len(samples)))
        return spectrogram(samples, self.size, self.rate, self.hop)
