"""The kinds of odd picture files that are not damage: modes, EXIF, texts and profiles, shapes, wrong contents, names."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from odd_files import COLOURS, GREYS, SIDE, WHITE, Odd, chunk, encoded, header_png, quadrants, rgb_profile, shown, with_chunk, with_segment
from PIL import Image, ImageCms

HALF = SIDE // 2


def formats() -> Iterator[Odd]:
    """Variants of formats, and files of several pictures, of which the first counts."""
    film = [quadrants(), Image.new("RGB", (SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE), WHITE)]
    for suffix, kind in (("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG"), ("tif", "TIFF")):
        options = {} if suffix == "tif" else {"duration": 100, **({"lossless": True} if suffix == "webp" else {})}
        content = encoded(film[0], kind, save_all=True, append_images=film[1:], **options)
        yield Odd(f"form/film.{suffix}", f"{kind} of several pictures", content=content, pixels=shown(8))
    jpeg = encoded(quadrants(), "JPEG", quality=95)
    yield Odd("form/quality1.jpg", "JPEG of quality 1", content=encoded(quadrants(), "JPEG", quality=1))
    yield Odd("form/twelve.jpg", "JPEG that says 12 bits", "any", jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"))
    yield Odd("form/arithmetic.jpg", "JPEG that says arithmetic coding", "any", jpeg.replace(b"\xff\xc0", b"\xff\xc9"))
    yield Odd("form/two.jpg", "two JPEGs in one file", content=jpeg + jpeg, pixels=shown(30))
    yield Odd("form/interlaced.gif", "interlaced GIF", content=encoded(quadrants(), "GIF", interlace=1), pixels=shown(8))
    for name in ("tiff_adobe_deflate", "packbits", "jpeg", "tiff_lzw"):
        yield Odd(f"form/{name}.tif", f"TIFF, {name}", content=encoded(quadrants(), "TIFF", compression=name), pixels=shown(30))
    png = bytearray(encoded(quadrants(), "PNG"))
    yield Odd("form/no-end.png", "PNG without its end", "any", bytes(png[:-12]))
    place = png.index(b"IDAT")
    png[place + 4 + struct.unpack(">I", png[place - 4 : place])[0]] ^= 0xFF
    yield Odd("form/checksum.png", "PNG with a wrong checksum", "any", bytes(png))
    yield Odd("form/loop.tif", "TIFF whose directory follows itself", "skipped", b"II*\0\x08\0\0\0\0\0\x08\0\0\0")
    yield Odd(
        "form/count.tif", "TIFF with a count of 2^31", "skipped", b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\xff\xff\xff\x7f\x08\0\0\0\0\0\0\0"
    )


def modes() -> Iterator[Odd]:
    """Numbers of channels, palettes, transparency, bits."""
    quad, whites = quadrants(), shown(1, (COLOURS[0], COLOURS[1], WHITE, COLOURS[3]))
    yield Odd("mode/grey.png", "grey", content=encoded(quad.convert("L"), "PNG"), pixels=shown(1, GREYS))
    yield Odd("mode/grey.jpg", "grey JPEG", content=encoded(quad.convert("L"), "JPEG", quality=95), pixels=shown(6, GREYS))
    yield Odd("mode/grey.pgm", "PGM", content=encoded(quad.convert("L"), "PPM"), pixels=shown(1, GREYS))
    alpha = Image.fromarray(np.uint8([[255, 255], [0, 255]]).repeat(HALF, 0).repeat(HALF, 1))
    grey_alpha, colour_alpha = quad.convert("LA"), quad.convert("RGBA")
    grey_alpha.putalpha(alpha)
    colour_alpha.putalpha(alpha)
    grey_white = shown(1, (GREYS[0], GREYS[1], WHITE, GREYS[3]))
    yield Odd("mode/la.png", "grey and alpha", content=encoded(grey_alpha, "PNG"), pixels=grey_white)
    for suffix, kind in (("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), ("tga", "TGA"), ("qoi", "QOI")):
        options = {"lossless": True} if suffix == "webp" else {}
        yield Odd(f"mode/rgba.{suffix}", f"RGBA {kind}", content=encoded(colour_alpha, kind, **options), pixels=whites)
    palette = quad.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    blue = palette.getpixel((5, SIDE - 5))
    yield Odd("mode/palette.png", "palette", content=encoded(palette, "PNG"), pixels=shown(3))
    yield Odd(
        "mode/palette-alpha.png", "palette with a transparent entry", content=encoded(palette, "PNG", transparency=blue), pixels=whites
    )
    several = bytes(0 if i == blue else 255 for i in range(4))
    yield Odd("mode/palette-alphas.png", "palette with alphas", content=encoded(palette, "PNG", transparency=several), pixels=whites)
    yield Odd("mode/palette.gif", "GIF with transparency", content=encoded(palette, "GIF", transparency=blue), pixels=whites)
    yield Odd("mode/key.png", "a colour that is transparent", content=encoded(quad, "PNG", transparency=COLOURS[2]), pixels=whites)
    bits = quad.convert("L").point(lambda value: 255 * (value > 100)).convert("1")
    black_white = shown(1, ((0,) * 3, WHITE, (0,) * 3, WHITE))
    for suffix, kind in (("png", "PNG"), ("tif", "TIFF"), ("pbm", "PPM"), ("bmp", "BMP")):
        yield Odd(f"mode/one.{suffix}", f"1 bit {kind}", content=encoded(bits, kind), pixels=black_white)
    yield Odd("mode/cmyk.jpg", "CMYK JPEG", content=encoded(quad.convert("CMYK"), "JPEG", quality=98), pixels=shown(25))
    yield Odd("mode/cmyk.tif", "CMYK TIFF", content=encoded(quad.convert("CMYK"), "TIFF"), pixels=shown(6))
    yield Odd("mode/ycbcr.tif", "YCbCr TIFF", "any", content=encoded(quad.convert("YCbCr"), "TIFF"), pixels=shown(8))
    lab = ImageCms.profileToProfile(quad, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    yield Odd("mode/lab.tif", "Lab TIFF", content=encoded(lab, "TIFF"), pixels=shown(25))  # type: ignore[arg-type]
    wide = np.asarray(quad).astype(">u2") * 257
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0))
    content = head + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    yield Odd("mode/rgb48.png", "PNG of 48 bits", content=content, pixels=shown(1))


def deep() -> Iterator[Odd]:
    """Grey pictures of more than 8 bits, in sets by their kind: one range for all of a set."""
    values = np.array([[8000, 40000], [65535, 0]], np.uint16).repeat(HALF, 0).repeat(HALF, 1)
    dark = values // 256
    bright = shown(1, ((31,) * 3, (156,) * 3, WHITE, (0,) * 3))
    black = shown(1, ((0,) * 3, (1,) * 3, (1,) * 3, (0,) * 3))
    for name, array, pixels in (("bright", values, bright), ("dark", dark, black)):
        yield Odd(f"int16/{name}.png", "16 bits PNG", content=encoded(Image.fromarray(array), "PNG"), pixels=pixels)
        yield Odd(f"int16/{name}.tif", "16 bits TIFF", content=encoded(Image.fromarray(array), "TIFF"), pixels=pixels)
        big = Image.frombytes("I;16B", (SIDE, SIDE), array.astype(">u2").tobytes())
        yield Odd(f"int16/{name}-big.tif", "16 bits TIFF, big-endian", content=encoded(big, "TIFF"), pixels=pixels)
        yield Odd(
            f"int16/{name}.pgm", "16 bits PGM", content=b"P5\n%d %d\n65535\n" % (SIDE, SIDE) + array.astype(">u2").tobytes(), pixels=pixels
        )
        yield Odd(
            f"int16/{name}.jp2", "16 bits JPEG 2000", content=encoded(Image.fromarray(array), "JPEG2000", irreversible=False), pixels=pixels
        )
        yield Odd(f"int32/{name}.tif", "32 bits TIFF", content=encoded(Image.fromarray(array.astype(np.int32)), "TIFF"), pixels=pixels)
        yield Odd(
            f"float255/{name}.tif",
            "float TIFF in 0..255",
            content=encoded(Image.fromarray((array / 257).astype(np.float32)), "TIFF"),
            pixels=pixels,
        )
        unit = (array / 65535).astype(np.float32)
        yield Odd(f"float1/{name}.tif", "float TIFF in 0..1", content=encoded(Image.fromarray(unit), "TIFF"), pixels=pixels)
        resampled = Image.fromarray(unit * 1.004 - 0.001)
        yield Odd(f"float1/{name}-resampled.tif", "float TIFF a little beyond 0..1", content=encoded(resampled, "TIFF"), pixels=pixels)
        yield Odd(f"signed/{name}.tif", "float TIFF in -1..1", content=encoded(Image.fromarray(unit * 2 - 1), "TIFF"), pixels=pixels)
    nan = np.where(values == 40000, np.nan, values / 65535).astype(np.float32)
    yield Odd("float1/nan.tif", "float TIFF with NaN", "skipped", encoded(Image.fromarray(nan), "TIFF"))


def exif() -> Iterator[Odd]:
    """Orientations, and EXIF that is damaged, without which a picture is as good."""
    turn = Image.Transpose
    stored = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    for orientation in range(10):
        found = Image.Exif()
        found[0x0112] = orientation
        image = quadrants((80, SIDE))
        image = image.transpose(stored[orientation]) if orientation in stored else image
        for suffix, kind, options in (
            ("jpg", "JPEG", {"quality": 95}),
            ("png", "PNG", {}),
            ("webp", "WEBP", {"lossless": True}),
            ("tif", "TIFF", {}),
        ):
            if suffix == "tif" and orientation in (0, 9):
                continue
            yield Odd(
                f"exif/{orientation}.{suffix}",
                f"EXIF {orientation} in {kind}",
                content=encoded(image, kind, exif=found, **options),
                pixels=shown(30),
            )  # type: ignore[arg-type]
    for number, blob in enumerate(
        (
            b"II*\0" + b"\xff" * 40,
            b"MM\0*\0\0\0\x08\xff\xff" + bytes(30),
            b"",
            b"II",
            b"garbage" * 9,
            b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x7f\0\0\0\0\0\0",
        )
    ):
        yield Odd(f"exif/damaged{number}.jpg", "damaged EXIF in JPEG", content=with_segment(0xE1, b"Exif\0\0" + blob), pixels=shown(30))
        yield Odd(f"exif/damaged{number}.png", "damaged EXIF in PNG", content=with_chunk(chunk(b"eXIf", blob)), pixels=shown(0))
        webp = encoded(quadrants(), "WEBP", lossless=True, exif=blob or b"\0")
        yield Odd(f"exif/damaged{number}.webp", "damaged EXIF in WebP", content=webp, pixels=shown(0))
    xmp = chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>')
    yield Odd("exif/xmp.png", "orientation in XMP", "any", with_chunk(xmp))


def texts() -> Iterator[Odd]:
    """Texts and profiles of colours."""
    quad = quadrants()
    yield Odd(
        "text/workflow.png",
        "a compressed text of 2 MB (ComfyUI)",
        content=with_chunk(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{}" * 2**20))),
        pixels=shown(0),
    )
    yield Odd("text/bomb.png", "a text of 100 MB", "any", with_chunk(chunk(b"zTXt", b"bomb\0\0" + zlib.compress(b"A" * 10**8))))
    yield Odd(
        "text/many.png",
        "2,000 texts",
        content=with_chunk(*(chunk(b"tEXt", b"k%d\0" % k + b"v" * 900) for k in range(2000))),
        pixels=shown(0),
    )
    yield Odd("text/comment.jpg", "a comment of 60 kB", content=with_segment(0xFE, b"c" * 60_000), pixels=shown(30))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Odd("icc/srgb.jpg", "profile: sRGB", content=encoded(quad, "JPEG", quality=95, icc_profile=srgb), pixels=shown(30))
    swapped = tuple((colour[1], colour[0], colour[2]) for colour in COLOURS)
    for suffix, kind, options in (
        ("png", "PNG", {}),
        ("jpg", "JPEG", {"quality": 95}),
        ("tif", "TIFF", {}),
        ("webp", "WEBP", {"lossless": True}),
    ):
        content = encoded(quad, kind, icc_profile=rgb_profile((1, 0, 2)), **options)  # type: ignore[arg-type]
        yield Odd(f"icc/swapped.{suffix}", f"profile with red and green swapped, {kind}", content=content, pixels=shown(40, swapped))  # type: ignore[arg-type]
    palette = quad.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    yield Odd(
        "icc/palette.png",
        "profile of a palette",
        content=encoded(palette, "PNG", icc_profile=rgb_profile((1, 0, 2))),
        pixels=shown(40, swapped),
    )  # type: ignore[arg-type]
    yield Odd("icc/damaged.jpg", "damaged profile", content=encoded(quad, "JPEG", quality=95, icc_profile=b"none" * 50), pixels=shown(30))
    yield Odd(
        "icc/xyz.png",
        "profile of another space",
        content=encoded(quad, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()),
        pixels=shown(3),
    )
    yield Odd(
        "icc/grey.png", "RGB profile of a grey picture", content=encoded(quad.convert("L"), "PNG", icc_profile=srgb), pixels=shown(2, GREYS)
    )
    yield Odd("icc/bomb.png", "a profile of 100 MB", "any", with_chunk(chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"A" * 10**8))))


def shapes(huge: bool) -> Iterator[Odd]:
    """Sizes that are very small, long, large, or only said to be."""
    for width, height in ((1, 1), (1, 97), (97, 1), (2, 3), (1, 20_000), (20_000, 1), (20_000, 10), (3, 3)):
        content = encoded(Image.new("RGB", (width, height), (10, 200, 30)), "PNG")
        yield Odd(f"shape/{width}x{height}.png", f"{width}x{height} px", content=content, pixels=((0.5, 0.5, (10, 200, 30), 2),))
    yield Odd("shape/header.png", "a header of 2^31 px", "skipped", _header())
    yield Odd("shape/zero.png", "a header of 0 px", "skipped", header_png(0, 0, 8, 2, rows=False))
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    yield Odd("shape/bomb.gif", "GIF of 65535x65535", "skipped", gif + b"\x02\x02\x44\x01\x00;")
    yield Odd("shape/bomb.bmp", "BMP header of 60000x60000", "skipped", _bmp(60_000, 60_000))
    yield Odd("shape/negative.bmp", "BMP of negative width", "skipped", _bmp(-10, 10))
    yield Odd("shape/bomb.ppm", "PPM header of 60000x60000", "skipped", b"P6 60000 60000 255\n")
    if huge:
        yield Odd(
            "shape/100.png",
            "100 million px",
            content=encoded(Image.new("L", (10_000, 10_000), 77), "PNG"),
            pixels=((0.5, 0.5, (77,) * 3, 2),),
        )
        yield Odd("shape/196.png", "196 million px", content=header_png(14_000, 14_000), pixels=((0.5, 0.5, (0,) * 3, 2),))
        yield Odd("shape/400.png", "400 million px", "skipped", header_png(20_000, 20_000))


def _header() -> bytes:
    head = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def wrong() -> Iterator[Odd]:
    """Contents that are not what the name says."""
    png, jpeg, webp = encoded(quadrants(), "PNG"), encoded(quadrants(), "JPEG", quality=95), encoded(quadrants(), "WEBP", lossless=True)
    yield Odd("wrong/png.jpg", "PNG called .jpg", content=png, pixels=shown(0))
    yield Odd("wrong/jpg.png", "JPEG called .png", content=jpeg, pixels=shown(30))
    yield Odd("wrong/webp.jpg", "WebP called .jpg", content=webp, pixels=shown(0))
    yield Odd("wrong/ico.png", "ICO called .png", content=encoded(quadrants((32, 32)), "ICO"))
    others = {
        "html.jpg": (b"<!doctype html><html><body>404 Not Found</body></html>", "HTML"),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        "text.png": (b"hello\n", "text"),
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "Git LFS pointer"),
        "pdf.png": (b"%PDF-1.4\n%%EOF", "PDF"),
        "zip.jpg": (b"PK\x03\x04" + bytes(30), "zip"),
        "mp4.gif": (b"\0\0\0\x18ftypmp42" + bytes(30), "MP4"),
        "ps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "PostScript"),
        "pickle.png": (b"cos\nsystem\n(S'touch PWNED'\ntR.", "pickle"),
        "wmf.png": (b"\xd7\xcd\xc6\x9a" + bytes(40), "WMF"),
        "fits.jpg": (b"SIMPLE  =                    T" + bytes(2850), "FITS"),
    }
    for name, (content, kind) in others.items():
        yield Odd(f"wrong/{name}", f"{kind} called .{name.rpartition('.')[2]}", "skipped", content)


def names() -> Iterator[Odd]:
    """Odd names of good pictures."""
    good = encoded(quadrants(), "PNG")
    odd = (
        "名前 画像",
        "emoji 😀",
        "café",
        "cafe\u0301",
        "-rf",
        "--help",
        "new\nline",
        "tab\t",
        "100%",
        "%s%n%d",
        "a b",
        "quote'\"",
        "star*?",
        "[x]",
    )
    odd += (
        "${oc.env:HOME}",
        "a;b&c|d",
        "back\\slash",
        "x" * 250,
        "trailing. ",
        "RTL\u202egnp",
        "null",
        "con",
        "#hash",
        "@at",
        "~home",
        "=eq",
        "{brace}",
    )
    for name in (*odd, "a" * 60 + "/" + "b" * 60 + "/deep", "latin\udce9"):
        yield Odd(f"name/{name}.png", "odd name", content=good, pixels=shown(0))
    for name in (".hidden", "._mac", "..", ".ipynb_checkpoints/x", "__MACOSX/y", "@eaDir/z"):
        yield Odd(f"name/{name}.png", "name of the system", "left out", good)
