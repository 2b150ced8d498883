"""Let every call that changes files fail once, be the last one, and be followed by the loss of power.

Then what the output's name means is absent, what it was, or new and complete, each with its own undo files; all else is
as it was; and the next run makes what an undisturbed run does, and leaves nothing of its own behind. The default run
takes a seeded sample of the points, `slow` all of them.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from random import Random

import pytest
import torch
from cases import AtOnce, Case, Point, begin, calls_of, power_of
from conftest import any_widths, only_families
from faulty_disk import FAILURES, KILLS, NAMES, STOPS
from power_loss import Recorder
from scenarios import BEFORE, SCENARIOS, Files, call, done, files_of, make_stage, put

from loratool.durable import disk
from loratool.durable.fileio import write_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SAMPLE = 12  # pairs of a scenario and what was before, in the default run
KILLED_PROCESSES = 3  # of a scenario: a fork takes ten times as long as a run
AGAIN = ("EIO", "gone halfway")  # failures that are tried where a killed run has left something
# A scenario that is stopped -> the next one, which is stopped too
TWICE = {
    "merge, file, over twice": "merge that fails, file, over twice",
    "merge, file, third": "merge that fails, file, over twice",
    "merge, file, no undo, over twice": "merge, file, third",
    "merge, folder, third": "merge that fails, folder",
}

covered: Counter[str] = Counter()  # area -> points


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[Files]:
    """Make the stage in memory, where a run takes a third of the time, and be in it."""
    before, threads, memory = os.getcwd(), torch.get_num_threads(), Path("/dev/shm")
    torch.set_num_threads(1)  # a fork has no other threads
    with (
        tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder,
        any_widths("sd1", "sdxl"),
        only_families("sd1", "sd2", "sdxl"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("loratool.streaming.parallel.MAX_WORKERS", 1)
        for module in ("parallel", "workers"):
            patch.setattr(f"loratool.streaming.{module}.ThreadPoolExecutor", AtOnce)
        try:
            make_stage(Path(folder) / "stage")
            yield files_of(Path.cwd())
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(f"{area}: {points} points" for area, points in covered.items()))


def visit(points: Iterable[Point]) -> None:
    for area, place, check in points:
        covered[area] += 1
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from error


def test_a_sample(stage: Files) -> None:
    draw = Random(26)
    for scenario, before in draw.sample([(each, before) for each in SCENARIOS for before in BEFORE], SAMPLE):
        case = begin(SCENARIOS[scenario], BEFORE[before], stage)
        points = [(calls_of(case, FAILURES), 2), (calls_of(case, STOPS), 1), (power_of(case), 2)]
        visit(chain.from_iterable(draw.sample(*each) for each in points))


def test_a_killed_process(stage: Files) -> None:
    """It leaves what is checked without a process of its own, where that is simulated."""
    case = begin(SCENARIOS["merge, file, over twice"], BEFORE["old"], stage)
    visit(Random(26).sample(calls_of(case, KILLS), KILLED_PROCESSES))


@pytest.mark.parametrize("scenario", ["merge, file, third", "merge, folder", "convert, torch file"])
def test_a_sample_of_a_run_that_goes_on(stage: Files, scenario: str) -> None:
    draw, case = Random(28), going_on(scenario, stage)
    points = [(calls_of(case, FAILURES), 2), (calls_of(case, STOPS), 1), (power_of(case), 2)]
    visit(chain.from_iterable(draw.sample(*each) for each in points))


def going_on(scenario: str, stage: Files) -> Case:
    """Return a case whose run goes on with one that was killed late."""
    case = begin(SCENARIOS[scenario], BEFORE["old"], stage)
    case.put(case.before)
    case.stop("kill", int(0.8 * len(case.calls)))
    left = case.look()
    assert any("loratool-journal" in name for name in left)
    return Case(SCENARIOS[scenario], left, resume=True)


@pytest.mark.slow
def test_a_former_undo_file_is_whole_where_there_are_no_links(stage: Files) -> None:
    """A copy that could not be made whole does not replace the good one."""
    case = begin(SCENARIOS["merge, file, over twice"], BEFORE["old, no links"], stage)
    visit(calls_of(case, ("ENOSPC", "full")))


@pytest.mark.parametrize("scenario", ["merge, pipeline", "merge, file, third", "init with residual", "swap, folder"])
def test_what_was_made_is_safe(stage: Files, scenario: str) -> None:
    """The power may fail when the command has ended; of nested folders too."""
    visit(power_of(begin(SCENARIOS[scenario], BEFORE["nothing"], stage), only_over=True))


def test_a_folder_that_was_set_aside(stage: Files) -> None:
    """It exists, under its name."""
    put(Path.cwd(), stage)
    done("merge base adapter -o out")
    (made := Path("out")).rename("out.loratool-former")
    code, said = call("merge base adapter -o out")
    assert code == 4 and "exists already, as out.loratool-former" in said
    assert call("merge base adapter:1e42 -o out --force")[0] == 3
    assert (made / "loratool.undo").is_file() and not Path("out.loratool-former").exists()


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_call(stage: Files, scenario: str, before: str) -> None:
    case = begin(SCENARIOS[scenario], BEFORE[before], stage)
    visit(calls_of(case, (*(AGAIN if BEFORE[before].killed else FAILURES), *STOPS)))
    visit(Random(26).sample(calls_of(case, KILLS), KILLED_PROCESSES))
    visit(power_of(case))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [name for name, each in SCENARIOS.items() if each.resumes])
def test_every_call_of_a_run_that_goes_on(stage: Files, scenario: str) -> None:
    case = going_on(scenario, stage)
    visit(calls_of(case, (*AGAIN, *STOPS)))
    visit(power_of(case))


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("scenario", TWICE)
def test_two_stops(stage: Files, scenario: str, links: bool) -> None:
    """The next run is stopped too, whenever the first one was."""
    case = begin(SCENARIOS[scenario], BEFORE["old" if links else "old, no links"], stage)
    states = []
    for at in range(len(case.calls)):
        case.put(case.before)
        case.stop("stop", at)
        if (state := case.look()) not in states:
            states.append(state)
            visit(calls_of(Case(SCENARIOS[TWICE[scenario]], state, links), STOPS))


def test_a_write_that_makes_no_progress_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "write_some", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        write_file(tmp_path / "a", b"b")


def test_no_call_is_forgotten() -> None:
    """A function of `disk` has a rule of what a disk may lose."""
    assert {name for name in NAMES if not hasattr(Recorder, name)} == set()
