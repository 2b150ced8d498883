"""Limit the threads of a product, and give them back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loratool.streaming.threads import _openblas, one_thread, restore_threads, set_threads


def counts() -> dict[str, int]:
    """Return how many threads each library uses, as it says itself."""
    openblas = _openblas()
    return {**({"numpy": openblas[0]()} if openblas else {}), "torch": torch.get_num_threads()}


def test_threads_come_back() -> None:
    before = set_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), one_thread():
            assert set(counts().values()) == {1}
            _ = 1 / 0
        assert set(counts().values()) == {2}
    finally:
        restore_threads(before)
    assert counts() == before


def test_numpys_library_is_found_where_it_is_openblas() -> None:
    """In wheels of numpy; others may have one without these functions."""
    if not list((Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*")):
        pytest.skip("this numpy brings no OpenBLAS")
    assert _openblas()


def test_a_library_that_is_loaded_meanwhile_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's torch has as many threads after a command as before."""
    before = counts()
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, "torch")
        context = one_thread()
        context.__enter__()
    context.__exit__(None, None, None)
    assert counts() == before
