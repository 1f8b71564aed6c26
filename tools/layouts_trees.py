"""Layouts of plain folders: classes, splits, captions, what is left out, what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path

from layouts_files import CLASSES, FLAT, SIX, TWO, Entry, colour, files, jsonl, links, named, said
from PIL import Image

FOUR_EACH = {"cat": 4, "dog": 4}
FIRST, SECOND = range(4), range(4, 8)  # of a split
RUN = ("checkpoints/last.ckpt", "model/config.yaml", "model/model.safetensors")


def coco(numbers: range) -> str:
    """Two captions for each image."""
    images = [{"id": i, "file_name": f"{i}.png"} for i in numbers]
    captions = [{"image_id": i, "caption": f"{said(i)}, {k}"} for i in numbers for k in range(2)]
    return json.dumps({"images": images, "annotations": captions})


def heic(folder: Path) -> str:
    from pillow_heif import from_pillow

    from_pillow(Image.new("RGB", (16, 16), colour(1))).save(folder / "1.heic", quality=-1)
    return files(["0.jfif"])(folder)


def edm(count: int, known: bool = True) -> Mapping[str, str]:
    """The dataset.json of StyleGAN and EDM2."""
    labels = [[f"00000/{i}.png", i % 2] for i in range(count)] if known else None
    return {"dataset.json": json.dumps({"labels": labels})}


FOLDERS: list[Entry] = [
    ("a flat folder", files(FLAT), {"images": 6}),
    (
        "folders of any depth around all pictures",
        files(named("a/b/{i}.png", range(6))),
        {"images": 6, "classes": {"b": 6}},
    ),
    ("class sub-folders", files(SIX), {"images": 6, "classes": TWO}),
    (
        "class sub-folders, deeper folders in them",
        files(named("{c}/x/{i}/{i}.png", range(6))),
        {"images": 6, "classes": TWO},
    ),
    ("class folders that are links", links(CLASSES), {"images": 6, "classes": TWO}),
    ("one class folder of two is a link", links(["cat"]), {"images": 6, "classes": TWO}),
    (
        "links in a circle",
        links([], circle=True),
        {"images": 6, "classes": TWO, "left_out": {"link in a circle": 1}},
    ),
    (
        "train/CLASS, val/CLASS (ImageNet)",
        files(named("train/{c}/{i}.png", FIRST) + named("val/{c}/{i}.png", SECOND)),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4)},
    ),
    (
        "train/CLASS, test/CLASS (torchvision)",
        files(named("train/{c}/{i}.png", FIRST) + named("test/{c}/{i}.png", SECOND)),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4)},
    ),
    (
        "train, validation, test/CLASS (Hugging Face)",
        files(
            [
                *named("train/{c}/{i}.png", FIRST),
                *named("validation/{c}/{i}.png", SECOND),
                *named("test/{c}/{i}.png", (8, 9)),
            ],
        ),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4), "left_out": {"test, as val is held out": 2}},
    ),
    (
        "CLASS/train, CLASS/test",
        files(named("{c}/train/{i}.png", FIRST) + named("{c}/test/{i}.png", SECOND)),
        {"images": 8, "classes": FOUR_EACH, "split": (4, 4)},
    ),
    (
        "train and val without classes",
        files(named("train/{i}.png", FIRST) + named("val/{i}.png", SECOND)),
        {"images": 8, "split": (4, 4)},
    ),
    (
        "digits as class folders: 0 to 10",
        files([f"{i % 11}/{i}.png" for i in range(22)]),
        {"images": 22, "classes": {str(c): 2 for c in range(11)}},
    ),
    (
        "COCO: train2017, val2017, annotations/",
        files(
            named("train2017/{i}.png", FIRST) + named("val2017/{i}.png", SECOND),
            {
                "annotations/captions_train2017.json": coco(FIRST),
                "annotations/captions_val2017.json": coco(SECOND),
            },
        ),
        {"images": 8, "captions": 8, "texts": 16, "split": (4, 4)},
    ),
    (
        "captions in .txt beside (kohya)",
        files(FLAT, {f"{i}.txt": said(i) for i in range(6)}),
        {"images": 6, "captions": 6},
    ),
    (
        "captions in .caption beside, class folders",
        files(SIX, {"cat/0.caption": said(0)}),
        {"images": 6, "classes": TWO, "captions": 1},
    ),
    (
        "dataset.json (StyleGAN, EDM2)",
        files(named("00000/{i}.png", range(4)), edm(4)),
        {"images": 4, "classes": {"0": 2, "1": 2}},
    ),
    (
        "dataset.json with labels null",
        files(named("00000/{i}.png", range(4)), edm(4, known=False)),
        {"images": 4},
    ),
]

UNWANTED: list[Entry] = [
    (
        "hidden and system files",
        files(
            [
                *SIX,
                ".60.png",
                "cat/._0.png",
                "cat/.ipynb_checkpoints/0.png",
                "@eaDir/0.png",
                "__MACOSX/cat/._0.png",
            ],
            {"cat/Thumbs.db": "x", ".DS_Store": "x"},
        ),
        {"images": 6, "classes": TWO, "left_out": {"hidden": 7}},
    ),
    (
        "other files beside",
        files(FLAT[:2], {"a.mp4": "x", "b.xcf": "x", "README": "x"}),
        {"images": 2, "left_out": {".mp4": 1, ".xcf": 1, "files without a suffix": 1}},
    ),
    (
        "a run of ours in it",
        files(
            [*FLAT[:2], "run/autoencoder/pictures/60.png"],
            {f"run/autoencoder/{name}": "x" for name in RUN},
        ),
        {"images": 2, "left_out": {"folder of a run": 1}},
    ),
    (
        "pictures of `ldm sample`",
        files(
            [*FLAT[:2], "60.png"],
            {"manifest.jsonl": jsonl(*({"file": name, "model_sha256": "00"} for name in FLAT[:2]))},
        ),
        {"images": 2, "left_out": {"not in manifest.jsonl": 1}},
    ),
    ("HEIC and JFIF", heic, {"images": 2}),
]

REFUSED: list[Entry] = [
    ("an empty folder", files([]), {"refused": "no images in"}),
    ("films only", files([], {"a.mp4": "x"}), {"refused": "use -c data/clips.yaml"}),
    ("one picture", files(["0.png"], give="0.png"), {"refused": "is one picture"}),
    (
        "a text file that lists nothing",
        files([], {"notes.txt": "hello"}, "notes.txt"),
        {"refused": "none of the 1 files"},
    ),
    ("a path that is not there", files([], give="gone"), {"refused": "there is no file or folder"}),
    ("a URL", lambda folder: "https://example.org/photos.zip", {"refused": "download it first"}),
    ("the name of a data set of the hub", lambda folder: "user/flowers", {"refused": "download it first"}),
]
