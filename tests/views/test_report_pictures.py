"""Pictures of numbers: legible without colour, and in ASCII where a terminal has no more."""

from __future__ import annotations

import io

from loratool.cli.surface import Surface
from loratool.views.parts.document import Line, text_of
from loratool.views.parts.pictures import WIDTH, bars, grid, side_by_side, triangle

STEPS = (1, 2, 4, 8, 16, 32, 64)


def texts(lines: list[Line]) -> list[str]:
    return [text_of(line) for line in lines]


def test_bars_are_as_long_as_their_numbers() -> None:
    lines = texts(bars({"q": 1.0, "a_long_name": 4.0, "none": 0.0}, "x", "{:g}".format))
    assert [line.count("█") for line in lines] == [0, 9, 36, 0]
    assert lines[1] == "q            " + "█" * 9 + " 1" and lines[2].endswith(" 4")
    assert bars({}, "x", "{:g}".format) == []


def test_a_grid_is_its_numbers() -> None:
    one = grid("phi(i, j), input (random 0.012)", STEPS, STEPS, [[(i + j) / 12 for j in range(7)] for i in range(7)])
    lines = texts(one)
    assert lines[2].split() == ["1", "▁.00", "▁.08", "▂.17", "▃.25", "▃.33", "▄.42", "▅.50"]
    assert lines[-1].endswith("█1.0")
    assert [span.style for span in one[2] if span.style] == [
        "heat0",
        "heat0",
        "heat1",
        "heat2",
        "heat2",
        "heat3",
        "heat4",
    ]


def test_two_grids_stand_side_by_side_where_they_fit() -> None:
    steps, values = STEPS[:4], [[0.5] * 4] * 4
    one = grid("phi", steps, steps, values)
    both = texts(side_by_side(one, one))
    assert len(both) == len(one) and max(map(len, both)) <= WIDTH
    assert len(side_by_side(one, grid("x" * 50, steps, steps, values))) == 2 * len(one)


def test_a_triangle_has_each_two_once_with_their_signs() -> None:
    values = [[1.0, 0.5, -0.31], [0.5, 1.0, -0.001], [-0.31, -0.001, 1.0]]
    assert texts(triangle("cosine", "ABC", values)) == ["cosine", "     A    B", "B ▅.50", "C-▃.31 ▁.00"]
    wide = texts(triangle("x", "AB", [[0.0, 0.0], [12.3, 0.0]]))
    assert wide[-1] == "B █12 " and texts(triangle("x", "AB", [[0, 0], [1.26, 0]]))[-1] == "B █1.3"


def test_a_wide_triangle_is_cut_into_pictures_of_a_narrow_terminal() -> None:
    names = [chr(ord("A") + i) for i in range(20)]
    lines = texts(triangle("cosine", names, [[-0.99] * 20] * 20))
    assert max(map(len, lines)) <= WIDTH and sum("█.99" in line for line in lines) == 19 + 8
    assert sum(line.count("-█.99") for line in lines) == 20 * 19 // 2


def test_a_terminal_without_blocks_gets_ascii() -> None:
    stream = io.StringIO()
    surface = Surface(stream, 80, colour=False, plain=True)
    surface.print([*bars({"q": 1.0}, "x", "{:g}".format), *grid("phi", [1], [1], [[0.0]])])
    written = stream.getvalue()
    assert written.isascii() and "@" * 36 in written and " ..00" in written
