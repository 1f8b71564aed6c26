"""A corpus of odd and damaged picture files, with what is to be made of each.

    python tools/odd_files.py FOLDER    # writes it, and expected.json beside it

Every good one shows four quadrants: red, green above, blue, yellow below.  `right`: read with these colours; `skipped`:
named and left out where it is read; `left out`: not taken for a picture at all; `any`: right or skipped, as its pixels
may or may not be whole.
"""

import io
import json
import os
import random
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 64
COLOURS = ((220, 30, 30), (30, 200, 30), (30, 30, 220), (220, 220, 30))
PLACES = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
FORMATS: dict[str, tuple[str, dict[str, Any], int]] = {  # suffix: Pillow's name, options, tolerance of its colours
    "jpg": ("JPEG", {"quality": 95}, 30), "jpeg": ("JPEG", {"quality": 95, "progressive": True}, 30),
    "jpe": ("JPEG", {"quality": 90, "subsampling": 0}, 30), "jfif": ("JPEG", {"quality": 95, "dpi": (72, 72)}, 30),
    "png": ("PNG", {}, 0), "webp": ("WEBP", {"lossless": True}, 0), "gif": ("GIF", {}, 6), "bmp": ("BMP", {}, 0), "dib": ("DIB", {}, 0),
    "tif": ("TIFF", {}, 0), "tiff": ("TIFF", {"compression": "tiff_lzw"}, 0), "ppm": ("PPM", {}, 0), "jp2": ("JPEG2000", {}, 20),
    "avif": ("AVIF", {"quality": 95}, 30), "tga": ("TGA", {}, 0), "pcx": ("PCX", {}, 0), "sgi": ("SGI", {}, 0), "qoi": ("QOI", {}, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Odd:
    """A file of the corpus: pixels is a list of (x, y, colour, tolerance), x and y in shares."""

    name: str
    kind: str
    want: str = "right"
    content: bytes = b""
    pixels: tuple[tuple[float, float, tuple[int, int, int], int], ...] = ()


def quadrants(size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for (x, y), colour in zip(PLACES, COLOURS, strict=True):
        rows = slice(0, size[1] // 2) if y < 0.5 else slice(size[1] // 2, None)
        pixels[rows, slice(0, size[0] // 2) if x < 0.5 else slice(size[0] // 2, None)] = colour
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def shown(tolerance: int, colours: tuple[tuple[int, int, int], ...] = COLOURS) -> tuple[Any, ...]:
    return tuple((x, y, colour, tolerance) for (x, y), colour in zip(PLACES, colours, strict=True))


def grey(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    value = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
    return value, value, value


GREYS = tuple(grey(colour) for colour in COLOURS)
WHITE = (255, 255, 255)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(*chunks: bytes) -> bytes:
    """The quadrants as PNG, with chunks before the pixels."""
    png = encoded(quadrants(), "PNG")
    place = png.index(b"IDAT") - 4
    return png[:place] + b"".join(chunks) + png[place:]


def with_segment(marker: int, data: bytes) -> bytes:
    """The quadrants as JPEG, with a segment at its beginning."""
    jpeg = encoded(quadrants(), "JPEG", quality=95)
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def header_png(width: int, height: int, bits: int = 1, kind: int = 0, rows: bool = True) -> bytes:
    """A PNG of zeros."""
    packer, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height if rows else 0)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def rgb_profile(order: tuple[int, int, int]) -> bytes:
    """A matrix profile of ICC (version 2) whose channels are those of sRGB in another order, gamma 2.2."""

    def tag(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    primaries = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    text = b"desc\0\0\0\0" + struct.pack(">I", 8) + b"swapped\0" + bytes(8 + 70)
    tags = [(b"desc", tag(text)), (b"cprt", tag(b"text\0\0\0\0none\0")), (b"wtpt", xyz(0.9642, 1.0, 0.8249))]
    tags += [(name, xyz(*primaries[which])) for name, which in zip((b"rXYZ", b"gXYZ", b"bXYZ"), order, strict=True)]
    tags += [(name, tag(curve)) for name in (b"rTRC", b"gTRC", b"bTRC")]
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags:
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + b"".join(struct.pack(">i", round(value * 65536)) for value in (0.9642, 1.0, 0.8249))
    return head + bytes(128 - len(head)) + table + body


def odd_files(huge: bool = False) -> Iterator[Odd]:
    """The corpus; huge: also what takes seconds to decode."""
    from odd_files_kinds import exif, formats, modes, names, shapes, texts, wrong

    for part in (damaged(), formats(), modes(), exif(), texts(), shapes(huge), wrong(), names()):
        yield from part


def damaged() -> Iterator[Odd]:
    """Every format: good, upper case, cut off at each tenth, with flipped bits, without head, with something behind."""
    generator = random.Random(0)
    for suffix, (kind, options, tolerance) in FORMATS.items():
        good = encoded(quadrants(), kind, **options)
        yield Odd(f"good/a.{suffix}", f"{kind} ({suffix})", content=good, pixels=shown(tolerance))
        yield Odd(f"good/B.{suffix.upper()}", f"{kind}, upper-case suffix", content=good, pixels=shown(tolerance))
        for tenth in range(10):
            yield Odd(f"cut/{suffix}{tenth}.{suffix}", f"{kind}, cut off", "any" if tenth else "skipped", good[: len(good) * tenth // 10])
        yield Odd(f"cut/{suffix}-1.{suffix}", f"{kind}, without its last byte", "any", good[:-1])
        for number in range(8):
            flipped = bytearray(good)
            for _ in range(1 + 6 * number):
                flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
            yield Odd(f"flip/{suffix}{number}.{suffix}", f"{kind}, bits flipped", "any", bytes(flipped))
        yield Odd(f"flip/head.{suffix}", f"{kind}, head destroyed", "any", generator.randbytes(16) + good[16:])
        yield Odd(
            f"flip/random-{suffix}.{suffix}", "random bytes", "any" if suffix in ("tga", "pcx") else "skipped", generator.randbytes(2000)
        )
        yield Odd(
            f"flip/behind.{suffix}", f"{kind}, bytes behind its end", content=good + generator.randbytes(500), pixels=shown(tolerance)
        )


def build(folder: Path, huge: bool = False) -> dict[str, Odd]:
    """Write the corpus; by name what was written."""
    written = {}
    for odd in odd_files(huge):
        path = folder / odd.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(odd.content)
        written[odd.name] = odd
    return written | nodes(folder / "node")


def nodes(folder: Path) -> dict[str, Odd]:
    """What has the name of a picture and is no file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    (folder / "up").symlink_to("..")
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "link.png").symlink_to("../good/a.png")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    here = Path.cwd()
    os.chdir(folder)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind("socket.jpg")
    os.chdir(here)
    kinds = {"loop.jpg": "link to itself", "gone.jpg": "link to nothing", "up": "link to the folder above", "null.png": "link to /dev/null"}
    kinds |= {"fifo.jpg": "FIFO", "socket.jpg": "socket", "folder.jpg": "folder called .jpg"}
    found = {f"node/{name}": Odd(f"node/{name}", kind, "left out") for name, kind in kinds.items()}
    return found | {"node/link.png": Odd("node/link.png", "link to a picture", pixels=shown(0))}


def main() -> None:
    folder = Path(sys.argv[1])
    written = build(folder, huge=True)
    rows = {name: {key: value for key, value in asdict(odd).items() if key != "content"} for name, odd in written.items()}
    folder.with_name("expected.json").write_text(json.dumps(rows, indent=0), encoding="utf-8", errors="surrogateescape")
    print(f"{len(written)} files of {len({odd.kind for odd in written.values()})} kinds")


if __name__ == "__main__":
    main()
