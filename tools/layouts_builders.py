"""Builders of the layouts of layouts.py, and what each must be opened as, in the order of the table."""

from layouts_files import Entry
from layouts_metadata import LISTS, METADATA
from layouts_packed import ARCHIVES, ARRAYS, TABLES
from layouts_trees import FOLDERS, REFUSED, UNWANTED

BUILDERS: list[Entry] = [*FOLDERS, *METADATA, *LISTS, *ARCHIVES, *TABLES, *ARRAYS, *UNWANTED, *REFUSED]
