"""Hold the job of torchrun's ranks: each number once, one plan, no word of the dead; in threads and under torchrun."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.harness.rank_threads import on_ranks
from lib.harness.torchrun import ended, free_port, ranks_of
from torch.distributed import HashStore, TCPStore

from loratool.errors import InputError, MachineError
from loratool.streaming import parallel, ranks
from loratool.streaming.parallel import choose_device, worker_count
from loratool.streaming.ranks import Job, RankDone, current_job, rendezvous

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from loratool.streaming import ranks

ranks.BEATING, ranks.SILENCE = 0.5, 20.0
ranks.join_job(print)
job = ranks.current_job()
job.agree("plan", "one")
if job.restarts == 0 and job.rank == int(os.environ.get("DIES", -1)):
    next(job.numbers("items"))
    os.kill(os.getpid(), signal.SIGKILL)
mine = []
for number in job.numbers("items"):
    if number >= 60:
        break
    mine.append(number)
    time.sleep(0.05 if job.rank == 1 else 0.005)
if job.rank == 0:
    job.announce("made")
job.wait("made")
own = json.dumps([job.rank, job.start, job.count, job.local_rank, job.local_count, job.on_rank0("once", str), mine])
try:
    Path("told").write_text("\\n".join(job.gather("all", own)))
except ranks.RankDone:
    pass
job.finish()
"""


class TestAlone:
    def test_all_is_trivial(self) -> None:
        job = current_job()
        assert (job.rank, job.count, job.local_rank, job.local_count, job.restarts) == (0, 1, 0, 1, 0)
        assert list(islice(job.numbers("items"), 3)) == [0, 1, 2]
        assert job.on_rank0("hash", lambda: "abc") == "abc"
        job.agree("plan", "x")
        job.announce("made")
        job.wait("made")
        assert list(job.gather("end", "own")) == ["own"]
        job.exit_unless_rank0()
        job.finish()
        assert [job.add("done", 5), job.add("done", 7)] == [5, 12]

    def test_the_next_run_counts_anew(self) -> None:
        assert [next(current_job().numbers("items")) for _ in range(2)] == [0, 0]

    def test_a_program_under_torchrun_remains_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", ranks.RUN_ID: "none", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert ranks.is_launched()
        assert current_job().count == 1

    @pytest.mark.parametrize(
        "env",
        [
            {},
            {"WORLD_SIZE": "2", "RANK": "0"},
            {"WORLD_SIZE": "1", "RANK": "0", ranks.RUN_ID: "none"},
            {"WORLD_SIZE": "2", ranks.RUN_ID: "none"},
            {"WORLD_SIZE": "two", "RANK": "0", ranks.RUN_ID: "none"},
        ],
        ids=str,
    )
    def test_one_rank_and_other_launchers_are_alone(self, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
        for name in ("WORLD_SIZE", "RANK", ranks.RUN_ID):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert not ranks.is_launched()


@pytest.mark.parametrize("count", [2, 5])
class TestTogether:
    def test_each_number_is_drawn_once_and_a_slow_rank_draws_fewer(self, count: int) -> None:
        def work(job: Job) -> list[int]:
            drawn = []
            for number in takewhile(lambda number: number < 100, job.numbers("items")):
                drawn.append(number)
                time.sleep(0.005 if job.rank == 1 else 0.0005)
            return drawn

        drawn = on_ranks(count, work)
        assert sorted(chain.from_iterable(drawn)) == list(range(100))
        assert len(drawn[1]) < 100 / count
        assert all(numbers == sorted(numbers) for numbers in drawn)

    def test_rank_0_makes_what_is_made_once(self, count: int) -> None:
        def work(job: Job) -> str:
            return job.on_rank0("hash", lambda: f"made by {job.rank}")

        assert on_ranks(count, work) == ["made by 0"] * count

    def test_rank_0_has_the_texts_of_all_in_order_and_the_others_are_done(self, count: int) -> None:
        def work(job: Job) -> list[str]:
            time.sleep(0.01 * (count - job.rank))
            return list(job.gather("end", f"of {job.rank}"))

        first, *others = on_ranks(count, work)
        assert first == [f"of {rank}" for rank in range(count)]
        assert all(isinstance(other, RankDone) for other in others)
        assert not any(isinstance(other, Exception) for other in others)

    @pytest.mark.parametrize("barrier", [Job.barrier, Job.hand_over])
    def test_rank_0_goes_on_when_all_have_come(self, count: int, barrier: Callable[[Job, str], None]) -> None:
        here = set[int]()

        def work(job: Job) -> int:
            time.sleep(0.01 * job.rank)
            here.add(job.rank)
            barrier(job, "here")
            return len(here)

        first, *others = on_ranks(count, work)
        assert first == count
        assert all(other == count if barrier is Job.barrier else isinstance(other, RankDone) for other in others)

    def test_another_plan_is_refused_by_the_rank_that_has_it(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ranks, "SILENCE", 0.3)
        first, other, *rest = on_ranks(count, lambda job: job.agree("plan", "other" if job.rank == 1 else "same"))
        assert isinstance(other, InputError)
        assert other.message.startswith("rank 1, on host ")
        assert rest == [None] * (count - 2)
        assert first.message.startswith("rank 1 "), "it waited until then"

    def test_rank_0_goes_on_when_all_agree(self, count: int) -> None:
        late = threading.Event()

        def work(job: Job) -> bool:
            if job.rank == count - 1:
                time.sleep(0.05)
                late.set()
            job.agree("plan", "same")
            return late.is_set()

        assert on_ranks(count, work)[0]

    def test_the_others_wait_for_rank_0(self, count: int) -> None:
        made = threading.Event()

        def work(job: Job) -> bool:
            if job.rank == 0:
                time.sleep(0.05)
                made.set()
                job.announce("made")
            job.wait("made")
            return made.is_set()

        assert all(on_ranks(count, work))

    def test_a_counter_is_of_all(self, count: int) -> None:
        def work(job: Job) -> int:
            return job.add("done", 10)

        assert sorted(on_ranks(count, work)) == [10 * (rank + 1) for rank in range(count)]


class TestRestarts:
    def test_no_word_of_the_dead_is_taken(self) -> None:
        store = HashStore()
        for start in range(3):
            # the last start left a greeting and texts; now rank 0 dies when it has begun, and then all are here
            assert on_ranks(3, lambda job: (job.start, job.on_rank0("hash", lambda: str(time.monotonic()))), store)
            store.set("hello/2", "a dead one's")
            assert store.add("starts", 1) == 2 * start + 2
        found = on_ranks(
            3, lambda job: (job.start, next(job.numbers("items")), job.on_rank0("hash", lambda: "new")), store
        )
        assert sorted(found) == [(6, number, "new") for number in range(3)]

    def test_a_rank_that_met_one_that_died_meets_the_next(self) -> None:
        store = HashStore()
        store.add("starts", 1)
        with ThreadPoolExecutor(3) as pool:
            early = pool.submit(rendezvous, store, 1, 3, str)
            while not store.check(["hello/1"]):
                time.sleep(0.001)
            store.set(f"welcome/{store.get('hello/1').decode()}", "0")
            while not store.check(["0/met/1"]):
                time.sleep(0.001)
            assert not early.done(), "rank 2 is not here"
            others = [pool.submit(rendezvous, store, rank, 3, str) for rank in (0, 2)]
            assert [each.result() for each in (early, *others)] == [1, 1, 1]

    def test_the_others_find_that_rank_0_was_restarted_without_them(self) -> None:
        store = HashStore()

        def work(job: Job) -> None:
            if job.rank == 0:
                store.add("starts", 1)  # as a new rank 0 does
            else:
                job.wait("made")

        first, second = on_ranks(2, work, store)
        assert first is None
        assert isinstance(second, MachineError)
        assert second.message == "rank 0 was restarted, and rank 1 was not"

    def test_rank_0_finds_that_another_was_restarted_without_it(self) -> None:
        store = HashStore()

        def work(job: Job) -> list[str]:
            if job.rank == 1:
                store.set("hello/1", "the word of a new process")
                return []
            return list(job.gather("end", ""))

        assert isinstance(on_ranks(2, work, store)[0], MachineError)

    def test_a_rank_that_is_silent_for_long_is_dead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ranks, "SILENCE", 0.3)

        def work(job: Job) -> list[str]:
            for beat in range(6 if job.rank else 0):
                job.add(f"beat/{job.rank}", 1)
                time.sleep(0.1)
                if beat == 4 and job.rank == 1:
                    return list(job.gather("end", "alive until now"))
            return list(job.gather("end", "")) if job.rank == 0 else []

        first = on_ranks(3, work)[0]
        assert isinstance(first, MachineError)
        assert first.message.startswith("rank 2 ")


class _Gone:
    """A store whose machine has gone."""

    def set(self, key: str, value: str, /) -> None:
        raise torch.distributed.DistNetworkError("Broken pipe\nException raised from sendBytes")

    def get(self, key: str, /) -> bytes:
        raise torch.distributed.DistNetworkError("Broken pipe")

    def add(self, key: str, amount: int, /) -> int:
        raise torch.distributed.DistNetworkError("Broken pipe")

    def check(self, keys: list[str], /) -> bool:
        raise torch.distributed.DistNetworkError("Broken pipe")


def test_a_store_that_is_gone_is_named_but_at_the_end() -> None:
    job = Job(1, 2, store=ranks._SharedStore(_Gone()))
    for use in (lambda: next(job.numbers("items")), lambda: job.on_rank0("hash", str), lambda: job.gather("end", "")):
        with pytest.raises(MachineError, match=r"^torchrun's store is out of reach: Broken pipe\nis the first node up"):
            use()
    job.finish()  # rank 0 has ended, and with it the store, if it was not torchrun's own


@pytest.mark.parametrize("text", ["", "x", "1\n2", "\u00e4" * (3 << 20), "ab" * (1 << 19)], ids=len)
def test_a_text_of_any_length_is_told_whole(text: str) -> None:
    """TCPStore drops who gives it a value of more than 8 MiB."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store = ranks._SharedStore(server)
    store.set("a", text)
    assert store.get("a").decode() == text
    assert store.add("b", 3) == 3 and store.get("b") == b"3"


def test_a_rank_that_waits_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TELLING", 0.05)
    store, told = HashStore(), list[str]()

    def come_late(text: str) -> None:
        told.append(text)
        threading.Thread(target=rendezvous, args=(store, 1, 2, str)).start()

    assert rendezvous(store, 0, 2, come_late) == 0
    assert [text[:26] for text in told] == ["waiting for 1 of 2 ranks; "]


def test_a_rank_whose_rank_0_does_not_come_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TELLING", 0.05)
    store, told = HashStore(), list[str]()

    def come_late(text: str) -> None:
        told.append(text)
        threading.Thread(target=rendezvous, args=(store, 0, 2, str)).start()

    assert rendezvous(store, 1, 2, come_late) == 0
    assert [text[:27] for text in told] == ["waiting for other ranks; if"]


class TestShares:
    def test_ranks_have_gpus_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parallel, "may_have_gpu", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for rank in range(4):
            monkeypatch.setattr(ranks, "_job", Job(rank, 4, rank, 4))
            assert [choose_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
                f"cuda:{rank % 2}",
                f"cuda:{rank % 2}",
                "cuda:1",
                "cpu",
            ]
        monkeypatch.setattr(ranks, "_job", None)
        assert choose_device("auto") == "cuda:0"

    @pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system tells no process's cores")
    @pytest.mark.parametrize(("cores", "local", "workers"), [(8, 2, 4), (64, 2, 8), (2, 4, 1), (6, 1, 6)])
    def test_ranks_share_the_cores(self, monkeypatch: pytest.MonkeyPatch, cores: int, local: int, workers: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        monkeypatch.setattr(ranks, "_job", Job(0, 8, 0, local) if local > 1 else None)
        assert worker_count() == workers


def _told(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / "told").read_text().splitlines()]


def _check(told: list[list[Any]], count: int, local_count: int) -> None:
    drawn = [each.pop() for each in told]
    start = told[0][1]
    assert told == [[rank, start, count, rank % local_count, local_count, ""] for rank in range(count)]
    assert sorted(chain.from_iterable(drawn)) == list(range(60))
    assert len(drawn[1]) < 60 / count


@pytest.mark.slow  # by default `tests/commands/test_torchrun.py` has two ranks, which merge
@pytest.mark.parametrize("count", [2, 4])
def test_torchruns_ranks_share_the_items(tmp_path: Path, count: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    [(code, _, err)] = ended(ranks_of(tmp_path, "script.py", count=count))
    assert code == 0, err
    _check(_told(tmp_path), count, count)


def _nodes(folder: Path, dies: int, *options: str, shared: bool = True) -> list[tuple[int, str, str]]:
    (folder / "script.py").write_text(SCRIPT)
    port = free_port()
    ways = (
        [("--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"localhost:{port}")] * 2
        if shared
        else [("--node-rank", str(node), "--master-addr", "localhost", "--master-port", str(port)) for node in (0, 1)]
    )
    env = {"DIES": str(dies)}
    return ended(*(ranks_of(folder, "script.py", options=("--nnodes", "2", *way, *options), env=env) for way in ways))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [-1, 0, 3])
def test_two_nodes_share_the_items_and_restart_on_ranks(tmp_path: Path, dies: int) -> None:
    found = _nodes(tmp_path, dies, "--max-restarts", "2")
    assert [code for code, _, _ in found] == [0, 0], found
    _check(_told(tmp_path), 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 3])
def test_two_nodes_without_a_rendezvous_find_that_one_was_restarted(tmp_path: Path, dies: int) -> None:
    found = _nodes(tmp_path, dies, "--max-restarts", "2", shared=False)
    assert [code for code, _, _ in found] == [0, 0], found
    _check(_told(tmp_path), 4, 2)


@pytest.mark.slow
def test_a_rank_that_dies_ends_all(tmp_path: Path) -> None:
    found = _nodes(tmp_path, 2)
    assert all(code != 0 for code, _, _ in found)
    assert signal.SIGKILL.name in "".join(err for _, _, err in found)
    assert not (tmp_path / "told").exists()
