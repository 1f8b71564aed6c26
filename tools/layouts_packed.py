"""Layouts of archives, tables with pictures in them, databases, arrays and volumes."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from layouts_files import (
    CLASSES,
    SIX,
    TWO,
    Build,
    Entry,
    colour,
    contents,
    files,
    named,
    picture,
    said,
    tarred,
    together,
    zipped,
)
from layouts_trees import FOUR_EACH, edm

PHOTOS = named("{c}/{i}.jpg", range(6))
SHARDS = [f"shard-{number:03d}.tar" for number in range(3)]
MODULO_3 = {"0": 4, "1": 4, "2": 4}


def sample(number: int, with_json: bool) -> dict[str, bytes]:
    """The files of a sample of WebDataset; three classes."""
    key, label, text = f"{number:06d}", number % 3, said(number)
    told = {"cls": str(label), "txt": text}
    if with_json:
        told = {"json": json.dumps({"label": label, "caption": text})}
    return {
        f"{key}.jpg": picture(number, "JPEG"),
        **{f"{key}.{suffix}": x.encode() for suffix, x in told.items()},
    }


def shards(*names: str, give: str = "", with_json: bool = True) -> Build:
    """WebDataset shards of four samples each."""
    parts = []
    for place, name in enumerate(names):
        members = dict[str, bytes]()
        for number in range(4 * place, 4 * place + 4):
            members |= sample(number, with_json)
        parts.append(tarred(members, name))
    return together(*parts, give=give)


def hub_table(numbers: Iterable[int]) -> Any:
    """A table as the Hugging Face hub has them: images, names of classes in the schema, texts."""
    import pyarrow as pa

    numbers = list(numbers)
    columns = {
        "image": [{"bytes": picture(i, "JPEG"), "path": f"{i}.jpg"} for i in numbers],
        "label": [i % 2 for i in numbers],
        "text": [said(i) for i in numbers],
    }
    kinds = {
        "image": {"_type": "Image"},
        "label": {"names": CLASSES, "_type": "ClassLabel"},
        "text": {"_type": "Value"},
    }
    schema = json.dumps({"info": {"features": kinds}})
    return pa.table(columns).replace_schema_metadata({"huggingface": schema})


def parquet(*names: str, give: str = "") -> Build:
    """Files of 8 rows each, in row groups of 3."""

    def build(folder: Path) -> str:
        import pyarrow.parquet as pq

        for place, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(hub_table(range(8 * place, 8 * place + 8)), folder / name, row_group_size=3)
        return str(folder / give)

    return build


def saved_to_disk(folder: Path) -> str:
    import pyarrow as pa

    rows, name = hub_table(range(8)), "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    state = json.dumps({"_data_files": [{"filename": name}]})
    return files([], {"state.json": state, "dataset_info.json": "{}"})(folder)


def lsun(folder: Path) -> str:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 20) as base, base.begin(write=True) as transaction:
        for number in range(6):
            transaction.put(f"{number:08x}".encode(), picture(number, "WEBP"))
    return str(folder)


def array(name: str, save: Callable[[Path], Any]) -> Build:
    def build(folder: Path) -> str:
        save(folder / name)
        return str(folder / name)

    return build


def coloured(count: int) -> np.ndarray:
    """uint8 (N,16,16,3)."""
    return np.stack([np.full((16, 16, 3), colour(i), np.uint8) for i in range(count)])


def numbered(*shape: int, start: int = 0, unit: float = 1, dtype: str = "float32") -> np.ndarray:
    """Images (..., 16, 16) in each of which all values are unit times its number."""
    numbers = start + np.arange(np.prod(shape)).reshape(*shape, 1, 1)
    return (unit * np.broadcast_to(numbers, (*shape, 16, 16))).astype(dtype)


def safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"images": coloured(5).transpose(0, 3, 1, 2).copy(), "labels": np.arange(5) % 2}, path)


def dicom(folder: Path) -> str:
    """Four slices of 12 bits, 200 Hounsfield units apart, with slope, intercept and window."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    (folder / "patient").mkdir()
    for number in range(4):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = (
            meta.MediaStorageSOPClassUID,
            meta.MediaStorageSOPInstanceUID,
        )
        slice_.Rows = slice_.Columns = 16
        slice_.SamplesPerPixel, slice_.PixelRepresentation, slice_.PhotometricInterpretation = (
            1,
            0,
            "MONOCHROME2",
        )
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 12, 11
        slice_.RescaleSlope, slice_.RescaleIntercept, slice_.WindowCenter, slice_.WindowWidth = (
            2,
            -1024,
            40,
            2000,
        )
        slice_.PixelData = np.full((16, 16), (200 * number + 1024) // 2, "<u2").tobytes()
        slice_.save_as(folder / "patient" / f"{number}.dcm", enforce_file_format=True)
    return str(folder)


def nifti(folder: Path) -> str:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(numbered(5).transpose(2, 1, 0), np.eye(4)), folder / "brain.nii.gz")
    return str(folder)


def arrays_apart(folder: Path) -> str:
    for number in range(3):
        np.save(folder / f"{number}.npy", np.repeat(numbered(1, start=number), 3, 0))
    return str(folder)


def keras(path: Path) -> None:
    x, y = numbered(7, unit=20, dtype="uint8"), np.arange(7) % 2
    np.savez(path, x_train=x[:5], y_train=y[:5], x_test=x[5:], y_test=y[5:])


ARCHIVES: list[Entry] = [
    ("a zip with class folders", zipped(PHOTOS), {"images": 6, "classes": TWO}),
    ("a zip with a folder around", zipped(PHOTOS, top="photos/"), {"images": 6, "classes": TWO}),
    (
        "a zip with dataset.json",
        zipped(named("00000/{i}.png", range(4)), edm(4)),
        {"images": 4, "classes": {"0": 2, "1": 2}},
    ),
    (
        "a zip from a Mac",
        zipped([*SIX, "__MACOSX/cat/._0.png"]),
        {"images": 6, "classes": TWO, "left_out": {"hidden": 1}},
    ),
    (
        "a folder of zips",
        together(zipped(PHOTOS[:3], name="a.zip"), zipped(PHOTOS[3:], name="b.zip")),
        {"images": 6, "classes": TWO},
    ),
    ("a tar with class folders", tarred(contents(PHOTOS)), {"images": 6, "classes": TWO}),
    (
        "WebDataset shards in a folder",
        shards(*SHARDS),
        {"images": 12, "classes": MODULO_3, "captions": 12},
    ),
    (
        "WebDataset shards with .cls and .txt",
        shards(*SHARDS, with_json=False),
        {"images": 12, "classes": MODULO_3, "captions": 12},
    ),
    (
        "WebDataset shards: shard-{000..002}.tar",
        shards(*SHARDS, "shard-003.tar", give="shard-{000..002}.tar"),
        {"images": 12, "classes": MODULO_3, "captions": 12},
    ),
    (
        "WebDataset shards called train-*, val-*",
        shards("train-000.tar", "val-000.tar"),
        {"images": 8, "classes": {"0": 3, "1": 3, "2": 2}, "captions": 8, "split": (4, 4)},
    ),
    (
        "a compressed tar",
        shards("shard-000.tar.gz", give="shard-000.tar.gz"),
        {"images": 4, "classes": {"0": 2, "1": 1, "2": 1}, "captions": 4},
    ),
]

TABLES: list[Entry] = [
    (
        "Parquet of the Hugging Face hub",
        parquet("all.parquet", give="all.parquet"),
        {"images": 8, "classes": FOUR_EACH, "captions": 8},
    ),
    (
        "data/train-*.parquet, data/validation-*.parquet",
        parquet("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        {"images": 16, "classes": {"cat": 8, "dog": 8}, "captions": 16, "split": (8, 8)},
    ),
    ("datasets.save_to_disk", saved_to_disk, {"images": 8, "classes": FOUR_EACH, "captions": 8}),
    ("LMDB (LSUN)", lsun, {"images": 6}),
]

ARRAYS: list[Entry] = [
    (
        "npz: arr_0 (N,H,W,C), arr_1 labels",
        array("x.npz", lambda path: np.savez(path, coloured(5), np.arange(5) % 2)),
        {"images": 5, "classes": {"0": 3, "1": 2}},
    ),
    (
        "npz: x_train, y_train, x_test, y_test (Keras)",
        array("mnist.npz", keras),
        {"images": 7, "classes": {"0": 4, "1": 3}, "split": (5, 2), "unit": 20},
    ),
    (
        "npy: pictures (N,C,H,W) of 8 bits",
        array("x.npy", lambda path: np.save(path, coloured(5).transpose(0, 3, 1, 2))),
        {"images": 5},
    ),
    (
        "npy: pictures (N,H,W) of 16 bits",
        array("x.npy", lambda path: np.save(path, numbered(6, unit=9000, dtype="uint16"))),
        {"images": 6, "unit": 9000},
    ),
    (
        "safetensors: images, labels",
        array("x.safetensors", safetensors),
        {"images": 5, "classes": {"0": 3, "1": 2}},
    ),
    (
        "npy: fields (N,C,H,W) of floats",
        array("x.npy", lambda path: np.save(path, np.repeat(numbered(6, 1), 2, 1))),
        {"images": 6, "unit": 1},
    ),
    (
        "npy: volumes (N,C,D,H,W)",
        array("x.npy", lambda path: np.save(path, numbered(2, 1, 4))),
        {"images": 8, "unit": 1},
    ),
    ("a folder of .npy, one image each", arrays_apart, {"images": 3, "unit": 1}),
    ("DICOM slices", dicom, {"images": 4, "classes": {"patient": 4}, "unit": 200}),
    ("NIfTI volumes", nifti, {"images": 5, "unit": 1}),
]
