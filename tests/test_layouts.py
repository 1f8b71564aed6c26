"""The matrix of layouts: each is opened as tools/layouts.py says, with the right picture to every label, or refused."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from layouts import LAYOUTS, Layout, expected, facts, number_shown, table

from ldm.data.images import open_images
from ldm.data.open import open_source
from ldm.errors import UserError

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
NAMED = re.compile(r"(\d+)\.\w+$")  # a picture file, whose name ends with its number
OPENED = pytest.mark.parametrize("layout", [each for each in LAYOUTS if not each.refused], ids=lambda each: each.name)


@OPENED
def test_a_layout_is_opened_as_what_it_is(layout: Layout, tmp_path: Path) -> None:
    assert facts(open_source(layout.build(tmp_path))) == expected(layout)


@OPENED
def test_the_pixels_are_those_of_the_label_and_the_texts(layout: Layout, tmp_path: Path) -> None:
    path = layout.build(tmp_path)
    images, held_out = open_images(path, 8), open_source(path).held_out
    numbers = [number_shown(images, index, layout.unit) for index in range(len(images))]
    assert None not in numbers
    assert len(set(numbers)) == layout.images
    for number, record in zip(numbers, images.records, strict=True):
        assert number is not None
        assert record.label in (None, images.names[number % max(1, len(images.names))])
        assert {re.match(r"number (\d+)", text)[1] for text in record.texts} <= {str(number)}  # type: ignore[index]
        if name := NAMED.search(record.id):
            assert int(name[1]) == number
    if held_out is not None:  # the pictures with the greatest numbers
        assert [is_held_out for _, is_held_out in sorted(zip(numbers, held_out.tolist(), strict=True))] == sorted(held_out)  # type: ignore[type-var]


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.refused], ids=lambda each: each.name)
def test_a_layout_is_refused_in_a_sentence(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(layout.refused)):
        open_source(layout.build(tmp_path))


def test_no_two_layouts_have_one_name() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) > 40


def test_the_page_has_the_table() -> None:
    if not PAGE.is_file():
        pytest.skip("docs/data.md is not written yet")
    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/layouts.py --table, and put it into docs/data.md"
