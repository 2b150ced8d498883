"""Hold how the places are told at which codes are written."""

from __future__ import annotations

import pytest

from loratool.streaming.scattered import Strided, add_place


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ([], []),
        ([(0, 4)], [Strided("x", 0, 4)]),
        ([(8, 4), (12, 4), (16, 4)], [Strided("x", 8, 4, 4, 3)]),
        ([(0, 4), (100, 4), (200, 4), (208, 4), (216, 4)], [Strided("x", 0, 4, 100, 3), Strided("x", 208, 4, 8, 2)]),
        ([(9, 3), (6, 3), (3, 3), (0, 2)], [Strided("x", 9, 3, -3, 3), Strided("x", 0, 2)]),
        ([(5, 1), (5, 1), (5, 1), (6, 1)], [Strided("x", 5, 1, 0, 3), Strided("x", 6, 1)]),
    ],
)
def test_places_are_told_in_their_order(places: list[tuple[int, int]], found: list[Strided]) -> None:
    told: list[Strided] = []
    for at, nbytes in places:
        add_place(told, "x", at, nbytes)
    assert told == found
    assert [place for each in told for place in each] == places
    add_place(told, "y", 17, 1)
    assert told == [*found, Strided("y", 17, 1)]
