"""What was found in the data, in a few sentences."""

from collections.abc import Iterator

import numpy as np

from ldm.data.batches import Keyed
from ldm.data.decode import HEIF, suffixes
from ldm.data.images import Images

SHOWN = 8  # classes, and reasons for which files are left out


def sentences(train: Keyed, held_out: Keyed) -> list[str]:
    """One line on what was read and what was not, and a line for each thing that the user should know."""
    images, records, report = train.images, train.images.records, train.images.report
    kinds = f"{len(records.names)} classes: {_classes(images)}" if records.names else "no classes"
    texts = int((np.diff(records.first_text) > 0).sum())
    parts = [
        f"{len(images):,} images in {report.what}, {len(train):,} to train and {len(held_out):,} held out",
        kinds,
        f"{texts:,} with captions" if texts else "no captions",
    ]
    if records.numbers:
        parts.append(f"numbers: {', '.join(_range(name, x) for name, x in sorted(records.numbers.items()))}")
    return ["; ".join(parts) + report.words(), *notices(images), *_held_out_only(train, held_out)]


def _range(name: str, values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{name} {known.min():g} to {known.max():g}" + ("" if len(known) == len(values) else f" (of {len(known):,} images)")


def _classes(images: Images) -> str:
    counts = np.bincount(images.records.labels + 1, minlength=len(images.names) + 1)
    shown = [f"{name} {count:,}" for name, count in zip(images.names[:SHOWN], counts[1:].tolist(), strict=False)]
    more = [f"and {len(images.names) - SHOWN} more"] if len(images.names) > SHOWN else []
    none = [f"{counts[0]:,} of no class"] if counts[0] else []
    return ", ".join([*shown, *more, *none])


def _held_out_only(train: Keyed, held_out: Keyed) -> Iterator[str]:
    images, labels = train.images, train.images.records.labels
    only = np.setdiff1d(labels[held_out.indices], labels[train.indices]).tolist()
    if only and only != [-1]:
        names = ", ".join(images.names[i] for i in only[:SHOWN] if i >= 0)
        yield f"classes that are held out only, so that the model never learns them: {names}"


def notices(images: Images) -> Iterator[str]:
    """What somebody should know of a set, whatever it is used for."""
    report, records = images.report, images.records
    yield from report.notes
    if report.rows_without_file or report.files_without_row:
        yield f"rows of metadata that name no image: {report.rows_without_file}; images without a row: {report.files_without_row}"
    if known := sorted(set(report.left_out) & HEIF - suffixes()):
        yield f"{' and '.join(known)} files need the package pillow-heif: pip install 'ldm[heif]'"
    texts = int((np.diff(records.first_text) > 0).sum())
    if 0 < texts < len(images):
        yield f"{len(images) - texts:,} of {len(images):,} images have no caption"


def told(images: Images) -> list[str]:
    """Sentences on a set that is only measured: what was left out of it, and what should be known."""
    words = images.report.words()
    return [*([f"{images.report.what}{words}"] if words else []), *notices(images)]
