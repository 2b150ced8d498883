"""Let every call that changes files fail once, be the last one, and be followed by the loss of power.

Then what the output's name means is absent, what it was, or new and complete, each with its own undo files; all else is
as it was; and the next run makes what an undisturbed run does, and leaves nothing of its own behind. The default run
takes a seeded sample of the points, `slow` all of them.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import any_widths, only_families
from faulty_disk import (
    FAILURES,
    KILLED,
    KILLS,
    LASTING,
    NAMES,
    REMOVES,
    STOPS,
    Faulty,
    Stopped,
    applies,
    replaced,
)
from power_loss import FATES, Recorder, drawn
from scenarios import BEFORE, SCENARIOS, Scenario, call, done, files_of, make_stage, put

from loratool.files.checkpoint import open_weights
from loratool.files.output import UNDONE
from loratool.files.partial import set_aside
from loratool.files.undo_file import UndoFile
from loratool.files.undo_places import undo_chain

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
Files = dict[str, bytes]
SAMPLE = 12  # pairs of a scenario and what was before, in the default run
FALLIBLE = (*REMOVES, "copy_some", "link")  # of which some failures are none of the command
OURS = re.compile(r".+\.loratool-(partial|former|scratch)")
KILLED_PROCESSES = 3  # of a scenario: a fork takes ten times as long as a run
DRAWS = 3  # drawn fates of what is not safe
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
        patch.setattr("loratool.streaming.workers.MAX_WORKERS", 1)
        try:
            make_stage(Path(folder) / "stage")
            yield files_of(Path.cwd())
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(f"{area}: {points} points" for area, points in covered.items()))


class Case:
    """A scenario with what is there before its run, and what an undisturbed run makes of that."""

    def __init__(self, scenario: Scenario, before: str, inputs: Files) -> None:
        self._folder, self._scenario = Path.cwd(), scenario
        is_old, killed = BEFORE[before]
        put(self._folder, inputs)
        if is_old:
            done(scenario.old)
        start, share = files_of(self._folder), killed
        if share is not None:
            calls = self.run(Faulty("EIO", -1)).names
            put(self._folder, start)
            self.stop("kill", int(share * len(calls)))
        self.before = files_of(self._folder)
        self.old = self._meanings()
        undisturbed = Faulty("EIO", -1)
        self.code = self.run(undisturbed).code
        assert self.code == (3 if scenario.fails else 0), undisturbed.said
        self.calls = undisturbed.names
        self.files = files_of(self._folder)
        self.new = self._meanings()
        self._undo = {data for files in (self.before, self.files) for name, data in files.items() if ".undo" in name}
        assert not any(map(self._is_left, self.files)), "an undisturbed run leaves something"
        self._sound: set[frozenset[tuple[str, bytes]]] = set()  # states that were checked
        self._now = self.files

    def run(self, faulty: Faulty) -> Faulty:
        """Run the call with a fault."""
        with replaced(faulty):
            faulty.code, faulty.said = call(self._scenario.new, "--force")
        return faulty

    def stop(self, kind: str, at: int) -> None:
        """Run the call and stop it at one of its calls: in a process of its own if it is to be killed."""
        if kind in STOPS:
            with pytest.raises(Stopped):
                self.run(Faulty(kind, at))
            return
        child = os.fork()
        if child == 0:
            try:
                self.run(Faulty(kind, at))
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED

    def put(self, files: Files) -> None:
        if self._now != files:
            put(self._folder, files)
            self._now = files

    def _meanings(self) -> list[object]:
        """Return what is under the names of the outputs, each with its undo files."""
        return [_meaning(Path(out)) for out in self._scenario.outputs]

    def _is_left(self, name: str) -> bool:
        return any(OURS.fullmatch(part) for part in Path(name).parts)

    def _is_output(self, name: str) -> bool:
        outs = self._scenario.outputs
        undo = [re.escape(Path(out).stem) + r"\.undo(\.\d+)?" for out in outs if Path(out).suffix in UNDONE]
        return Path(name).parts[0] in outs or any(re.fullmatch(each, name) for each in undo)

    def check(self) -> None:
        """Check what is there, and that the next run makes what an undisturbed run does."""
        self._now = now = files_of(self._folder)
        if (state := frozenset(now.items())) in self._sound:
            return
        for meaning, old, new in zip(self._meanings(), self.old, self.new, strict=True):
            assert meaning in (old, new), "neither old nor new"
        for name in self.before.keys() | now.keys():
            if re.fullmatch(r".+\.undo(\.\d+)?", name) and self._is_output(name):
                assert name not in now or now[name] in self._undo, f"{name} is damaged"
            elif not self._is_output(name) and not self._is_left(name):
                assert now.get(name) == self.before.get(name), f"{name} is changed"
        after = self.run(Faulty("EIO", -1))
        assert after.code == self.code, f"the next run fails: {after.said}"
        self._now = files_of(self._folder)
        assert self._now == self.files, "the next run makes something else"
        self._sound.add(state)

    def fail(self, kind: str, at: int) -> None:
        """Let a call fail, and check what the command says and leaves."""
        faulty = self.run(Faulty(kind, at))
        name, files = faulty.names[at], files_of(self._folder)  # threads may change the order a little
        may_succeed = kind == "short" or name in FALLIBLE
        assert faulty.code in ((5, self.code) if may_succeed else (5,)), f"{faulty.code}: {faulty.said}"
        assert kind != "short" or faulty.code == self.code, f"a short call is no failure: {faulty.said}"
        if faulty.code == 5:
            stems = "|".join(re.escape(Path(out).stem) for out in self._scenario.outputs)
            assert re.search(rf"\b({stems})\b", faulty.said) or str(self._folder) in faulty.said, faulty.said
        else:
            assert {n: d for n, d in files.items() if not self._is_left(n)} == self.files
        self.check()
        if name not in REMOVES and kind not in LASTING and not any(map(self._is_left, self.before)):
            assert self._meanings() == self.new or not [*filter(self._is_left, files)], "a partial output is left"

    def break_off(self, kind: str, at: int) -> None:
        """Stop the run at a call, and check what it leaves."""
        self.stop(kind, at)
        self.check()

    def record(self) -> Recorder:
        """Return what a run does, having checked that it tells all of it."""
        self.put(self.before)
        recorder = Recorder(self._folder)
        with replaced(recorder):
            assert call(self._scenario.new, "--force")[0] == self.code
        self._now = files_of(self._folder)
        assert recorder.after(len(recorder.steps), FATES["all"]) == self._now == self.files
        return recorder


def _meaning(path: Path) -> object:
    """Return what a name means to the tool: a folder's files, or a file with its undo files."""
    path = set_aside(path) or path
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if path.is_dir():
        return files_of(path)
    undo = undo_chain(path, True) if path.suffix in UNDONE else []
    if undo:
        with closing(open_weights(path)) as weights, closing(UndoFile(undo[0])) as first:
            undo = undo if first.belongs_to(weights) else []  # which unmerge refuses
    return path.read_bytes(), [each.read_bytes() for each in undo]


Point = tuple[str, str, Callable[[], object]]  # area, place, check


def calls_of(case: Case, kinds: Collection[str]) -> list[Point]:
    """Return the points of these kinds of faults."""

    def point(kind: str, at: int) -> Point:
        check = case.fail if kind in FAILURES else case.break_off

        def visit() -> None:
            case.put(case.before)
            check(kind, at)

        return kind, f"{kind} at call {at}, {case.calls[at]}", visit

    return [point(kind, at) for at, name in enumerate(case.calls) for kind in kinds if applies(kind, name)]


def power_of(case: Case) -> list[Point]:
    """Return the points of lost power: after each step of a run, with each fate of what is not safe then."""
    recorder, ways = case.record(), {**FATES, **{f"draw {seed}": drawn(seed) for seed in range(DRAWS)}}

    def point(steps: int, way: str) -> Point:
        def visit() -> None:
            case.put(recorder.after(steps, ways[way]))
            case.check()

        return "lost power", f"{way} after step {steps}: {recorder.steps[max(0, steps - 2) : steps]}", visit

    return [point(steps, way) for steps in range(recorder.start, len(recorder.steps) + 1) for way in ways]


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
        case = Case(SCENARIOS[scenario], before, stage)
        points = [(calls_of(case, FAILURES), 2), (calls_of(case, STOPS), 1), (power_of(case), 2)]
        visit(chain.from_iterable(draw.sample(*each) for each in points))


def test_a_killed_process(stage: Files) -> None:
    """It leaves what is checked without a process of its own, where that is simulated."""
    case = Case(SCENARIOS["merge, file, over twice"], "old", stage)
    visit(Random(26).sample(calls_of(case, KILLS), KILLED_PROCESSES))


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_call(stage: Files, scenario: str, before: str) -> None:
    case = Case(SCENARIOS[scenario], before, stage)
    visit(calls_of(case, (*FAILURES, *STOPS)))
    visit(Random(26).sample(calls_of(case, KILLS), KILLED_PROCESSES))
    visit(power_of(case))


def test_no_call_is_forgotten() -> None:
    """A function of `disk` is one of the table, by its own rule of what a disk may lose."""
    assert {name for name in NAMES if not hasattr(Recorder, name)} == set()
