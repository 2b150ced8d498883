"""Stop commands by a signal at each line of the modules that name, lock, fill and remove outputs.

The signal is a real one, in a fork that has the command line's handlers. Whatever the line, the folder is afterwards
to the byte as it was before the command, or as it is after it; but what is not the user's ^C may leave, beside what was
there, what the same command with `resume` goes on with.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import factors, slow, weights, write_model, write_peft

import loratool
from loratool.durable import disk, locks
from loratool.durable.interrupts import stop_on_signals
from loratool.streaming import forked, workers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOMS = "interrupts journal locks partial output undo_places".split()
WATCHED = ("contextlib.py", *(f"loratool/files/{name}.py" for name in ROOMS))
SENT = [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]  # at once: the first counts
STAYS = ("out.loratool-", "out.safetensors.loratool-", "new.loratool-", "new.safetensors.loratool-")


def set_stage(folder: Path) -> None:
    """Make a base and an adapter, `out` that is merged twice, and what the commands read."""
    tensors = {"x.weight": weights(6, 4, dtype=torch.bfloat16), "y.weight": weights(3, 4, dtype=torch.bfloat16)}
    model = write_model(folder / "base", tensors, {"model_type": "llama"})
    shutil.copy(model / "model.safetensors", folder / "base.safetensors")
    write_peft(folder / "adapter", {"x": factors(6, 4, 2)})
    for ending in ("", ".safetensors"):
        merge(folder, f"base{ending}", f"once{ending}")
        merge(folder, f"once{ending}", f"out{ending}")
        merge(folder, f"once{ending}", f"twice{ending}")
    write_page(folder, "out.html")


def merge(folder: Path, base: str, out: str, weight: float = 1.0, resume: bool = False) -> None:
    loratool.merge(folder / base, (folder / "adapter", weight), folder / out, force=True, resume=resume, workers=1)


def unmerge(folder: Path, merged: str, out: str, resume: bool) -> None:
    loratool.unmerge(folder / merged, folder / "adapter", folder / out, force=True, resume=resume, workers=1)


def run_recipe(folder: Path, base: str, out: str) -> None:
    adapters = [{"path": str(folder / "adapter"), "weight": 0.5}]
    step = {"command": "merge", "base": str(folder / base), "adapters": adapters, "out": str(folder / out)}
    recipe = folder.with_suffix(".json")  # beside the folder
    recipe.write_text(json.dumps(step))
    loratool.run(recipe, force=True)


def init(folder: Path, residual: str) -> None:
    out = folder / residual
    loratool.init(folder / "base", folder / "start", method="pissa", rank=1, target="x", residual=out, force=True)


def write_page(folder: Path, name: str) -> None:
    loratool.write_report(loratool.inspect(folder / "adapter"), folder / name)


RUNS: dict[str, Callable[[Path, bool], object]] = {
    "merge to a new file": lambda f, go: merge(f, "base.safetensors", "new.safetensors", resume=go),
    "merge to a new folder": lambda f, go: merge(f, "base", "new", resume=go),
    "merge over a file": lambda f, go: merge(f, "base.safetensors", "out.safetensors", 0.5, go),
    "merge over a folder": lambda f, go: merge(f, "base", "out", 0.5, go),
    "third merge over a file": lambda f, go: merge(f, "twice.safetensors", "out.safetensors", 0.5, go),
    "unmerge over a file": lambda f, go: unmerge(f, "once.safetensors", "out.safetensors", go),
    "a recipe over a folder": lambda f, go: run_recipe(f, "base", "out"),
    "a page to a new file": lambda f, go: write_page(f, "new.html"),
    "a page over another": lambda f, go: write_page(f, "out.html"),
    "init over a folder": lambda f, go: init(f, "out"),
}


def stopped(run: Callable[[], object], line: int, sent: tuple[int, ...]) -> bool:
    """Return whether a run in a fork comes to this line, at which signals stop it."""
    child = os.fork()
    if child == 0:
        left = [line]

        def watch(frame: FrameType, event: str, _: Any) -> Any:
            if not frame.f_code.co_filename.endswith(WATCHED):
                return None
            if event == "line":
                left[0] -= 1
                if left[0] < 0:
                    sys.settrace(None)
                    for number in sent:
                        signal.raise_signal(number)
                    return None
            return watch

        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
            stop_on_signals(lambda number, _: 128 + number)
            sys.settrace(watch)
            run()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 128 + sent[0])
    return status != 0


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b"" for file in folder.rglob("*")}


def campaign(folder: Path, run: Callable[[Path, bool], object], lines: Iterator[int]) -> tuple[int, int]:
    """Stop a run at some lines, up to the first that it does not come to; return at how many, and what then went on."""
    start, one = folder / "start", folder / "one"
    start.mkdir(parents=True)
    set_stage(start)
    run(Path(shutil.copytree(start, one)), False)  # at the same path, which configs name
    states, went_on = [snapshot(start), snapshot(one)], 0
    shutil.rmtree(one)
    if "start/adapter_config.json" in states[1]:  # of two outputs the second is not there
        states.append({name: data for name, data in states[1].items() if not name.startswith("start")})
    for done, line in enumerate(lines):
        there = snapshot(Path(shutil.copytree(start, one, symlinks=True)))
        assert there == states[0]
        if not stopped(lambda: run(one, False), line, SENT[done % 2]):
            return done, went_on
        there = snapshot(one)
        left = {name for name in there if name.startswith(STAYS)}
        if left and SENT[done % 2][0] == signal.SIGTERM:
            assert {name: data for name, data in there.items() if name not in left} == states[0], (line, left)
            assert any("partial" in name for name in left) and any("head.json" in name for name in left), (line, left)
            run(one, True)
            there, went_on = snapshot(one), went_on + 1
            assert there == states[1], (line, sorted(there))
        assert there in states, (line, sorted(there))
        shutil.rmtree(one)
    raise AssertionError("the lines ended before the run")


@pytest.mark.skipif(not forked.CAN_FORK, reason="forks, and looks into /proc")
@pytest.mark.parametrize("out", ["new", "new.safetensors"])
def test_first_the_workers_end_and_the_files_are_closed(tmp_path: Path, out: str) -> None:
    """Windows removes no file that is open, and NFS gives it another name in its folder."""
    set_stage(tmp_path)
    child = os.fork()
    if child == 0:

        def remove(path: Path) -> None:
            numbers = {*map(int, os.listdir("/proc/self/fd"))} - locks._held  # Windows has no locks
            opened = [Path(os.path.realpath(f"/proc/self/fd/{number}")) for number in numbers]
            if multiprocessing.active_children() or any(path in (p, *p.parents) and p.is_file() for p in opened):
                os._exit(1)

        try:
            workers.WORTH_A_FORK = 0
            disk.remove_folder = disk.unlink = remove
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
            stop_on_signals(lambda number, _: 128 + number)
            base = tmp_path / f"base{Path(out).suffix}"
            stop = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
            loratool.merge(base, tmp_path / "adapter", tmp_path / out, workers=2, progress=stop)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.mark.parametrize("name", [slow("third merge over a file"), slow("merge over a folder")])
def test_at_some_lines(tmp_path: Path, name: str) -> None:
    done, went_on = campaign(tmp_path, RUNS[name], iter(range(13, 10**6, 61)))
    assert done > 8 and went_on > 1


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])  # which signal is first at which lines
@pytest.mark.parametrize("name", RUNS)
def test_at_every_line(tmp_path: Path, name: str, first: int) -> None:
    done, went_on = campaign(tmp_path, RUNS[name], chain([0] * first, count()))
    print(f"{name}: stopped at {done} lines, from {went_on} of which it went on")
