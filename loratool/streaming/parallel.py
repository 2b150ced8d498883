"""Choose the device and the number of workers, and map a function over items by threads."""

from __future__ import annotations

import ctypes
import os
import platform
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import MachineError, UsageError
from ..numerics.arrays import CPU, Device
from .ranks import current_job
from .threads import restore_threads, set_threads

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

T = TypeVar("T")

R = TypeVar("R")

LOW_RANK = 32  # up to which Python's steps between two decompositions, one thread at a time, take as long as these

MAX_WORKERS = 8  # with more, memory bandwidth is the limit, and each takes memory for buffers

# Called with the bytes of output done so far and the total.
Progress = Callable[[int, int], None]


def counting(sizes: Iterable[int], progress: Progress | None) -> Callable[[], None]:
    """Return what is called once for each piece of work that ends, and tells the progress.

    Args:
        sizes: of the pieces in bytes; which of them has ended does not matter.
    """
    done, each = 0, [*sizes]
    total, left = sum(each), iter(each)

    def finished() -> None:
        nonlocal done
        done += next(left, 0)
        if progress:
            progress(done, total)

    return finished


def choose_device(name: str) -> Device:
    """Return the device that a --device option names; `auto` is a CUDA device if there is one, else the CPU.

    A GPU without a number is the first one; under torchrun, each rank on a machine gets a different one.

    Raises:
        UsageError: no device has this name.
        MachineError: the device is absent, or has no float64, which exact arithmetic needs.
    """
    if name == "cpu" or (name == "auto" and not may_have_gpu()):
        return CPU
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        remedy = "a GPU is cuda, the second one cuda:1"
        raise UsageError(f"{name!r} is none of auto, cpu, cuda, cuda:N", culprit="--device", remedy=remedy) from error
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise MachineError(f"{device.type} has no float64, which exact arithmetic needs", remedy="use --device cpu")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"there is no device {name}", remedy="use --device cpu")
    index = current_job().local_rank % torch.cuda.device_count() if device.index is None else device.index
    return Device(f"cuda:{index}")


def may_have_gpu() -> bool:
    """Return whether the system has a driver of a GPU, without torch, whose import takes a second."""
    drivers = ("nvidia[0-9]*", "nvhost*", "kfd", "dxg")  # NVIDIA's, of a Jetson too, AMD's, and Windows' in Linux
    return platform.system() == "Windows" or any(any(Path("/dev").glob(driver)) for driver in drivers)


def worker_count(device: object = "cpu", rank: int | None = None) -> int:
    """Return how many workers to run: one for each core that this process may use, up to MAX_WORKERS.

    torchrun's ranks on a machine share its cores. Work on a device other than the CPU has one worker.

    Args:
        rank: of factors, if each item decomposes those of a module. Threads gain nothing at LOW_RANK.
    """
    if str(device) != "cpu" or (rank is not None and rank <= LOW_RANK):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // current_job().local_count, MAX_WORKERS))


def map_in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Yield `function` of each item, in their order, computed by `workers` threads; at most `workers` results wait.

    Exhaust or close the generator: that restores the libraries' numbers of threads.
    """
    threads_before, source = set_threads(1), iter(items)
    try:
        with ThreadPoolExecutor(workers, initializer=set_threads, initargs=(1,)) as pool:
            waiting = deque(pool.submit(function, item) for item in islice(source, workers))
            try:
                while waiting:
                    result = waiting.popleft().result()
                    waiting.extend(pool.submit(function, item) for item in islice(source, 1))
                    yield result
            finally:
                for future in waiting:
                    future.cancel()
    finally:  # when all threads have ended: one may begin late, and set the number that all of them share
        restore_threads(threads_before)


@cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB that arrays freed, for the next ones: new pages take a quarter of resize's time."""
    with suppress(AttributeError, TypeError):  # of other libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 1 << 26)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)


class Ahead(Generic[T, R]):
    """Results of a function, computed ahead by threads, for items that are requested once and nearly in order.

    Each thread computes with one thread, so that no sum depends on the number of workers. `close` it: that restores the
    libraries' numbers of threads.
    """

    def __init__(self, function: Callable[[T], R], items: Iterable[T], workers: int) -> None:
        self._function, self._left, self._workers = function, dict.fromkeys(items), workers
        self._pending: dict[T, Future[R]] = {}
        self._threads_before = set_threads(1)
        self._pool = ThreadPoolExecutor(workers, initializer=set_threads, initargs=(1,))
        keep_freed_memory()

    def __call__(self, item: T) -> R:
        """Return the item's result, and start the next items."""
        for key in (item, *islice(self._left, self._workers + 1)):
            if key not in self._pending and (key == item or len(self._pending) <= self._workers):
                self._left.pop(key, None)
                self._pending[key] = self._pool.submit(self._function, key)
        return self._pending.pop(item).result()

    def close(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self._pool.shutdown()
        restore_threads(self._threads_before)
