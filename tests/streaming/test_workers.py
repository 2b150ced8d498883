"""Hold the workers: results in order, no further ahead than asked for, and torch left as it was."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from loratool.streaming.workers import map_in_order


def test_results_come_in_order_and_wait_for_whoever_takes_them() -> None:
    started: list[int] = []
    lock = threading.Lock()

    def square(x: int) -> int:
        with lock:
            started.append(x)
        return x * x

    with closing(map_in_order(square, range(20), 3)) as results:
        assert next(results) == 0
        assert max(started, default=0) <= 3
        assert list(results) == [x * x for x in range(1, 20)]


def test_an_error_is_raised_in_its_place_and_torch_has_its_threads_again() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = map_in_order(lambda x: 1 / x, [1, 2, 0, 4], 2)
        assert [next(results), next(results)] == [1.0, 0.5]
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
