"""Hold the harness to itself: every command of valid files ends well, and each promise that is broken is told."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz_server import watch
from fuzzing import Case, Fuzzer, Ran, faults, read_case
from valid_files import COMMANDS, everything

pytestmark = pytest.mark.fuzz


@pytest.mark.slow
def test_every_command_of_valid_files(fuzz: Fuzzer) -> None:
    for number, (argv, outputs) in enumerate(COMMANDS.items()):
        case = Case(everything(shards=number % 2 == 1), argv, outputs)
        fuzz.run(case, lambda case, ran, work: [f"ended with {ran.code}"] * ran.code)
    fuzz.end()


GOOD = Ran(3, "", "error: x: is damaged\nhint: fetch it\n", True, 0.1, 1)
BEFORE = {"work": "a", "work/x": "b", "home": "c"}
BROKEN: dict[str, tuple[Ran, dict[str, str]]] = {
    "took more than 20 s": (replace(GOOD, in_time=False, code=-9), BEFORE),
    "ended with 70": (replace(GOOD, code=70), BEFORE),
    "took 451 MB": (replace(GOOD, peak=451 * 10**6), BEFORE),
    "asked for more memory": (replace(GOOD, code=5, stderr="error: out of memory"), BEFORE),
    "changed or ran": (replace(GOOD, programs=["os.system ('touch x',)"]), BEFORE),
    "['work/out', 'work/x']": (GOOD, {**BEFORE, "work/out": "d", "work/x": "e"}),
    "['home/y']": (replace(GOOD, code=0, stderr=""), {**BEFORE, "home/y": "d", "work/out/z": "e"}),
    "a traceback": (replace(GOOD, stderr="Traceback (most recent call last):\nerror: x"), BEFORE),
    "printed 2 errors": (replace(GOOD, stderr="error: x\nerror: y"), BEFORE),
    "printed 0 errors": (replace(GOOD, stderr=""), BEFORE),
    "x1b": (replace(GOOD, stderr="error: \x1b[31m"), BEFORE),
    "u202e": (replace(GOOD, stdout="\u202e"), BEFORE),
}


@pytest.mark.parametrize("told", BROKEN)
def test_a_broken_promise_is_told(told: str) -> None:
    case = Case({"x": b""}, ("merge", "x", "y", "-o", "out"), ("out",))
    assert not [*faults(case, GOOD, BEFORE, BEFORE)]
    assert told in "; ".join(faults(case, BROKEN[told][0], BEFORE, BROKEN[told][1]))


def test_the_server_sees_what_a_case_does(fuzz: Fuzzer, tmp_path: Path) -> None:
    """A pickle that is run starts a program, and a write outside of the case's folder is seen."""
    hook = watch(str(tmp_path), changed := [], programs := [])
    for event, args in (("open", ("/etc/x", "w", os.O_WRONLY)), ("open", (tmp_path / "x", "w", os.O_WRONLY)),
                        ("open", ("/etc/x", "r", os.O_RDONLY)), ("os.rename", (tmp_path / "x", "/srv/y", -1, -1)),
                        ("pickle.find_class", ("os", "system"))):  # fmt: skip
        hook(event, args)
    assert changed == ["open /etc/x", "os.rename /srv/y"] and len(programs) == 1
    assert fuzz.server.call("os:getpid") != fuzz.server.call("os:getpid")  # a copy each
    assert fuzz.server.call("os:abort") is None


def test_a_case_comes_back_from_its_file(tmp_path: Path) -> None:
    case = Case(
        {"a.json": b'{"a": 1}', "b/c": bytes(5000), "d": "é\0".encode()}, ("inspect", "b"), ("out",), "it failed"
    )
    case.save(tmp_path / "x.json", case.why)
    assert read_case(tmp_path / "x.json") == case
