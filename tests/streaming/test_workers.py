"""Hold the workers: results in order, no further ahead than asked for, and libraries left as they were."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratool.files.containers.safetensors_file import TensorFile
from loratool.files.tensor_ref import TensorRef
from loratool.numerics.arrays import CPU, Numbers
from loratool.numerics.code_levels import Codes
from loratool.numerics.workspace import Workspace
from loratool.streaming.items import MapRows
from loratool.streaming.parallel import Ahead, map_in_order
from loratool.streaming.scattered import Scattered, Written
from loratool.streaming.threads import one_thread, restore_threads, set_threads
from loratool.streaming.workers import Worker


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


def test_an_error_is_raised_in_its_place_and_libraries_have_their_threads_again() -> None:
    before = set_threads(2)
    try:
        results = map_in_order(lambda x: 1 / x, [1, 2, 0, 4], 2)
        assert [next(results), next(results)] == [1.0, 0.5]
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert set(set_threads(2).values()) == {2}
    finally:
        restore_threads(before)


@pytest.mark.parametrize("order", [range(9), range(8, -1, -1), [4, 4, 0, 8, 3, 0]], ids=str)
def test_what_is_computed_ahead_is_right_in_any_order_and_at_most_the_next_few(order: Sequence[int]) -> None:
    started: list[int] = []
    lock = threading.Lock()

    def square(x: int) -> tuple[int, int]:
        with lock:
            started.append(x)
        return x * x, torch.get_num_threads()

    before = torch.get_num_threads()
    with closing(Ahead(square, range(9), 2)) as ahead:
        for asked, item in enumerate(order, 1):
            assert ahead(item) == (item * item, 1)
            assert len(started) <= asked + 2
    assert torch.get_num_threads() == before
    assert len(started) - len(set(started)) == len(order) - len(set(order))


def test_what_fails_ahead_is_raised_where_it_is_asked_for() -> None:
    with closing(Ahead(lambda x: 1 / x, [1, 0, 4], 2)) as ahead:
        assert ahead(1) == 1.0
        with pytest.raises(ZeroDivisionError):
            ahead(0)
        assert ahead(4) == 0.25


def test_one_thread_is_for_a_while() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


class OneStream:
    """A stream that has nothing to wait for."""

    def synchronize(self) -> None:
        pass


def test_codes_are_made_on_the_cpu_whatever_the_device(tmp_path: Path) -> None:
    """A GPU's worker gives a step its rows on the device, and takes codes from it as numpy writes them."""
    save_file({"x": torch.arange(12.0).view(3, 4)}, tmp_path / "x.safetensors")
    written: list[list[int]] = []
    devices: list[bool] = []
    worker = Worker(CPU)
    worker.stream = OneStream()  # type: ignore[assignment]
    worker.work = Workspace(torch.empty(0))  # a tensor, as on a GPU

    def step(base: Numbers, row: int, out: Codes, work: Workspace) -> None:
        hosts = (worker.host.take("out", np.uint8, 3, 4), worker.host.take("base", np.int32, 3, 4))
        places = (out.ctypes.data, base.bits.data_ptr())
        devices.extend(place == host.ctypes.data for place, host in zip(places, hosts, strict=True))
        out[...] = base.wide()

    def write(start: int, out: Codes, result: None) -> tuple[None, list[Written]]:
        written.extend(out.tolist())
        return None, []

    with closing(TensorFile(tmp_path / "x.safetensors")) as file, open(os.devnull, "wb") as target:
        source, how = TensorRef(file, "x"), Scattered(np.uint8, 4, 12, "x", write)
        place = (target, 0, np.uint8, 4, 0, 3, lambda start, stop: step, 3)
        worker(MapRows("x", source, 4, *place, scattered=(how, lambda name: (target, 0), 3)))
    assert devices == [True, False] and written == torch.arange(12).view(3, 4).tolist()
