"""Run a scenario with a fault, and check what it says, what it leaves, and what the next run makes of that."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import FAILURES, KILLED, REMOVES, STOPS, Faulty, Stopped, applies, no_fault, replaced
from power_loss import FATES, Fate, Recorder
from scenarios import Before, Files, Scenario, call, content_of, done, files_of, put

from loratool.durable.partial import set_aside, what_stays
from loratool.files.checkpoint import open_weights
from loratool.files.output.output import UNDONE
from loratool.files.output.undo_places import undo_chain
from loratool.undo.reader import UndoFile, belongs

OURS = re.compile(r".+\.loratool-(partial|former|scratch|journal)")
FALLIBLE = (*REMOVES, "copy_some", "link", "symlink")  # of which some failures are none of the command
OPENS = ("open_file", "make_folder")  # after a rename too: to lock an output whose journal is removed
DRAWS = 3  # drawn fates of what is not safe

Point = tuple[str, str, Callable[[], None]]  # area, place, check


class AtOnce(Executor):
    """Runs what is submitted where it is, so that the calls of a run have one order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what a pool of threads takes."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)
        return future


class Case:
    """A scenario with what is there before its run, and what an undisturbed run makes of that.

    Attributes:
        before: the files there.
        calls: of an undisturbed run.
    """

    def __init__(self, scenario: Scenario, before: Files, links: bool = True, resume: bool = False) -> None:
        self._folder, self._scenario, self._links, self._resume = Path.cwd(), scenario, links, resume
        self._now: Files | None = None
        self.before = before
        self.put(before)
        self._old = self._meanings()
        undisturbed = self.run(no_fault())
        self._code = undisturbed.code
        assert self._code == (3 if scenario.fails else 0), undisturbed.said
        self.calls = undisturbed.names
        self._new, self._files = self._meanings(), self.look()
        both = [*before.items(), *self._files.items()]
        self._undo = {data for name, data in both if re.search(r"\.undo(\.\d+)?(\.loratool-former)?$", name)}
        assert not any(map(_is_left, self._files)), "an undisturbed run leaves something"
        self._sound: set[frozenset[tuple[str, bytes]]] = set()  # states that were checked

    def run(self, faulty: Faulty) -> Faulty:
        """Run the call with a fault."""
        return self._call(faulty, self._resume)

    def _call(self, faulty: Faulty, resume: bool) -> Faulty:
        with replaced(faulty, self._links):
            faulty.code, faulty.said = call(self._scenario.new, "--force", *(["--resume"] if resume else []))
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
            put(self._folder, files, self._links)
            self._now = files

    def look(self) -> Files:
        self._now = files_of(self._folder)
        return self._now

    def _meanings(self) -> list[object]:
        """Return what is under the names of the outputs, each with its undo files."""
        return [_meaning(Path(out)) for out in self._scenario.outputs]

    def _is_output(self, name: str) -> bool:
        outs = self._scenario.outputs
        return Path(name).parts[0] in outs or any(_is_undo(name, out) for out in outs)

    def check(self) -> None:
        """Check what is there, and that the next run, and one that goes on, make what an undisturbed run does."""
        now = self.look()
        if (state := frozenset(now.items())) in self._sound:
            return
        for meaning, old, new in zip(self._meanings(), self._old, self._new, strict=True):
            assert meaning in (old, new), "neither old nor new"
        for name in self.before.keys() | now.keys():
            if any(_is_undo(name, out) for out in self._scenario.outputs):
                assert name not in now or now[name] in self._undo, f"{name} is damaged"
            elif not self._is_output(name) and not _is_left(name):
                assert now.get(name) == self.before.get(name), f"{name} is changed"
        for resume in (True, False) if self._scenario.resumes and any(map(_is_left, now)) else (False,):
            self.put(now)
            after = self._call(no_fault(), resume)
            assert after.code == self._code, f"the next run fails, resume={resume}: {after.said}"
            assert self.look() == self._files, f"the next run makes something else, resume={resume}"
        self._sound.add(state)

    def fail(self, kind: str, at: int) -> None:
        """Let a call fail, and check what the command says and leaves."""
        faulty = self.run(Faulty(kind, at))
        if "is not written: " in faulty.said:  # the page, which is a warning
            assert faulty.code == self._code, faulty.said
            faulty.code = 5
        name, files = self.calls[at], self.look()
        may_fail = name in FALLIBLE or (name in OPENS and "rename" in self.calls[:at])
        may_succeed = kind == "short" or may_fail or self._scenario.fails  # which may have been told before
        assert faulty.code in ((5, self._code) if may_succeed else (5,)), f"{faulty.code}: {faulty.said}"
        assert kind != "short" or faulty.code == self._code, f"a short call is no failure: {faulty.said}"
        if faulty.code == 5:
            stems = "|".join(re.escape(Path(out).stem) for out in self._scenario.outputs)
            assert re.search(rf"\b({stems})\b", faulty.said) or str(self._folder) in faulty.said, faulty.said
        elif not self._scenario.fails:
            assert {n: d for n, d in files.items() if not _is_left(n)} == self._files
        # what an output has replaced may stay if its new name may not be safe, or if it could not be put back
        outs = zip(self._scenario.outputs, self._meanings(), self._new, strict=True)
        late = tuple(f"{Path(out).stem}." for out, meaning, new in outs if meaning == new)
        left = [each for each in files if _is_left(each) and not each.startswith(late)]
        if self._scenario.fails and faulty.code != self._code:
            left = [*filter(_is_left, files)]
        stays = [out for out in self._scenario.outputs if what_stays(Path(out))]
        is_run = self._scenario.new.startswith("run ")
        goes_on = "the next run replaces them" if is_run else "the same command with --resume goes on"
        is_said = f"stay: {goes_on}" in faulty.said
        is_gone_after = kind.startswith("gone") and faulty.code == self._code  # while the journal was removed
        assert is_said is bool(stays) or is_gone_after or (stays and any(map(_is_left, self.before))), faulty.said
        parts = {f"{out}.loratool-{part}" for out in stays for part in ("partial", "journal")}
        self.check()
        if not (name in REMOVES or kind.startswith("gone") or any(map(_is_left, self.before))):
            assert {Path(each).parts[0] for each in left} == parts, "a partial output is left"
            assert not stays or self._scenario.resumes or is_run

    def break_off(self, kind: str, at: int) -> None:
        """Stop the run at a call, and check what it leaves."""
        self.stop(kind, at)
        self.check()

    def hold(self, files: Files, is_over: bool) -> None:
        """Check a state in which the power's loss leaves the files: what a run that is over has made is safe."""
        if is_over or frozenset(files.items()) not in self._sound:
            self.put(files)
            assert not is_over or self._meanings() == self._new, "what was made is lost"
            self.check()

    def record(self) -> Recorder:
        """Return what a run does, having checked that it tells all of it."""
        self.put(self.before)
        recorder = Recorder(self._folder)
        with replaced(recorder, self._links):
            assert call(self._scenario.new, "--force")[0] == self._code
        assert recorder.after(len(recorder.steps), FATES["all"]) == self.look() == self._files
        return recorder


def begin(scenario: Scenario, before: Before, inputs: Files) -> Case:
    """Return a scenario with what is there before: an old output, and what a killed run left."""
    folder = Path.cwd()
    put(folder, inputs)
    if before.is_old:
        done(scenario.old)
    case = Case(scenario, files_of(folder), before.links)
    if before.killed is None:
        return case
    case.put(case.before)
    case.stop("kill", int(before.killed * len(case.calls)))
    return Case(scenario, case.look(), before.links)


def _is_left(name: str) -> bool:
    return any(OURS.fullmatch(part) for part in Path(name).parts)


def _is_undo(name: str, out: str) -> bool:
    """Return whether a file is an undo file beside an output."""
    stem, suffix = os.path.splitext(out)
    return suffix in UNDONE and re.fullmatch(re.escape(stem) + r"\.undo(\.\d+)?", name) is not None


def _meaning(path: Path) -> object:
    """Return what a name means to the tool: a folder's files, or a file with its undo files."""
    path = set_aside(path) or path
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if path.is_dir():
        return files_of(path)
    undo = undo_chain(path, True, belongs) if path.suffix in UNDONE else []
    if undo:
        with closing(open_weights(path)) as weights, closing(UndoFile(undo[0])) as first:
            undo = undo if first.belongs_to(weights) else []  # which unmerge refuses
    return content_of(path), [each.read_bytes() for each in undo]


def calls_of(case: Case, kinds: Collection[str]) -> list[Point]:
    """Return the points of these kinds of faults."""

    def point(kind: str, at: int) -> Point:
        def visit() -> None:
            case.put(case.before)
            (case.fail if kind in FAILURES else case.break_off)(kind, at)

        return kind, f"{kind} at call {at}, {case.calls[at]}", visit

    return [point(kind, at) for at, name in enumerate(case.calls) for kind in kinds if applies(kind, name)]


def power_of(case: Case, only_over: bool = False) -> list[Point]:
    """Return the points of lost power: after each step of a run, or the last, with each fate of what is not safe."""
    recorder = case.record()

    def point(steps: int, way: str, fate: Fate) -> Point:
        def visit() -> None:
            case.hold(recorder.after(steps, fate), steps == len(recorder.steps))

        return "lost power", f"{way} after step {steps}: {recorder.steps[max(0, steps - 2) : steps]}", visit

    last = len(recorder.steps)
    prefixes = range(last if only_over else recorder.start, last + 1)
    return [point(steps, way, fate) for steps in prefixes for way, fate in recorder.ways(steps, DRAWS).items()]
