"""ldm wav: sound of pictures that are mel spectrograms."""

from pathlib import Path

from ldm.console.options import Option, parse, path, whole
from ldm.data.audio import N_FFT, sound, write_wav
from ldm.data.decode import read_picture
from ldm.errors import UserError

OPTIONS = [
    Option("picture", "image file; its height is the number of mel bands, a column is `hop` samples", path),
    Option("--out", "WAV file; default: the picture's name with .wav", path, None, "FILE"),
    Option("--rate", "Hz, as in training; default: 16000", whole(1), 16000, "HZ"),
    Option("--hop", "samples per column, as in training; default: 256", whole(1), 256, "N"),
]


def wav(picture: str, out: str | None = None, rate: int = 16000, hop: int = 256) -> int:
    """Write the sound of a mel spectrogram as data.Audio makes them, its phases guessed (Griffin-Lim)."""
    if rate < 1 or not 1 <= hop <= N_FFT // 2:
        raise UserError(f"rate is {rate}, hop {hop}; allowed are 1 or more, and 1 to {N_FFT // 2}")
    target = Path(out or Path(picture).with_suffix(".wav"))
    samples = sound(read_picture(Path(picture), channels=1), rate, hop)
    write_wav(target, samples, rate)
    print(f"{target}: {len(samples) / rate:.2f} s")
    return 0


def main(command: str, arguments: list[str]) -> int:
    return wav(**parse(command, "Sound of a picture that is a mel spectrogram.", OPTIONS, arguments))
