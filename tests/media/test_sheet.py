"""Contact sheets: every picture is whole and in its place, labels are above, marks are seen."""

import numpy as np
import pytest

from ebr_engine.media.sheet import INK, MARK, PAPER, SheetTile, contact_sheet


def tiles(count, height=60, width=90, **more):
    return [SheetTile(np.full((height, width, 3), (i + 1) / 16, np.float32), f"task {i}", **more) for i in range(count)]


def places(sheet, value, height, width):
    """Rows and columns of the only area of this value, which has to be whole."""
    rows, columns = np.nonzero((sheet == np.float32(value)).all(-1))
    assert len(rows) == height * width
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (height, width)
    return rows.min(), columns.min()


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 12])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (120, 40), (33, 33)])
def test_every_picture_is_whole_and_in_reading_order(count, height, width):
    sheet = contact_sheet(tiles(count, height, width))
    found = [places(sheet, (i + 1) / 16, height, width) for i in range(count)]
    assert found == sorted(found)
    assert len(set(found)) == count


def test_a_sheet_of_photos_is_neither_a_strip_nor_a_tower():
    for height, width in ((60, 90), (90, 60), (512, 288)):
        sheet = contact_sheet(tiles(6, height, width))
        assert 0.5 < sheet.shape[1] / sheet.shape[0] < 2.7


def test_labels_are_above_their_picture_and_marks_have_their_colour():
    plain, marked = (contact_sheet(tiles(1, 200, 300, marked=marked)) for marked in (False, True))
    top, left = places(plain, 1 / 16, 200, 300)
    label = plain[:top, left : left + 300]
    assert (np.abs(label - PAPER).sum(-1) > 0.3).sum() > 30
    assert np.isclose(label, INK, atol=0.02).all(-1).any()
    assert not np.isclose(plain, MARK, atol=0.02).all(-1).any()
    assert np.isclose(marked, MARK, atol=0.02).all(-1).sum() > 2 * (200 + 300)


def test_a_label_that_is_too_long_or_looks_like_markup_is_fitted_in():
    long = SheetTile(np.full((50, 40, 3), 0.5, np.float32), "<b>rain & snow</b> " * 9)
    sheet = contact_sheet([long])
    places(sheet, 0.5, 50, 40)
    assert np.isfinite(sheet).all()


def test_pictures_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([*tiles(1), *tiles(1, 61)])
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([])
