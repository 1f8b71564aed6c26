"""The matrix of layouts: each is opened as tools/layouts.py says, labels with their pictures, or refused."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from layouts import LAYOUTS, Layout, expected, facts, number_shown, table

from ldm.data.images import SourceImages
from ldm.data.open import open_source
from ldm.errors import UserError

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
NAMED = re.compile(r"(\d+)\.\w+$")  # a picture file, whose name ends with its number
ACCEPTED, REFUSED = [each for each in LAYOUTS if not each.refused], [each for each in LAYOUTS if each.refused]
OPENED = pytest.mark.parametrize("layout", ACCEPTED, ids=lambda each: each.name)


@OPENED
def test_a_layout_is_opened_as_what_it_is(layout: Layout, tmp_path: Path) -> None:
    assert facts(open_source(layout.build(tmp_path))) == expected(layout)


@OPENED
def test_the_pixels_are_those_of_the_label_and_the_texts(layout: Layout, tmp_path: Path) -> None:
    images = SourceImages(layout.build(tmp_path), 8)
    numbers = [number_shown(images, index, layout.unit) for index in range(len(images))]
    assert len(set(numbers)) == layout.images
    for index, (number, record) in enumerate(zip(numbers, images.records, strict=True)):
        assert number is not None, f"the pixels of {record.id} are of no picture"
        if record.label is not None:
            assert record.label == images.names[number % len(images.names)]
        for text in record.texts:
            assert text.startswith(f"number {number},")
        name = NAMED.search(record.id)
        assert number == (int(name[1]) if name else index)
    if (held_out := images.source.held_out) is not None:  # the last pictures
        last = sorted(numbers)[-held_out.sum() :]  # type: ignore[type-var]
        assert sorted(number for number, held in zip(numbers, held_out, strict=True) if held) == last


@pytest.mark.parametrize("layout", REFUSED, ids=lambda each: each.name)
def test_a_layout_is_refused_in_a_sentence(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(layout.refused)):
        open_source(layout.build(tmp_path))


def test_no_two_layouts_have_one_name() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) > 40


def test_the_page_has_the_table(tmp_path: Path) -> None:
    assert table(tmp_path) in PAGE.read_text(encoding="utf-8"), "put what tools/layouts.py --table prints there"
