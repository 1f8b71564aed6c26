"""The matrix of layouts: each is opened as tools/layouts.py says, with the right picture to every label, or refused."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from layouts import Layout, facts, layouts, opened, table
from layouts_builders import colour

from ldm.errors import UserError

LAYOUTS = layouts()
PAGE = Path(__file__).parent.parent / "docs" / "data.md"


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if not each.refused], ids=lambda each: each.name)
def test_a_layout_is_opened_as_what_it_is(layout: Layout, tmp_path: Path) -> None:
    images = opened(layout, tmp_path)
    expected = {name: getattr(layout, name) for name in facts(images.source)}
    assert facts(images.source) == expected
    for index, record in enumerate(images.records):
        pixels = images.pixels(index)
        assert pixels.shape[1:] == (8, 8)
        if found := re.search(r"number (\d+)", record.text):
            wanted = colour(int(found[1]))
            assert max(abs(int(a) - b) for a, b in zip(pixels[:, 4, 4], wanted, strict=True)) <= 6, record


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.refused], ids=lambda each: each.name)
def test_a_layout_is_refused_in_a_sentence(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(layout.refused)):
        opened(layout, tmp_path)


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/layouts.py --table, and put it into docs/data.md"
