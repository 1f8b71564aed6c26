"""ldm wav: sound of pictures that are mel spectrograms."""

from pathlib import Path

from jsonargparse import ArgumentParser
from PIL import Image

from ldm.commands.configs import PARSER, plain_errors
from ldm.data.audio import N_FFT, sound, write_wav
from ldm.data.transforms import as_tensor


def wav(picture: str, out: str | None = None, rate: int = 16000, hop: int = 256) -> int:
    """Write the sound of a mel spectrogram as data.Audio makes them, its phases guessed (Griffin-Lim).

    Args:
        picture: image file; its height is the number of mel bands, a column is `hop` samples
        out: WAV file; default: the picture's name with .wav
        rate: Hz, as in training
        hop: samples per column, as in training
    """
    if rate < 1 or not 1 <= hop <= N_FFT // 2:
        raise ValueError(f"rate is {rate}, hop {hop}; allowed are 1 or more, and 1 to {N_FFT // 2}")
    with Image.open(picture) as image:
        pixels = as_tensor(image.convert("L"))
    target = Path(out or Path(picture).with_suffix(".wav"))
    samples = sound(pixels, rate, hop)
    write_wav(target, samples, rate)
    print(f"{target}: {len(samples) / rate:.2f} s")
    return 0


def main(command: str, arguments: list[str]) -> int:
    parser = ArgumentParser(prog=f"ldm {command}", description="Sound of a picture that is a mel spectrogram.", **PARSER)
    parser.add_function_arguments(wav, as_positional=True)
    with plain_errors():
        return wav(**vars(parser.parse_args(arguments)))
