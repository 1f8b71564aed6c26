"""The images in a tree of files, by the layouts that people have."""

import json
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np

from ldm.data.decode import suffixes
from ldm.data.records import Record, Records
from ldm.data.sources.annotations import TABLES, beside, normal
from ldm.data.sources.layout import TEST, TRAIN, VAL, places
from ldm.data.sources.rows import Rows
from ldm.data.sources.source import Item, Source
from ldm.data.sources.trees import MANIFEST, Tree
from ldm.data.sources.volumes import VOLUMES, count_slices, read_slice, window_of
from ldm.errors import UserError

BESIDE = (".txt", ".caption", ".cls", ".json")  # of the name of a picture
DOUBLE = (".nii.gz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
LOOKED_FOR = "pictures (.jpg .png .webp .tif ...), arrays (.npy), DICOM and NIfTI slices, at any depth"


class TreeSource(Source):
    """The pictures of a tree of files.

    Classes are sub-folders; train, val and test folders above or below them are the split.  Texts and classes may lie
    beside a picture (.txt, .caption, .cls, .json), in tables of metadata in any folder, in captions of COCO, and in the
    dataset.json of StyleGAN and EDM2; a class of theirs goes before the folder's.
    """

    def __init__(self, tree: Tree, rows: Rows | None = None) -> None:
        self.tree, self.report = tree, tree.report
        pictures, texts, others = self._sorted()
        texts, unused = self._beside(pictures, texts)
        rows = self._tables(others + unused) if rows is None else rows
        files, held_out = self._kept(pictures)
        self.files = np.array(files, np.int64)
        self.slices = self._slices()
        if not len(self.files if self.slices is None else self.slices):
            raise UserError(f"no images in {str(tree.path)!r} or below it{self.report.words()}: looked for {LOOKED_FOR}")
        self.is_array = any(suffix_of(tree.names[index]) == ".npy" for index in self.files[:1].tolist())
        self.records = Records(self._records(rows, texts))
        self._count_rows(rows)
        told = np.array(held_out, bool) if self.slices is None else np.array(held_out, bool)[self.slices[:, 0]]
        self.held_out = told if 0 < told.sum() < len(told) else None
        if tree.runs is not None:
            runs, of = np.unique(tree.runs.of[self.files], return_inverse=True)
            self.runs = of, tree.runs.files[runs]

    def _sorted(self) -> tuple[array, dict[str, int], list[int]]:
        """Pictures, what may lie beside one (by its name), and other files."""
        pictures, texts, others, known = array("q"), dict[str, int](), list[int](), suffixes()
        folders = dict[str, None]()
        for index, name in enumerate(self.tree.names):
            suffix = suffix_of(name)
            if suffix in known or suffix in VOLUMES:
                pictures.append(index)
                folders[name.rpartition("/")[0]] = None
            elif suffix in BESIDE:
                texts[name] = index
            else:
                others.append(index)
        self.places = places(folders, self.tree.depth, self.tree.one_is_a_class)
        return pictures, texts, others

    def _stem(self, name: str) -> str:
        """What files that belong together have in common; in WebDataset it ends at the first dot."""
        folder, slash, base = name.rpartition("/")
        return folder + slash + (base.split(".")[0] if self.tree.has_keys else base[: base.rfind(".")])

    def _beside(self, pictures: array, texts: dict[str, int]) -> tuple[dict[str, int], list[int]]:
        """Files beside a picture by their names, and the numbers of the others."""
        stems = {self._stem(self.tree.names[index]) for index in pictures} if texts else set()
        used = {name: index for name, index in texts.items() if self._stem(name) in stems and "metadata." not in name}
        return used, [index for name, index in texts.items() if name not in used]

    def _tables(self, others: list[int]) -> Rows:
        """What the tables among other files say; the rest of them is counted."""
        rows, tree = Rows(), self.tree
        order = {index: (TABLES.index(suffix), tree.names[index]) for index in others if (suffix := suffix_of(tree.names[index])) in TABLES}
        for index in sorted(order, key=order.__getitem__):
            folder, _, base = tree.names[index].rpartition("/")
            if base == MANIFEST or (len(others) > 1000 and folder and not base.startswith(("metadata.", "captions"))):
                continue
            if rows.read(tree.names[index], tree.content(index), self.report, required=base.startswith("metadata.")):
                others.remove(index)
        for index in others:
            name = tree.names[index]
            if name == MANIFEST and self._manifest is not None:
                continue
            self.report.leave_out(suffix_of(name) or "files without a suffix", name)
        return rows

    def _kept(self, pictures: array) -> tuple[array, array]:
        """The files that are images of the set, and which are held out; the others are counted."""
        files, held_out, keys, listed = array("q"), array("b"), set[str](), self._manifest
        has_val = any(place.split == VAL for place in self.places.values())
        for index in pictures:
            name = self.tree.names[index]
            place = self.places.get(name.rpartition("/")[0])
            key = self._stem(name) if self.tree.has_keys else ""
            if place is None:
                self.report.leave_out("outside of train, val, test", name)
            elif has_val and place.split == TEST:
                self.report.leave_out("test, as val is held out", name)
            elif listed is not None and name not in listed:
                self.report.leave_out(f"not in {MANIFEST}", name)
            elif key in keys:
                self.report.leave_out("further picture of a sample", name)
            else:
                files.append(index)
                held_out.append(place.split not in (TRAIN, None))
                if key:
                    keys.add(key)
        return files, held_out

    @cached_property
    def _manifest(self) -> set[str] | None:
        """The pictures in the manifest of a folder that `ldm sample` wrote; None where there is none of ours."""
        index = next((index for index, name in enumerate(self.tree.names) if name == MANIFEST), None)
        if index is None:
            return None
        try:
            entries = [json.loads(line) for line in self.tree.content(index).splitlines() if line.strip()]
            found = {str(entry["file"]) for entry in entries if entry["model_sha256"]}
        except (ValueError, TypeError, KeyError, RecursionError):
            return None  # somebody else's
        self.report.notes.append(f"they are pictures that `ldm sample` made: the {len(found)} of {MANIFEST}")
        return found

    def _slices(self) -> np.ndarray | None:
        """(place in `files`, slice) of each image; None where each file is one image."""
        counts, windows = np.ones(len(self.files), np.int64), set[tuple[float, float] | None]()
        for place, index in enumerate(self.files.tolist()):
            if suffix_of(name := self.tree.names[index]) not in VOLUMES:
                continue
            try:
                counts[place] = count_slices(name, item := self.tree.read(index))
                windows.add(window_of(name, item))
            except UserError as error:
                counts[place] = 0
                self.report.leave_out("cannot be read", str(error))
        if len(windows) == 1 and (window := windows.pop()) is not None:
            self.window = window
            self.report.notes.append(f"the files say that {window[0]:g} is black and {window[1]:g} white (--data.window)")
        elif len(windows) > 1:
            self.report.notes.append(f"the files have {len(windows)} windows of black and white, of which none is taken")
        if (counts == 1).all():
            return None
        starts = counts.cumsum() - counts
        places = np.repeat(np.arange(len(counts)), counts)
        return np.stack([places, np.arange(len(places)) - starts[places]], 1)

    def _records(self, rows: Rows, texts: dict[str, int]) -> Iterator[Record]:
        last, record = -1, Record("")
        numbered = self.slices is not None and bool((self.slices[:, 1] > 0).any())
        for image in range(len(self.files) if self.slices is None else len(self.slices)):
            place, number = (image, 0) if self.slices is None else self.slices[image].tolist()
            if place != last:
                last, record = place, self._record(self.tree.names[int(self.files[place])], rows, texts)
            yield replace(record, id=f"{record.id}#{number}") if numbered else record

    def _record(self, name: str, rows: Rows, texts: dict[str, int]) -> Record:
        row = rows.of(unicodedata.normalize("NFC", normal(name)))
        label, found, numbers = (None, (), {}) if row is None else (row.label, row.texts, row.numbers)
        if not rows.has_labels:
            label = self.places[name.rpartition("/")[0]].label
        if texts:
            stem = self._stem(name)
            for suffix in BESIDE:
                if (index := texts.get(stem + suffix)) is not None:
                    told = beside(stem + suffix, self.tree.content(index))
                    found, label = found + told.texts, label if told.label is None else told.label
        return Record.of(name, label, found, numbers)

    def _count_rows(self, rows: Rows) -> None:
        """Rows without file and files without row; UserError where no row fits."""
        self.report.rows_without_file, self.report.files_without_row = rows.without_file(), rows.without_row
        if rows.conflicts:
            self.report.notes.append(f"images with rows of two classes, of which the first is taken: {rows.conflicts}")
        if rows.by_file and rows.matched == 0:
            raise UserError(
                f"none of the {len(rows.by_file)} rows in {' and '.join(rows.files)} names an image: the first is "
                f"{self.report.rows_without_file.example!r}, the first image {self.records.ids[0]!r}; "
                "write file_name relative to the folder of the table"
            )

    def read(self, index: int) -> Item:
        place, number = (index, 0) if self.slices is None else self.slices[index].tolist()
        file = int(self.files[place])
        found, name = self.tree.read(file), self.tree.names[file]
        return read_slice(name, found, number) if suffix_of(name) in VOLUMES else found

    def stamps(self) -> Iterator[object]:
        return (self.tree.stamp(index) for index in self.files.tolist())


def suffix_of(name: str) -> str:
    """`.jpg` of `a/B.JPG`, `.nii.gz` and `.tar.gz` with both parts, "" of a name without one."""
    base = name[name.rfind("/") + 1 :].lower()
    double = next((both for both in DOUBLE if base.endswith(both)), None)
    return double or (base[base.rfind(".") :] if "." in base else "")
