"""Run cases of hostile input and hold each to what every command promises, whatever it reads.

A fuzzer is a function that makes a `Case` of a random generator. Its seeds are `NAME:0`, `NAME:1` and so on, the same
in every run; `--fuzz-seconds` goes on from there. A case that fails is written where the message says, as one JSON
file: copied into `corpus/NAME/` it runs in every run before the seeds, whatever becomes of the fuzzer.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
KEPT = HERE / "failed"  # where failed cases are written, which git ignores
CODES = (0, 1, 2, 3, 4, 5)  # those documented, but the signals' and an internal error's
FAILED = (2, 3, 4, 5)  # of them those that leave no output
MOST_MEMORY = 450 * 10**6  # bytes at the peak
MOST_SECONDS = 20.0
MOST_FILES = 20  # of a snapshot that a message names
MOST_FAILURES = 10  # after which a fuzzer ends


@dataclass(frozen=True)
class Case:
    """A working folder and a command that is run in it.

    Attributes:
        files: path in the working folder -> its bytes.
        argv: the command, with paths in the working folder.
        outputs: the paths that it may make or change, with all below them, if it ends with 0 or 1.
        why: of a case of the corpus, what failed.
    """

    files: dict[str, bytes]
    argv: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    why: str = ""

    def save(self, path: Path, why: str) -> None:
        """Write the case as a JSON file, bytes that are no short text compressed."""
        files = {name: _as_text(data) for name, data in self.files.items()}
        content = {"why": why, "argv": self.argv, "outputs": self.outputs, "files": files}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def _as_text(data: bytes) -> str | dict[str, str]:
    if len(data) < 2000 and data.isascii() and (text := data.decode()).replace("\n", "").isprintable():
        return text
    return {"zlib": base64.b64encode(zlib.compress(data, 9)).decode()}


def read_case(path: Path) -> Case:
    """Read a case that `Case.save` wrote."""
    read = json.loads(path.read_text())
    files = {
        name: text.encode() if isinstance(text, str) else zlib.decompress(base64.b64decode(text["zlib"]))
        for name, text in read["files"].items()
    }
    return Case(files, tuple(read["argv"]), tuple(read["outputs"]), read["why"])


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    in_time: bool
    seconds: float
    peak: int = 0  # bytes; 0 if it did not end by itself
    changed: list[str] = field(default_factory=list)  # paths outside of the case's folder
    programs: list[str] = field(default_factory=list)  # what was started, imported by a pickle, or connected to


class Server:
    """The process of `fuzz_server.py`, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, call: str, folder: Path, **more: Any) -> dict[str, Any]:
        """Return the answer of the server."""
        if self._process is None:
            path = os.pathsep.join([str(HERE.parent.parent), str(HERE.parent), str(HERE)])
            kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORATOOL_", "HF_"))}
            plain = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "fuzz_server.py")],
                env={**kept, **plain},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin and self._process.stdout
        request = {"call": call, "folder": str(folder), "seconds": MOST_SECONDS, **more}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server of cases has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def loratool(self, argv: Iterable[str], root: Path) -> Ran:
        """Run a command in `root`/work."""
        environment = {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        argv = list(argv)
        return Ran(
            **self.ask("loratool", root / "work", root=os.path.realpath(root), argv=argv, environment=environment)
        )

    def call(self, function: str, *args: Any) -> Any:
        """Return what `module:function` returns in a copy of the server; None if it raised, was killed or took long."""
        return self.ask(function, Path("/"), args=args).get("value")

    def close(self) -> None:
        if self._process:
            self._process.communicate()


Judge = Callable[[Case, Ran, Path], Iterable[str]]  # a case, how it ran, its working folder -> what is wrong


@dataclass
class Fuzzer:
    """What the fixture `fuzz` is: it runs a fuzzer's corpus, then its seeds."""

    name: str
    server: Server
    folder: Path  # in which the cases are
    seconds: float  # 0: as many cases as the test asks for
    seed: int | None  # to run alone
    ran: int = 0  # seeds
    failures: list[str] = field(default_factory=list)

    def __call__(self, make: Callable[[random.Random], Case], count: int, judge: Judge | None = None) -> None:
        """Run every case, and fail the test if some break a promise; they are kept and named.

        Args:
            make: returns the case of a generator.
            count: of seeds in a plain run.
            judge: says what else is wrong with how a case ended.
        """
        for path in sorted((CORPUS / self.name).glob("*.json")) if self.seed is None else ():
            self.run(read_case(path), judge, f"corpus/{self.name}/{path.name}")
        until = time.monotonic() + self.seconds
        seeds = itertools.count() if self.seed is None else [self.seed]
        for seed in seeds:
            is_over = self.seed is None and seed >= count and time.monotonic() > until
            if is_over or len(self.failures) >= MOST_FAILURES:
                break
            self.run(make(random.Random(f"{self.name}:{seed}")), judge, f"--fuzz-seed {seed}")
            self.ran += 1
        self.end()

    def run(self, case: Case, judge: Judge | None = None, title: str = "") -> None:
        """Run a case, and note what promises it breaks."""
        root = self.folder / "case"
        work = root / "work"
        for each in (work, root / "home", root / "tmp"):
            each.mkdir(parents=True)
        for name, data in case.files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(data)
        before = snapshot(root)
        ran = self.server.loratool(case.argv, root)
        wrong = [*faults(case, ran, before, snapshot(root)), *loads(case, ran, work)]
        wrong += judge(case, ran, work) if judge else ()
        shutil.rmtree(root)
        if wrong:
            kept = KEPT / self.name / f"{title.removeprefix('--fuzz-')}.json".replace(" ", "-").replace("/", "-")
            case.save(kept, wrong[0])
            lines = [
                f"{title} {' '.join(case.argv)}",
                *wrong,
                f"kept as {kept}",
                ran.stdout[-1500:],
                ran.stderr[-1500:],
            ]
            self.failures.append("\n".join(lines))

    def end(self) -> None:
        """Fail the test if a case failed."""
        if self.failures:
            pytest.fail("\n".join([f"pytest -m fuzz -k {self.name}", *self.failures]), pytrace=False)


def snapshot(root: Path) -> dict[str, str]:
    """Return what is below a folder: path in it -> mode, and a hash of the content."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(root))] = f"{path.lstat().st_mode:o} {hashlib.sha1(content).hexdigest()}"
    return found


def faults(case: Case, ran: Ran, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """Give a sentence for each promise that a command broke."""
    if not ran.in_time:
        yield f"took more than {MOST_SECONDS:.0f} s"
    elif ran.code not in CODES:
        yield f"ended with {ran.code}"
    elif ran.seconds > MOST_SECONDS:
        yield f"took {ran.seconds:.1f} s"
    if ran.peak > MOST_MEMORY:
        yield f"took {ran.peak // 10**6} MB"
    if "out of memory" in ran.stdout + ran.stderr or "MemoryError" in ran.stdout + ran.stderr:
        yield "asked for more memory than there is"
    if ran.changed or ran.programs:
        yield f"changed or ran {ran.changed + ran.programs}"
    allowed = [os.path.normpath(f"work/{name}") for name in case.outputs] if ran.code not in FAILED else []
    touched = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    strays = [path for path in touched if not any(path == each or path.startswith(f"{each}/") for each in allowed)]
    if strays:
        yield f"made, changed or removed {strays[:MOST_FILES]}"
    yield from faults_of_text(case, ran)


def faults_of_text(case: Case, ran: Ran) -> Iterator[str]:
    """Give a sentence for each promise that what a command printed breaks."""
    lines = ran.stderr.split("\n")
    if "Traceback (most recent call last)" in ran.stderr or "internal error" in ran.stderr + ran.stdout:
        yield "printed a traceback or an internal error"
    if not all(line.isprintable() for line in lines):
        yield f"printed {next(line for line in lines if not line.isprintable())!r}"
    if "--json" not in case.argv:
        errors = sum(line.startswith("error: ") for line in lines)
        if errors != (ran.code in FAILED):
            yield f"printed {errors} errors and ended with {ran.code}"
        bad = next((line for line in ran.stdout.split("\n") if not line.isprintable()), None)
        if bad is not None:
            yield f"printed {bad!r}"
        return
    try:
        report = json.loads(ran.stdout, parse_constant=_refuse)
        if report["exit_code"] != ran.code or report["ok"] != (ran.code == 0):
            yield f"the report says {report['ok']}, {report['exit_code']}, and it ended with {ran.code}"
    except (ValueError, KeyError) as error:
        yield f"the report is no JSON: {error}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def loads(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Give a sentence for each file of an output that the official readers refuse, if it is no copy of an input."""
    for name in case.outputs if ran.code == 0 else ():
        paths = [work / name, *(work / name).rglob("*")]
        for path in (each for each in paths if each.is_file() and each.read_bytes() not in case.files.values()):
            try:
                if path.suffix == ".safetensors":
                    with safe_open(path, "pt") as file:
                        for key in file.keys():  # noqa: SIM118
                            file.get_tensor(key)
                elif path.suffix == ".bin":
                    torch.load(path, weights_only=True)
                elif path.suffix == ".json":
                    json.loads(path.read_text(encoding="utf-8"))
            except Exception as error:
                yield f"the official reader refuses {path.relative_to(work)}: {error}"
