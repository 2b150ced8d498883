"""Order of the rows of -v: numbers in names by their size, whatever the names are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import factors, write_peft

from loratool.views.parts.places import natural_order

Run = Callable[..., Any]


def test_layers_are_in_the_order_of_the_model(tmp_path: Path, run: Run) -> None:
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in (10, 2, 0, 1, 11)]
    adapter = write_peft(tmp_path / "a", {module: factors(6, 4, 2) for module in modules})
    lines = run("inspect", adapter, "-v").stdout.splitlines()
    found = [int(line.split(".")[2]) for line in lines if line.startswith("model.layers.")]
    assert found == [0, 1, 2, 10, 11]


@pytest.mark.parametrize(
    "names",
    [
        ["a", "a.1", "a.2", "a.10", "a.10.b", "b"],
        ["", "0", "a", "\u0663", "\u0663.1"],
        ["1" * 18 + "0" * 18, "1" * 18 + "9" * 18, "9" * 5000],
    ],
)
def test_any_names_have_an_order(names: list[str]) -> None:
    names, there = names[::-1], names
    assert sorted(names, key=natural_order) == there
