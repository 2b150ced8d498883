"""reports/rebuilt.py: JSON becomes the dataclass that it was, or the error names the place of what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from loratool.errors import InputError
from loratool.views.parts.rebuilt import rebuild


@dataclass(frozen=True)
class Leaf:
    name: str
    share: float | None = None


@dataclass(frozen=True)
class Other:
    ranks: Mapping[int, int]


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    by_number: Mapping[int, tuple[float, ...]]
    by_name: Mapping[str, Leaf]
    pair: tuple[str, int]
    either: Leaf | Other | None
    any: Any
    yes: bool
    kind: str = "tree"


TREE = Tree(
    (Leaf("a", 0.5), Leaf("b", 2)),
    {7: (1.0, -0.0), 0: (), (1 << 62): (3,)},
    {"": Leaf("\ud800"), "7": Leaf("c", 1e-320)},
    ("x", (1 << 63) - 1),
    Other({1: 2}),
    {"a": [None, -1, 1 << 70]},
    False,
)


def test_what_json_holds_comes_back() -> None:
    found = rebuild((Leaf, Tree, Other), json.loads(json.dumps(asdict(TREE))))
    assert found == TREE and repr(found) == repr(TREE)  # of which 2 is no 2.0, and -0.0 no 0.0


# what is put at a place -> the place and what is said
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an item": ({"leaves": [asdict(Leaf("a")), {**asdict(Leaf("a")), "name": 3}]}, "leaves[1].name: is 3, not a text"),
    "an item that is none": ({"leaves": [7]}, "leaves[0]: is 7, not an object"),
    "no list": ({"leaves": {}}, "leaves: is {}, not a list"),
    "a bool": ({"leaves": [{"name": "a", "share": True}]}, "leaves[0].share: is True, not a number"),
    "a number of thousands of digits": ({"leaves": [{"name": "a", "share": 10**400}]}, "leaves[0].share: is 1000000"),
    "a key that is no number": ({"by_number": {"x": []}}, "by_number: has the key 'x', not a whole number"),
    "a number that is written otherwise": ({"by_number": {"07": []}}, "by_number: has the key '07', not a whole"),
    "digits of another script": ({"by_number": {"\u0663": []}}, "by_number: has the key '\u0663', not a whole number"),
    "a sign": ({"by_number": {"-1": []}}, "by_number: has the key '-1', not a whole number"),
    "a long key": ({"by_number": {"1" * 5000: []}}, "by_number: has the key '111111111111...1111111111111', not"),
    "a value of a key": ({"by_number": {"7": [1, "x"]}}, "by_number['7'][1]: is 'x', not a number"),
    "no mapping": ({"by_name": []}, "by_name: is [], not an object"),
    "too short a tuple": ({"pair": ["x"]}, "pair: is a list of 1, not of 2"),
    "a tuple's item": ({"pair": ["x", -1]}, "pair[1]: is -1, not a whole number from 0 to 2^63"),
    "none of a union": ({"either": {"ranks": {"x": 1}}}, "either.ranks: has the key 'x', not a whole number"),
    "no bool": ({"yes": 0}, "yes: is 0, not true or false"),
    "another kind": ({"kind": "leaf"}, "kind: is 'leaf', not 'tree'"),
    "more": ({"more": 1}, "has an unknown key 'more' for a Tree"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_by_its_place(name: str) -> None:
    put, says = WRONG[name]
    with pytest.raises(InputError) as error:
        rebuild((Leaf, Tree, Other), {**json.loads(json.dumps(asdict(TREE))), **put})
    assert str(error.value).startswith(says) and error.value.remedy


def test_what_lacks_is_named() -> None:
    with pytest.raises(InputError, match="^is missing yes, which every Tree has\n"):
        rebuild((Leaf, Tree, Other), {key: each for key, each in asdict(TREE).items() if key != "yes"})
