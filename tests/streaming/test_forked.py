"""Hold forked workers to the outputs and errors of threads, and to leaving nothing where one dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, slow, weights, write_model, write_peft

import loratool
from loratool import InputError, MachineError, NeedsFlag
from loratool.streaming import forked as processes
from loratool.streaming import workers as runtime
from loratool.streaming.forked import run_forked

pytestmark = pytest.mark.skipif(not processes.CAN_FORK, reason="forks on Linux alone")
BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "WORTH_A_FORK", 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("workers", [slow(2), 3, slow(7)])
@pytest.mark.slow
def test_outputs_are_those_of_threads(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for name, worth in (("threads", 1 << 60), ("forks", 0)):
        monkeypatch.setattr(runtime, "WORTH_A_FORK", worth)
        reports.append(loratool.merge(BASE, ADAPTER, tmp_path / name, workers=workers))
        loratool.unmerge(tmp_path / name, ADAPTER, tmp_path / f"{name}-back", workers=workers)
        approximate = loratool.unmerge(tmp_path / name, ADAPTER, tmp_path / f"{name}-near", approximate=True, workers=2)
        reports.append((approximate.doubtful, approximate.farthest))
    assert contents(tmp_path / "threads") == contents(tmp_path / "forks")
    assert contents(tmp_path / "forks-back") == contents(BASE)
    assert reports[0].tensors == reports[2].tensors and reports[1] == reports[3]


@pytest.mark.usefixtures("forked")
class TestErrors:
    def test_of_a_step_arrive_as_they_were_raised(self, tmp_path: Path) -> None:
        loratool.merge(BASE, ADAPTER, tmp_path / "merged")
        file = tmp_path / "merged" / "model-00001-of-00002.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(InputError, match="edited since") as raised:
            loratool.unmerge(tmp_path / "merged", ADAPTER, tmp_path / "back", workers=2)
        assert raised.value.culprit and raised.value.culprit.startswith("model.")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]

    def test_of_the_parent_stop_the_workers(self, tmp_path: Path) -> None:
        W = weights(64, 64, dtype=torch.float16).fill_(60000)
        base = write_model(tmp_path / "base", {f"m.{i}.q.weight": W.clone() for i in range(8)})
        adapter = write_peft(
            tmp_path / "adapter",
            {f"m.{i}.q": factors(64, 64, 4) for i in range(8)},
            lora_alpha=1e7,
            fan_in_fan_out=False,
        )
        with pytest.raises(NeedsFlag, match="become infinite"):
            loratool.merge(base, adapter, tmp_path / "out", workers=3)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


class TestTheWorkers:
    def run(self, items: Iterator[Any], work: Callable[[Any], list[Any]], workers: int = 2) -> list[Any]:
        return [(item, found) for _, item, found in run_forked(items, count(), lambda: work, workers)]

    def test_each_item_is_done_once_whatever_their_number(self) -> None:
        for number in (0, 1, 3, 100):
            found = self.run(iter(range(number)), lambda item: [item * item, os.getpid()], 4)
            assert sorted((item, square) for item, (square, _) in found) == [(i, i * i) for i in range(number)]
            assert all(gone(pid) and pid != os.getpid() for _, (_, pid) in found)

    def test_only_those_that_are_drawn_are_run(self) -> None:
        drawn = iter([1, 4, 5, 11, 30, 31])
        found = run_forked(iter(range(100, 112)), drawn, lambda: lambda item: item + 1, 2)
        assert sorted(found) == [(number, 100 + number, 101 + number) for number in (1, 4, 5, 11)]
        assert next(drawn) == 31  # none after the first that is too high

    def test_one_that_is_killed_is_an_error_of_the_machine(self) -> None:
        def work(item: int) -> list[int]:
            if item == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return [os.getpid()]

        with pytest.raises(MachineError, match="killed"):
            self.run(iter(range(50)), work)

    def test_an_error_that_cannot_travel_is_told_all_the_same(self) -> None:
        class Local(Exception):
            pass

        def work(item: int) -> list[int]:
            raise Local("of this test alone")

        with pytest.raises(RuntimeError, match="Local.*of this test alone"):
            self.run(iter(range(3)), work)

    def test_closing_early_leaves_none(self) -> None:
        runs = run_forked(iter(range(1000)), count(), lambda: lambda item: [os.getpid()], 3)
        seen = {next(runs)[2][0] for _ in range(20)}
        runs.close()
        assert all(gone(pid) for pid in seen)

    def test_a_signal_to_the_group_is_the_parents(self) -> None:
        """Also one that comes as soon as there is a worker, which has its parent's handlers."""
        came: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
        try:

            def work(item: int) -> list[int]:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    os.kill(os.getpid(), number)
                return [item]

            assert sorted(item for item, _ in self.run(iter(range(6)), work)) == [*range(6)]
            assert came == [] and signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_they_die_with_their_parent(self) -> None:
        """At once, though their items take an hour."""
        came, told = os.pipe()
        parent = os.fork()
        if parent == 0:

            def work(item: int) -> list[int]:
                os.write(told, os.getpid().to_bytes(4, "little"))
                time.sleep(3600)
                return []

            try:
                self.run(iter(range(2)), work)
            finally:
                os._exit(1)
        pids = [int.from_bytes(os.read(came, 4), "little") for _ in range(2)]
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        deadline = time.monotonic() + 1
        while not all(gone(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for end in (came, told):
            os.close(end)

    def test_one_that_starts_without_its_parent_ends(self) -> None:
        child = os.fork()
        if child == 0:
            ours, theirs = multiprocessing.Pipe()
            processes._serve(os.getpid(), theirs, (ours,), iter([]), lambda: os._exit(1))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
