"""Files of arrays, of which one may hold several images: .npy, DICOM, NIfTI."""

import gzip
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.decode import naming
from ldm.data.sources.arrays import channels_first
from ldm.errors import extra

VOLUMES = (".npy", ".dcm", ".dicom", ".nii", ".nii.gz")


def count_slices(name: str, item: Path | bytes) -> int:
    """How many images a file holds: frames of DICOM, slices of NIfTI, the first axis of an array of four."""
    with naming(Path(name)):
        if name.lower().endswith(".npy"):
            array = _npy(item)
            return len(array) if array.ndim == 4 else 1
        if name.lower().endswith((".dcm", ".dicom")):
            return int(_dicom(name, item, stop_before_pixels=True).get("NumberOfFrames", 1))
        return int(np.prod(_nifti(name, item).shape[2:]))


def read_slice(name: str, item: Path | bytes, number: int) -> np.ndarray:
    """One image (C,H,W) in the units of the file; UserError where it cannot be read."""
    with naming(Path(name)):
        if name.lower().endswith(".npy"):
            array = _npy(item)
            return channels_first(np.array(array[number] if array.ndim == 4 else array))
        if name.lower().endswith((".dcm", ".dicom")):
            return _dicom_pixels(_dicom(name, item), number)
        return _nifti_slice(_nifti(name, item), number)


def window_of(name: str, item: Path | bytes) -> tuple[float, float] | None:
    """The values that a DICOM file says are black and white."""
    if not name.lower().endswith((".dcm", ".dicom")):
        return None
    with naming(Path(name)):
        header = _dicom(name, item, stop_before_pixels=True)
        centre, width = (np.atleast_1d(header.get(key, np.nan))[0] for key in ("WindowCenter", "WindowWidth"))
    low, high = float(centre) - float(width) / 2, float(centre) + float(width) / 2
    return (low, high) if np.isfinite(low) and low < high else None


def _npy(item: Path | bytes) -> np.ndarray:
    array = np.load(item, mmap_mode="r") if isinstance(item, Path) else np.load(io.BytesIO(item))  # without pickles
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"it is an array of shape {list(array.shape)}; allowed are (H,W), (C,H,W) and (N,C,H,W)")
    return array


def _dicom(name: str, item: Path | bytes, **options: Any) -> Any:
    pydicom = extra("pydicom", "medical", name)
    return pydicom.dcmread(item if isinstance(item, Path) else io.BytesIO(item), **options)


def _dicom_pixels(header: Any, number: int) -> np.ndarray:
    """Values (C,H,W) with the file's rescale slope and intercept; MONOCHROME1, where 0 is white, is turned round."""
    from pydicom.pixels import apply_modality_lut, convert_color_space

    pixels = header.pixel_array
    if int(header.get("NumberOfFrames", 1)) > 1:
        pixels = pixels[number]
    if pixels.ndim == 3:
        space = header.PhotometricInterpretation
        return np.ascontiguousarray((convert_color_space(pixels, space, "RGB") if "YBR" in space else pixels).transpose(2, 0, 1))
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        signed = bool(header.get("PixelRepresentation"))
        pixels = (-1 if signed else 2 ** int(header.BitsStored) - 1) - pixels.astype(np.int64)
    found = apply_modality_lut(pixels, header)
    whole = np.array_equal(found, np.round(found)) and np.abs(found).max(initial=0) < 2**31
    return np.asarray(found, np.int32 if whole else np.float32)[None]


def _nifti(name: str, item: Path | bytes) -> Any:
    nibabel = extra("nibabel", "medical", name)
    if isinstance(item, Path):
        return _nifti_at(str(item), item.stat().st_mtime_ns)
    content = gzip.decompress(item) if name.lower().endswith(".gz") else item
    return nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(content))


@lru_cache(maxsize=2)  # of a .nii.gz each slice would unpack the volume
def _nifti_at(path: str, changed: int) -> Any:
    nibabel = extra("nibabel", "medical", path)
    return nibabel.as_closest_canonical(nibabel.load(path))


def _nifti_slice(image: Any, number: int) -> np.ndarray:
    """Slice (1,H,W) along the third axis (and the fourth): what is in front is above."""
    at: tuple[Any, ...] = tuple(int(place) for place in np.unravel_index(number, image.shape[2:]))
    place = (slice(None), slice(None), *at)
    return np.asarray(image.dataobj[place], np.float32).T[None, ::-1]
