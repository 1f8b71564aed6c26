"""Splits and classes by the names of folders."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

TRAIN, VAL, TEST = "train", "val", "test"
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
Parts = tuple[str, ...]


class Place(NamedTuple):
    """What the folder of an image says of it."""

    split: str | None  # train, val or test
    label: str | None


def split_of(part: str) -> str | None:
    """The split of a folder or a shard: `train`, `val2017`, `validation-00000-of-00001`, `train.0003`."""
    found = re.match(r"([a-z]+)([-_.]?\d[-_.\d]*(of[-_\d]+)?)?$", part.lower())
    return SPLITS.get(found[1]) if found else None


def places(folders: Iterable[str], depth: int = 0, one_is_a_class: bool = True) -> dict[str, Place]:
    """The split and the class of each folder of images; one that is in no split, where others are, is left out.

    depth: 1 where the first part is the name of a shard.  one_is_a_class: whether a folder that holds all images is one.
    """
    parts = {folder: tuple(filter(None, folder.split("/"))) for folder in folders}
    below = {folder: part[depth:] for folder, part in parts.items()}
    short = _without_common(below)
    splits: Mapping[str, str | None]
    for level in (0, 1):
        splits = {folder: split_of(part[level]) if len(part) > level else None for folder, part in short.items()}
        # classes may be called `test`: one set of folders must be split throughout, but for what lies outside at the top
        if _is_split(splits.values()) and (level == 0 or None not in splits.values()):
            rest = {folder: part[:level] + part[level + 1 :] for folder, part in short.items() if splits[folder]}
            return {folder: Place(splits[folder], *(part[:1] or (None,))) for folder, part in _without_common(rest).items()}
    splits = {folder: split_of(part[0]) if depth and part else None for folder, part in parts.items()}
    if not _is_split(splits.values()):
        splits = dict.fromkeys(parts)
    if one_is_a_class and not any(short.values()):
        short = {folder: part[-1:] for folder, part in below.items()}
    return {folder: Place(splits[folder], *(part[:1] or (None,))) for folder, part in short.items()}


def _is_split(found: Iterable[str | None]) -> bool:
    known = set(found)
    return TRAIN in known and bool(known & {VAL, TEST})


def _without_common(parts: Mapping[str, Parts]) -> dict[str, Parts]:
    """Paths without the folders in which all of them are."""
    common = 0
    while parts and len({part[: common + 1] for part in parts.values()}) == 1 and all(len(part) > common for part in parts.values()):
        common += 1
    return {folder: part[common:] for folder, part in parts.items()}
