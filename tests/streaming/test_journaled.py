"""Hold what ranks see of an output that rank 0 has opened on another machine."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from lib.harness.rank_threads import on_ranks

from loratool.durable.partial import journal_path, partial_folder, partial_path
from loratool.errors import MachineError
from loratool.streaming import journaled
from loratool.streaming.ranks import Job, RankDone

SECONDS = 60  # for a rank that hangs
HEAD = {"options": {"command": "merge"}, "inputs": {"base": [1, "sample"]}}


def share(folder: Path) -> list[object]:
    """Let two ranks open an output, and return how each ended; rank 0 has it open until the other has ended."""
    ended = threading.Event()

    def work(job: Job) -> object:
        try:
            return shared(job)
        finally:
            if job.rank:
                ended.set()

    def shared(job: Job) -> object:
        def opened(_: object) -> AbstractContextManager[Path]:
            return partial_folder(folder / "out")

        with journaled.journaled(folder / "out", {}, HEAD, False, job, opened, lambda: nullcontext(folder)) as made:
            job.exit_unless_rank0()
            ended.wait(SECONDS)
            return made[1]

    return on_ranks(2, work)


@pytest.mark.parametrize("looks", [3, 1 << 30])
def test_a_rank_waits_until_it_sees_what_rank_0_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    hidden = dict.fromkeys((partial_path(tmp_path / "out"), journal_path(tmp_path / "out")), looks)

    class Late(type(tmp_path)):  # type: ignore[misc]
        def exists(self) -> bool:
            hidden[self] -= 1
            return hidden[self] < 0 and os.path.exists(self)

    monkeypatch.setattr(journaled, "SIGHT", 0.2 if looks > 3 else 60)
    monkeypatch.setattr(journaled, "partial_path", lambda path: Late(partial_path(path)))
    monkeypatch.setattr(journaled, "journal_path", lambda path: Late(journal_path(path)))
    first, second = share(tmp_path)
    if looks > 3:
        assert isinstance(second, MachineError) and "disk that all nodes share" in str(second)
    else:
        assert first == partial_path(tmp_path / "out") and isinstance(second, RankDone)
