"""Make the data that the package carries: python tools/make_assets.py EMOJI_PACKAGE_FOLDER

EMOJI_PACKAGE_FOLDER is the unpacked npm package `emoji-datasource-google` 16.0.0 (Noto Emoji art, Apache-2.0). The digits
come from scikit-learn's copy of the UCI optical recognition set. Writes ldm/data/assets/{emoji.webp,emoji.jsonl,digits.png}.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ASSETS = Path(__file__).parent.parent / "ldm" / "data" / "assets"


def contact_sheet(tiles: list[Image.Image]) -> Image.Image:
    """Square sheet of equally large tiles, row by row."""
    side, (width, height) = math.ceil(math.sqrt(len(tiles))), tiles[0].size
    sheet = Image.new("RGB", (side * width, math.ceil(len(tiles) / side) * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % side * width, index // side * height))
    return sheet


def emoji(folder: Path) -> None:
    records = sorted(json.loads((folder / "emoji.json").read_text()), key=lambda r: r["sort_order"])
    records = [r for r in records if r["has_img_google"]]
    tiles = []
    for record in records:
        art = Image.open(folder / "img" / "google" / "64" / record["image"]).convert("RGBA")
        tiles.append(Image.alpha_composite(Image.new("RGBA", art.size, "white"), art).convert("RGB"))
    contact_sheet(tiles).save(ASSETS / "emoji.webp", quality=90, method=6)
    with (ASSETS / "emoji.jsonl").open("w", encoding="utf-8") as lines:
        for r in records:
            char = "".join(chr(int(code, 16)) for code in r["unified"].split("-"))
            entry = {"name": (r["name"] or r["short_name"]).lower(), "char": char}
            entry |= {"category": r["category"], "subcategory": r["subcategory"]}
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def digits() -> None:
    """8 x 8 scans with 17 grey levels; the digit is the tile's last column (so one PNG holds everything)."""
    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = np.repeat(data.target.astype(np.uint8)[:, None, None], 8, axis=1)
    Image.fromarray(np.concatenate([grey, labels], axis=2).reshape(-1, 9)).save(ASSETS / "digits.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji_package", type=Path)
    emoji(parser.parse_args().emoji_package)
    digits()
