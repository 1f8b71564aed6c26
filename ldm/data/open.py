"""A path -> a source of images, whatever its format: it is recognised, or refused with what was looked for."""

from pathlib import Path

from ldm.data.decode import suffixes
from ldm.data.films import VIDEO
from ldm.data.sources import arrays
from ldm.data.sources.annotations import Row, decoded
from ldm.data.sources.arrays import ArraySource, Depth
from ldm.data.sources.databases import LMDBSource
from ldm.data.sources.rows import Rows
from ldm.data.sources.source import Report, Source
from ldm.data.sources.tables import TableSource
from ldm.data.sources.tree_source import TreeSource, suffix_of
from ldm.data.sources.trees import Folder, Listed, Tars, Zips, is_run
from ldm.data.sources.volumes import VOLUMES
from ldm.errors import UserError
from ldm.paths import existing

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PACKED = {*TARS, ".zip", ".parquet", ".arrow", ".npy", ".npz", ".safetensors", ".mdb"}
LISTS = (".txt", ".lst", ".csv", ".tsv", ".jsonl")
LOOKED_FOR = (
    "allowed are a folder of images, a .zip, .tar or .parquet file (or several: 'shards/{000..009}.tar'), an LMDB folder, arrays "
    "(.npy, .npz, .safetensors), DICOM and NIfTI files, and a list of files (.txt, .csv, .tsv, .jsonl)"
)


def open_source(path: str, own: Path | None = None, depth: Depth = "slices") -> Source:
    """Open what a path holds.

    own: the run's folder, whose pictures are no images of the user.  depth: see ArraySource.
    UserError where there is nothing, or nothing that is known.
    """
    paths = existing(path)
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0], own, depth)
    return _open_files(paths, paths[0].parent, depth)


def folder_of(path: str, what: str) -> Path:
    """A folder that must be there; what: it should hold."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.path is {path!r}, which is not a folder: give a folder of {what}")
    return folder


def _open_folder(folder: Path, own: Path | None, depth: Depth) -> Source:
    if (folder / "data.mdb").is_file():
        return LMDBSource(folder)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # of datasets.save_to_disk
        return _open_saved(folder)
    tree = Folder(folder, own)
    packed, has_images, films = dict[str, list[Path]](), False, 0
    for name in tree.names:
        suffix = suffix_of(name)
        has_images |= suffix in suffixes() or (suffix in VOLUMES and suffix != ".npy")
        films += suffix in VIDEO
        if suffix in PACKED:
            packed.setdefault(suffix, []).append(folder / name)
    for kinds in (TARS, (".zip",), (".parquet",), (".arrow",), (".npz", ".safetensors")) if not has_images else ():
        several = sorted(path for kind in kinds for path in packed.get(kind, ()) if not path.name.startswith("metadata."))
        if several:
            return _open_files(several, folder, depth)
    if not has_images and len(packed.get(".npy", ())) == 1:  # of several each is one image
        return ArraySource(packed[".npy"][0], depth)
    if databases := sorted({path.parent for path in packed.get(".mdb", ())}):
        raise UserError(f"{str(folder)!r} holds {len(databases)} LMDB databases: give one, such as {str(databases[0])!r}")
    if films and not has_images:
        raise UserError(f"{str(folder)!r} holds {films} films and no images: use -c data/clips.yaml")
    source = TreeSource(tree)
    if is_run(folder) or is_run(folder.parent):
        source.report.notes.append(f"{str(folder)!r} is a folder of a run of ldm: these are pictures that it made")
    return source


def _open_saved(folder: Path) -> Source:
    """What datasets.save_to_disk wrote; files called cache-* are results of its `map`."""
    for state in folder.rglob("state.json"):
        if b'"_indices_files": [{' in state.read_bytes():
            raise UserError(f"{str(folder)!r} was saved with a selection of its rows: call flatten_indices() before save_to_disk")
    files = sorted(file for file in folder.rglob("*.arrow") if not file.name.startswith("cache-"))
    if not files:
        raise UserError(f"no .arrow files in {str(folder)!r} or below it, which datasets.save_to_disk writes: save it again")
    return TableSource(files, folder)


def _open_files(paths: list[Path], root: Path, depth: Depth) -> Source:
    kinds = {suffix_of(path.name) for path in paths}
    if not all(path.is_file() for path in paths):
        raise UserError(f"{str(next(path for path in paths if not path.is_file()))!r} is no file: give files of one kind, or one folder")
    if kinds <= {".zip"}:
        return TreeSource(Zips(paths))
    if all(path.name.lower().endswith(TARS) for path in paths):
        return TreeSource(Tars(paths))
    if kinds <= {".parquet"} or kinds <= {".arrow"}:
        return TableSource(paths, root)
    kind, path = suffix_of(paths[0].name), paths[0]
    if len(paths) > 1:
        raise UserError(f"several files of the kind {' '.join(sorted(kinds))} were given: {LOOKED_FOR}")
    if kind in (".mdb", ".lmdb"):
        return LMDBSource(path.parent if path.name == "data.mdb" else path)
    if kind in arrays.SUFFIXES:
        return ArraySource(path, depth)
    if kind in LISTS:
        return _open_list(path)
    if kind in VOLUMES:
        return TreeSource(Listed(path, [path.name]))
    what = "one picture" if kind in suffixes() else "a film: use -c data/clips.yaml" if kind in VIDEO else "nothing that is known"
    raise UserError(f"{str(path)!r} is {what}: {LOOKED_FOR}")


def _open_list(path: Path) -> Source:
    """The files of a list: a path in each line, and a class after a tab or a space; or a table with a column of paths."""
    rows, root = Rows(), path.parent
    if suffix_of(path.name) in (".txt", ".lst"):
        lines = decoded(path.name, path.read_bytes()).splitlines()
        entries = [_entry(root, line.strip()) for line in lines if line.strip()]
        rows.has_labels = any(label for _, label in entries)
        rows.files.append(path.name)
        for name, label in entries:
            rows.add(name, Row(label))
    else:
        report = Report("")
        rows.read(path.name, path.read_bytes(), report)
    there = [name for name in rows.paths if (root / name).is_file()]
    if not there:
        raise UserError(
            f"none of the {len(rows.paths)} files in {str(path)!r} is there, the first is {next(iter(rows.paths), '')!r}: {LOOKED_FOR}"
        )
    return TreeSource(Listed(path, there), rows)


def _entry(root: Path, line: str) -> tuple[str, str | None]:
    """A path and its class; paths may have spaces in them."""
    if (root / line).exists():
        return line, None
    name, _, label = line.rpartition("\t" if "\t" in line else " ")
    return (name, label) if name and (root / name).exists() else (line, None)
