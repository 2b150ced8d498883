"""Hold the steps that run without Python's collector to leaving it as their caller had it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.errors import InputError


@pytest.mark.parametrize("on", [True, False])
def test_a_merge_leaves_the_collector_as_it_was(tmp_path: Path, on: bool) -> None:
    base = write_model(tmp_path / "base", {"x.weight": weights(10, 12)})
    good, bad = (write_peft(tmp_path / name, {name: factors(10, 12, 3)}) for name in ("x", "y"))
    (gc.enable if on else gc.disable)()
    try:
        loratool.merge(base, good, tmp_path / "out", dry_run=True)
        assert gc.isenabled() == on
        with pytest.raises(InputError):
            loratool.merge(base, bad, tmp_path / "out", dry_run=True)
        assert gc.isenabled() == on
    finally:
        gc.enable()
