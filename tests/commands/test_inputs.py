"""Name adapters as a caller of the library may, and as none may."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, load_model
from safetensors.torch import load_file

import loratool
from loratool import UsageError
from loratool.commands.adapter_requests import AdapterRequest, parse_adapters

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a", [("a", 1.0)]),
        (Path("a"), [("a", 1.0)]),
        (("a", 0.5), [("a", 0.5)]),
        (["a", "b"], [("a", 1.0), ("b", 1.0)]),
        (("a", "b"), [("a", 1.0), ("b", 1.0)]),
        ((("a", 2), ("b", -1)), [("a", 2.0), ("b", -1.0)]),
        ({"a": 0.5, Path("b"): 0}, [("a", 0.5), ("b", 0.0)]),
        ({"a": 0.5}.items(), [("a", 0.5)]),
        ((each for each in ("a", "b")), [("a", 1.0), ("b", 1.0)]),
        (("a", np.float32(0.5)), [("a", 0.5)]),
        ({"a": np.int64(2), "b": np.float16(0.25), "c": Fraction(1, 4)}, [("a", 2.0), ("b", 0.25), ("c", 0.25)]),
    ],
    ids=lambda value: repr(value)[:18],
)
def test_what_is_taken(given: Any, meant: list[tuple[str, float]]) -> None:
    found = parse_adapters(given)
    assert [(each.path, each.weight) for each in found] == meant
    assert all(type(each.weight) is float for each in found)


def test_weights_of_components() -> None:
    assert parse_adapters(("a", 0.5, {"te": np.float32(0.25)})) == [AdapterRequest("a", 0.5, {"te": 0.25})]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "no adapter given"),
        ([], "no adapter given"),
        (None, "None is not an adapter"),
        (3, "3 is not an adapter"),
        (b"a", "b'a' is not an adapter"),
        ([b"a"], "b'a' is not an adapter"),
        (["a", 0.5], "0.5 is not an adapter"),
        ([["a", 0.5]], r"\['a', 0.5\] is not an adapter"),
        ([{"a": 0.5}], r"{'a': 0.5} is not an adapter"),
        ({3: 0.5}, r"\(3, 0.5\) is not an adapter"),
        ({("a", 1): 0.5}, "is not an adapter"),
        (("a", 1, None), r"\('a', 1, None\) is not an adapter"),
        (("a", None), "a: the weight None is not a number"),
        ({"a": "0.5"}, "a: the weight '0.5' is not a number"),
        ({"a": True}, "a: the weight True is not a number"),
        ({"a": np.True_}, "a: the weight .*True.* is not a number"),
        ({"a": torch.tensor(0.5)}, r"a: the weight tensor\(0.5000\) is not a number"),
        ({"a": 1j}, "a: the weight 1j is not a number"),
        ({"a": {"te": 0.5}}, "a: the weight {'te': 0.5} is not a number"),
        ({"a": math.nan}, "a: the weight nan is not a finite number"),
        ({"a": -math.inf}, "a: the weight -inf is not a finite number"),
        ({"a": 10**400}, "a: the weight inf is not a finite number"),
        (("a", 1, {"te": math.nan}), "a: the weight nan is not a finite number"),
        (("a", 1, {"te": True}), "a: the weight True is not a number"),
        (("a", 1, {3: 0.5}), "a: 3 is neither a pattern nor one of unet, unet2, te, te1"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_anything_else_is_refused_saying_what_is_taken(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        parse_adapters(given)
    if "names no" in says or "not a number" in says:
        assert "{path: weight}" in str(refused.value)


@pytest.mark.parametrize(
    "weights", [lambda a: {a: 0.5}, lambda a: {str(a): np.float32(0.5)}, lambda a: iter([(a, 0.5)])]
)
def test_every_verb_heeds_the_weights_of_a_mapping(weights: Callable[[Path], Any], tmp_path: Path) -> None:
    loratool.merge(BASE, weights(ADAPTER), tmp_path / "one")
    loratool.merge(BASE, [(ADAPTER, 0.5)], tmp_path / "two")
    one, two = (load_model(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert loratool.verify(BASE, weights(ADAPTER), tmp_path / "one").status == "proven"
    loratool.unmerge(tmp_path / "one", weights(ADAPTER), tmp_path / "back")
    back, base = load_model(tmp_path / "back"), load_model(BASE)
    assert all(torch.equal(back[name], base[name]) for name in base)
    assert loratool.combine(weights(ADAPTER), tmp_path / "sum").weights == (0.5,)
    loratool.combine([(ADAPTER, 0.5)], tmp_path / "pair")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sum", "pair")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_nothing_is_written_for_what_is_no_adapter(tmp_path: Path) -> None:
    for call in (loratool.merge, loratool.unmerge):
        with pytest.raises(UsageError, match="is not an adapter"):
            call(BASE, [{ADAPTER: 0.5}], tmp_path / "out")  # type: ignore[list-item]
    with pytest.raises(UsageError, match="is not an adapter"):
        loratool.verify(BASE, {3: 0.5}, BASE)  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="True is not a number"):
        loratool.combine({ADAPTER: True}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
