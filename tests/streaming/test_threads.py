"""Limit the threads of a product, and give them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from loratool.streaming.threads import _openblas, one_thread, set_threads


def counts() -> tuple[int, ...]:
    """Return how many threads each library uses, as it says itself."""
    return (*(get() for get, _ in _openblas()), torch.get_num_threads())


def test_threads_come_back() -> None:
    before = set_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), one_thread():
            assert set(counts()) == {1}
            _ = 1 / 0
        assert set(counts()) == {2}
    finally:
        set_threads(*before)
    assert counts() == before


def test_numpys_library_is_found_where_it_is_openblas() -> None:
    """In wheels of numpy; others may have one without these functions."""
    if not list((Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*")):
        pytest.skip("this numpy brings no OpenBLAS")
    assert _openblas()
