"""Builders of the layouts of layouts.py, and what each must be opened as."""

import csv
import io
import json
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Build = Callable[[Path], str]


def colour(number: int) -> tuple[int, int, int]:
    """Of picture `number`: no two are alike, and JPEG does not mix them up."""
    return 40 + 50 * (number % 4), 40 + 50 * (number // 4 % 4), 40 + 50 * (number // 16 % 4)


def picture(number: int, kind: str = "PNG") -> bytes:
    """The content of a picture file of 16 x 16 px."""
    data = io.BytesIO()
    Image.new("RGB", (16, 16), colour(number)).save(data, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return data.getvalue()


def of_name(name: str, number: int) -> bytes:
    return picture(number, "JPEG" if name.lower().endswith((".jpg", ".jfif")) else "PNG")


def files(names: Iterable[str], texts: Mapping[str, str | bytes] = {}) -> Build:
    """A folder of pictures, numbered in this order, and of other files."""
    names = list(names)

    def build(folder: Path) -> str:
        for name, content in contents(names, texts).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return str(folder)

    return build


def contents(names: Iterable[str], texts: Mapping[str, str | bytes] = {}) -> dict[str, bytes]:
    found = {name: of_name(name, number) for number, name in enumerate(names)}
    return found | {name: text if isinstance(text, bytes) else text.encode() for name, text in texts.items()}


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: Iterable[Iterable[Any]], separator: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
    return text.getvalue()


def zipped(names: Iterable[str], texts: Mapping[str, str] = {}, top: str = "") -> Build:
    names = list(names)

    def build(folder: Path) -> str:
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            for name, content in contents(names, texts).items():
                archive.writestr(top + name, content)
        return str(folder / "set.zip")

    return build


def tarred(path: Path, members: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def shards(given: str, mode: str = "w", suffix: str = ".tar", count: int = 3, prefix: Iterable[str] = ("shard",)) -> Build:
    """WebDataset shards of four samples each; given: what follows the folder's path."""

    def build(folder: Path) -> str:
        number = 0
        for name in prefix:
            for shard in range(count):
                members: dict[str, bytes] = {}
                for _ in range(4):
                    key = f"{number:06d}"
                    label = {"label": number % 3, "caption": f"number {number}"}
                    members |= {f"{key}.jpg": picture(number, "JPEG"), f"{key}.json": json.dumps(label).encode()}
                    number += 1
                tarred(folder / f"{name}-{shard:03d}{suffix}", members, mode)
        return f"{folder}{given}"

    return build


def links(every: bool) -> Build:
    def build(folder: Path) -> str:
        for number, name in enumerate(("cat", "dog")):
            place = folder / "elsewhere" / name if every or name == "cat" else folder / "set" / name
            place.mkdir(parents=True)
            (folder / "set").mkdir(exist_ok=True)
            for i in range(3):
                (place / f"{i}.png").write_bytes(picture(3 * number + i))
            if place.parent.name == "elsewhere":
                (folder / "set" / name).symlink_to(place)
        (folder / "set" / "cat" / "round").symlink_to(folder / "set")
        return str(folder / "set")

    return build


def parquet(names: Iterable[str], path: str) -> Build:
    """Parquet files as the Hugging Face hub has them, of 8 rows each, in row groups of 3."""
    names = list(names)

    def build(folder: Path) -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for place, name in enumerate(names):
            numbers = range(8 * place, 8 * place + 8)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(arrow_table(pa, numbers), folder / name, row_group_size=3)
        return str(folder / path)

    return build


def arrow_table(pa: Any, numbers: Iterable[int]) -> Any:
    numbers = list(numbers)
    columns = {
        "image": [{"bytes": picture(i, "JPEG"), "path": f"{i}.jpg"} for i in numbers],
        "label": [i % 2 for i in numbers],
        "text": [f"number {i}" for i in numbers],
    }
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "text": {"_type": "Value"}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def saved_to_disk(folder: Path) -> str:
    import pyarrow as pa

    found = arrow_table(pa, range(8))
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, found.schema) as writer:
        writer.write_table(found, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def lsun(folder: Path) -> str:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 20) as base, base.begin(write=True) as transaction:
        for number in range(6):
            data = io.BytesIO()
            Image.new("RGB", (16, 16), colour(number)).save(data, "WEBP", lossless=True)
            transaction.put(f"{number:08x}".encode(), data.getvalue())
    return str(folder)


def array(save: Callable[[Path], Any], name: str) -> Build:
    def build(folder: Path) -> str:
        save(folder / name)
        return str(folder / name)

    return build


def pictures(count: int) -> np.ndarray:
    """uint8 (N,16,16,3)."""
    return np.stack([np.full((16, 16, 3), colour(i), np.uint8) for i in range(count)])


def safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"images": pictures(5).transpose(0, 3, 1, 2).copy(), "labels": np.arange(5) % 2}, path)


def field(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def dicom(folder: Path) -> str:
    """Four slices of 12 bits, in Hounsfield units from -1024 on, with a window in the file."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    for number in range(4):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        found.SOPClassUID, found.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        found.Rows = found.Columns = 16
        found.SamplesPerPixel, found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 1, 16, 12, 11, 0
        found.PhotometricInterpretation, found.RescaleSlope, found.RescaleIntercept = "MONOCHROME2", 1, -1024
        found.WindowCenter, found.WindowWidth = 40, 2000
        found.PixelData = np.random.default_rng(number).integers(0, 4096, (16, 16)).astype("<u2").tobytes()
        (folder / "patient").mkdir(exist_ok=True)
        found.save_as(folder / "patient" / f"{number}.dcm", enforce_file_format=True)
    return str(folder)


def nifti(folder: Path) -> str:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(field(16, 16, 5), np.eye(4)), folder / "brain.nii.gz")
    return str(folder)


def run_inside(folder: Path) -> str:
    files(["a.png", "b.png", "run/autoencoder/pictures/x.png"], {"run/autoencoder/checkpoints/last.ckpt": b"x"})(folder)
    return str(folder)


def heic(folder: Path) -> str:
    from pillow_heif import from_pillow

    from_pillow(Image.new("RGB", (16, 16), colour(1))).save(folder / "b.heic")
    return files(["a.jfif"])(folder)


SIX = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
FLAT = [f"{i}.png" for i in range(6)]
TWO = {"cat": 3, "dog": 3}
LABELS = ["cat", "cat", "cat", "dog", "dog", "dog"]
NAMED = jsonl(*({"file_name": name, "label": label, "text": f"a {label}"} for name, label in zip(FLAT, LABELS, strict=True)))
ROWS = [["file_name", "label", "text"], *([name, label, f"a {label}"] for name, label in zip(FLAT, LABELS, strict=True))]
SPLIT = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(2)]
HALVES = {"cat": 4, "dog": 4}
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
    "annotations": [{"id": 9 * i + k, "image_id": i, "caption": f"number {i}, caption {k}"} for i in range(4) for k in range(2)],
}
MANIFEST = jsonl(*({"file": f"{i}.png", "seed": 0, "model_sha256": "00"} for i in range(2)))
TWELVE = jsonl(*({"file_name": f"{i}.png", "label": i} for i in range(12)))
NAN = '{"file_name": "0.png", "label": NaN, "text": NaN}\n{"file_name": "1.png", "label": "cat", "text": "a cat"}\n'
NFD = unicodedata.normalize("NFD", "café.png")

BUILDERS: list[tuple[str, Build, dict[str, Any]]] = [
    ("a flat folder", files(FLAT), {"images": 6}),
    ("class sub-folders", files(SIX), {"images": 6, "classes": TWO}),
    (
        "class sub-folders, deeper folders in them",
        files([f"{n}/x/y/{i}.png" for n in ("cat", "dog") for i in range(3)]),
        {"images": 6, "classes": TWO},
    ),
    ("class folders that are links, one in a circle", links(True), {"images": 6, "classes": TWO, "left_out": {"link in a circle": 1}}),
    ("one class folder of two is a link", links(False), {"images": 6, "classes": TWO, "left_out": {"link in a circle": 1}}),
    ("train/CLASS, val/CLASS (ImageNet)", files(SPLIT), {"images": 8, "classes": HALVES, "split": (4, 4)}),
    (
        "train/CLASS, test/CLASS (torchvision)",
        files([n.replace("val", "test") for n in SPLIT]),
        {"images": 8, "classes": HALVES, "split": (4, 4)},
    ),
    (
        "train, validation, test/CLASS (Hugging Face)",
        files([*(n.replace("val", "validation") for n in SPLIT), "test/cat/0.png", "test/dog/0.png"]),
        {"images": 8, "classes": HALVES, "split": (4, 4), "left_out": {"test, as val is held out": 2}},
    ),
    (
        "CLASS/train, CLASS/test",
        files(["/".join((n.split("/")[1], n.split("/")[0].replace("val", "test"), n.split("/")[2])) for n in SPLIT]),
        {"images": 8, "classes": HALVES, "split": (4, 4)},
    ),
    ("train and val without classes", files([f"{s}/{i}.png" for s in ("train", "val") for i in range(3)]), {"images": 6, "split": (3, 3)}),
    (
        "digits as class folders: 0 to 10",
        files([f"{c}/{i}.png" for c in range(11) for i in range(2)]),
        {"images": 22, "classes": {str(c): 2 for c in range(11)}},
    ),
    (
        "COCO: train2017, val2017, annotations/",
        files(
            ["train2017/0.png", "train2017/1.png", "val2017/2.png", "val2017/3.png"],
            {"annotations/captions_all2017.json": json.dumps(COCO)},
        ),
        {"images": 4, "captions": 4, "split": (2, 2)},
    ),
    ("captions in .txt beside (kohya)", files(FLAT, {f"{i}.txt": f"number {i}" for i in range(6)}), {"images": 6, "captions": 6}),
    ("captions in .caption beside, class folders", files(SIX, {"cat/0.caption": "a cat"}), {"images": 6, "classes": TWO, "captions": 1}),
    ("metadata.jsonl", files(FLAT, {"metadata.jsonl": NAMED}), {"images": 6, "classes": TWO, "captions": 6}),
    (
        "train/metadata.jsonl (Hugging Face)",
        files([f"train/{n}" for n in FLAT], {"train/metadata.jsonl": NAMED}),
        {"images": 6, "classes": TWO, "captions": 6},
    ),
    (
        "metadata.jsonl in each of train and validation",
        files([f"{s}/{n}" for s in ("train", "validation") for n in FLAT], {f"{s}/metadata.jsonl": NAMED for s in ("train", "validation")}),
        {"images": 12, "classes": {"cat": 6, "dog": 6}, "captions": 12, "split": (6, 6)},
    ),
    ("metadata.csv", files(FLAT, {"metadata.csv": table(ROWS)}), {"images": 6, "classes": TWO, "captions": 6}),
    ("metadata.csv with `;`", files(FLAT, {"metadata.csv": table(ROWS, ";")}), {"images": 6, "classes": TWO, "captions": 6}),
    ("metadata.tsv", files(FLAT, {"metadata.tsv": table(ROWS, "\t")}), {"images": 6, "classes": TWO, "captions": 6}),
    (
        "metadata.csv with spaces after the commas",
        files(FLAT, {"metadata.csv": table(ROWS).replace(",", ", ")}),
        {"images": 6, "classes": TWO, "captions": 6},
    ),
    ("metadata.csv in UTF-16", files(FLAT, {"metadata.csv": table(ROWS).encode("utf-16")}), {"images": 6, "classes": TWO, "captions": 6}),
    (
        "metadata.csv with texts only, class folders",
        files(SIX, {"metadata.csv": table([["file_name", "text"], ["cat/0.png", "a, b"]])}),
        {"images": 6, "classes": TWO, "captions": 1, "files_without_row": 5},
    ),
    (
        "labels.csv with the columns path, class",
        files(FLAT, {"labels.csv": table([["path", "class"], *([n, c] for n, c in zip(FLAT, LABELS, strict=True))])}),
        {"images": 6, "classes": TWO},
    ),
    (
        "a column of labels 0 to 11",
        files([f"{i}.png" for i in range(12)], {"metadata.jsonl": TWELVE}),
        {"images": 12, "classes": {str(i): 1 for i in range(12)}},
    ),
    ("NaN of pandas as label and text", files(FLAT[:2], {"metadata.jsonl": NAN}), {"images": 2, "classes": {"cat": 1}, "captions": 1}),
    (
        "a column `caption` with lists",
        files(FLAT[:1], {"metadata.jsonl": jsonl({"file_name": "0.png", "caption": ["a", "b"]})}),
        {"images": 1, "captions": 1},
    ),
    (
        "several rows for an image (Flickr30k)",
        files(FLAT[:1], {"results.csv": table([["image_name", "comment"], ["0.png", "a"], ["0.png", "b"]])}),
        {"images": 1, "captions": 1},
    ),
    (
        "rows with ./ and backslashes, NFD names",
        files(
            ["a/0.png", "a/1.png", NFD],
            {
                "metadata.jsonl": jsonl(
                    {"file_name": "./a/0.png", "label": "x"},
                    {"file_name": "a\\1.png", "label": "y"},
                    {"file_name": "café.png", "label": "z"},
                )
            },
        ),
        {"images": 3, "classes": {"x": 1, "y": 1, "z": 1}},
    ),
    (
        "half of the rows with a wrong folder",
        files(
            FLAT,
            {
                "metadata.jsonl": NAMED.replace('"file_name": "0', '"file_name": "train/0').replace(
                    '"file_name": "1', '"file_name": "train/1'
                )
            },
        ),
        {"images": 6, "classes": {"cat": 1, "dog": 3}, "captions": 4, "rows_without_file": 2, "files_without_row": 2},
    ),
    ("no row names a file", files(["x.png", "y.png"], {"metadata.jsonl": NAMED}), {"refused": "none of the 6 rows"}),
    (
        "a comma without quotes",
        files(FLAT, {"metadata.csv": "file_name,text\n0.png,a cat, sitting\n"}),
        {"refused": "line 2: 3 values for 2 columns"},
    ),
    (
        "lists and objects as attributes",
        files(
            FLAT[:2], {"metadata.jsonl": jsonl({"file_name": "0.png", "tags": ["a"], "bbox": {"x": 1}}, {"file_name": "1.png", "age": 3})}
        ),
        {"images": 2},
    ),
    (
        "Infinity as a number",
        files(FLAT[:2], {"metadata.jsonl": '{"file_name": "0.png", "age": Infinity}\n'}),
        {"refused": "line 1: age is inf"},
    ),
    (
        "dataset.json (StyleGAN, EDM2)",
        files(
            [f"00000/{i}.png" for i in range(4)], {"dataset.json": json.dumps({"labels": [[f"00000/{i}.png", i % 2] for i in range(4)]})}
        ),
        {"images": 4, "classes": {"0": 2, "1": 2}},
    ),
    (
        "a list of paths, classes after a tab",
        lambda f: files(SIX, {"list.txt": "".join(f"{n}\t{n[:3]}\n" for n in SIX)})(f) + "/list.txt",
        {"images": 6, "classes": TWO},
    ),
    (
        "a CSV of paths and labels",
        lambda f: (
            files(
                FLAT, {"list.csv": table([["path", "label"], *([n, c] for n, c in zip(FLAT, LABELS, strict=True)), ["gone.png", "cat"]])}
            )(f)
            + "/list.csv"
        ),
        {"images": 6, "classes": TWO, "rows_without_file": 1},
    ),
    ("a zip with class folders", zipped(SIX), {"images": 6, "classes": TWO}),
    ("a zip with a folder around", zipped(SIX, top="photos/"), {"images": 6, "classes": TWO}),
    (
        "a zip with dataset.json",
        zipped([f"00000/{i}.png" for i in range(4)], {"dataset.json": json.dumps({"labels": None})}),
        {"images": 4},
    ),
    ("a zip from a Mac", zipped([*SIX, "__MACOSX/cat/._0.png"]), {"images": 6, "classes": TWO, "left_out": {"hidden": 1}}),
    ("WebDataset shards in a folder", shards(""), {"images": 12, "classes": {"0": 4, "1": 4, "2": 4}, "captions": 12}),
    (
        "WebDataset shards: shard-{000..002}.tar",
        shards("/shard-{000..002}.tar"),
        {"images": 12, "classes": {"0": 4, "1": 4, "2": 4}, "captions": 12},
    ),
    (
        "WebDataset shards called train-*, val-*",
        shards("", prefix=("train", "val"), count=1),
        {"images": 8, "classes": {"0": 3, "1": 3, "2": 2}, "captions": 8, "split": (4, 4)},
    ),
    (
        "a compressed tar",
        shards("/shard-000.tar.gz", "w:gz", ".tar.gz", count=1),
        {"images": 4, "classes": {"0": 2, "1": 1, "2": 1}, "captions": 4},
    ),
    ("Parquet of the Hugging Face hub", parquet(["all.parquet"], "all.parquet"), {"images": 8, "classes": HALVES, "captions": 8}),
    (
        "data/train-*.parquet, data/validation-*.parquet",
        parquet(["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"], ""),
        {"images": 16, "classes": {"cat": 8, "dog": 8}, "captions": 16, "split": (8, 8)},
    ),
    ("datasets.save_to_disk", saved_to_disk, {"images": 8, "classes": HALVES, "captions": 8}),
    ("LMDB (LSUN)", lsun, {"images": 6}),
    (
        "npz: arr_0 (N,H,W,C), arr_1 labels",
        array(lambda p: np.savez(p, pictures(5), np.arange(5) % 2), "x.npz"),
        {"images": 5, "classes": {"0": 3, "1": 2}},
    ),
    (
        "npz: x_train, y_train, x_test, y_test (Keras)",
        array(
            lambda p: np.savez(p, x_train=pictures(5)[..., 0], y_train=np.arange(5) % 2, x_test=pictures(2)[..., 0], y_test=np.arange(2)),
            "mnist.npz",
        ),
        {"images": 7, "classes": {"0": 4, "1": 3}, "split": (5, 2)},
    ),
    ("safetensors: images, labels", array(safetensors, "x.safetensors"), {"images": 5, "classes": {"0": 3, "1": 2}}),
    ("npy: fields (N,C,H,W) of floats", array(lambda p: np.save(p, field(6, 2, 16, 16)), "x.npy"), {"images": 6}),
    ("npy: volumes (N,C,D,H,W)", array(lambda p: np.save(p, field(2, 1, 4, 16, 16)), "x.npy"), {"images": 8}),
    ("a folder of .npy, one image each", lambda f: [np.save(f / f"{i}.npy", field(3, 16, 16)) for i in range(3)] and str(f), {"images": 3}),
    ("DICOM slices", dicom, {"images": 4, "classes": {"patient": 4}}),
    ("NIfTI volumes", nifti, {"images": 5}),
    (
        "hidden and system files",
        files([*SIX, ".x.png", "cat/._0.png", "cat/.ipynb_checkpoints/0.png", "@eaDir/0.png"], {"cat/Thumbs.db": b"x"}),
        {"images": 6, "classes": TWO, "left_out": {"hidden": 5}},
    ),
    (
        "other files beside",
        files(FLAT[:2], {"a.mp4": b"x", "b.xcf": b"x", "README": b"x"}),
        {"images": 2, "left_out": {".mp4": 1, ".xcf": 1, "files without a suffix": 1}},
    ),
    ("a run of ours in it", run_inside, {"images": 2, "left_out": {"folder of a run": 1}}),
    (
        "pictures of `ldm sample`",
        files(["0.png", "1.png", "grid.png"], {"manifest.jsonl": MANIFEST}),
        {"images": 2, "left_out": {"not in manifest.jsonl": 1}},
    ),
    ("HEIC and JFIF", heic, {"images": 2}),
    ("an empty folder", lambda f: str(f), {"refused": "no images in"}),
    ("films only", files([], {"a.mp4": b"x"}), {"refused": "use -c data/clips.yaml"}),
    ("one picture", lambda f: files(["0.png"])(f) + "/0.png", {"refused": "is one picture"}),
    ("a text file that lists nothing", lambda f: files([], {"notes.txt": "hello"})(f) + "/notes.txt", {"refused": "none of the 1 files"}),
    ("a path that is not there", lambda f: f"{f}/gone", {"refused": "there is no file or folder"}),
    ("a URL", lambda f: "https://example.org/photos.zip", {"refused": "download it first"}),
    ("the name of a data set of the hub", lambda f: "user/flowers", {"refused": "download it first"}),
]
