"""Run the ranks of a job as threads of one process, joined by a store of torch.distributed as processes are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from loratool.errors import InputError, MachineError
from loratool.streaming import ranks
from loratool.streaming.ranks import Job, RankDone, Store, rendezvous


class _OwnJob(threading.local):
    """The job of each thread."""

    job: Job

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)


def on_ranks(count: int, work: Callable[[Job], Any], store: Store | None = None) -> list[Any]:
    """Run `work` in a thread for each rank, whose `current_job` is its own; return what each returned or raised."""
    shared, own = store or HashStore(), _OwnJob()

    def one(rank: int) -> Any:
        start = rendezvous(shared, rank, count, lambda text: None)
        own.job = Job(rank, count, rank, count, start, start, shared)
        try:
            return work(own.job)
        except (RankDone, InputError, MachineError) as error:
            return error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(ranks, "_job", own)
        return list(pool.map(one, range(count)))
