"""Hold the matrix in the guide `formats` to the code: where it says exact the deltas are the same, by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from lib.oracles.matrix import ADAPTERS_CHECKED, MODELS_CHECKED, READABLE, cell, columns
from torch import Tensor

from loratool.adapters.formats import FORMATS, open_adapter, written_formats
from loratool.adapters.stacked import stack_factors
from loratool.errors import NeedsFlag


@pytest.mark.parametrize("row", [*ADAPTERS_CHECKED.values(), *(row[1:] for row in MODELS_CHECKED.values())])
def test_each_format_is_held_to_the_software_that_is_named(row: tuple[str, str]) -> None:
    """The test names it, as a module that it imports or a program that it runs."""
    against, test = row
    text, software = (
        each.lower().replace("-", "_").replace(".", "_") for each in ((ROOT / "tests" / test).read_text(), against)
    )
    assert all(each.split("'")[0] in text for each in software.split(", "))


def test_it_has_every_format_and_every_target(tmp_path: Path) -> None:
    found = set()
    for i, make in enumerate(READABLE.values()):
        adapter = make(tmp_path / f"{i}")
        found.add(opened(adapter).format)
    assert found == set(FORMATS) and {column.split()[0] for column in columns()} == set(written_formats())


def opened(path: Path, alpha: float = 2.0) -> Any:
    """Open a file with the flags of matrix.cell, where it needs them."""
    try:
        return open_adapter(path, enabled=() if path.suffix == ".bin" else None)
    except NeedsFlag as error:
        return open_adapter(path, alpha, enabled=(True, False, True) if "MergedLinear" in error.message else None)


def rows(adapter: Any) -> dict[int, Tensor]:
    """Return by width the sum of X^T D^T D X over the modules, which does not depend on those that the rows are in."""
    total: dict[int, Tensor] = {}
    for update in adapter.updates.values():
        B, A = (torch.from_numpy(side[0]) for side in stack_factors(adapter.load(update)))
        width = A.shape[1]
        D_X = B @ (A @ torch.randn(width, 16, dtype=A.dtype, generator=torch.Generator().manual_seed(0)))
        total[width] = total.get(width, 0) + D_X.T @ D_X
    return total


@pytest.mark.parametrize("name", READABLE)
def test_exact_is_exact(name: str, tmp_path: Path) -> None:
    adapter, out = READABLE[name](tmp_path / "in"), tmp_path / "out.safetensors"
    for column in columns():
        said, report = cell(adapter, column, out)
        if report and said.startswith(("exact", "folded")) and "one component" not in said:
            one, two = rows(opened(adapter)), rows(opened(out, report.modules[0].alpha))
            assert one.keys() == two.keys()
            assert all(torch.allclose(one[n], two[n], rtol=1e-12, atol=1e-18) for n in one), (column, said)
