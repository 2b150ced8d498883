"""Send signals to the real command at random times of its run: one line is said, and no process is left.

Nothing stays after ^C; after another signal, what the same command with --resume goes on with.

The times are spread over the length of a run that is left alone, from the first line of loratool on; they are drawn
with a fixed seed. The command merges with forked workers, and also a SIGKILL leaves nothing that the next run minds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, factors, weights, write_model, write_peft

import loratool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="POSIX signals, and forks on Linux alone")

# The command line with forks for a small model and slow writes; it says on a pipe when its first line was run. SIGINT
# is ignored where a shell starts in the background what runs the tests.
COMMAND = """
import importlib.util, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from loratool.__main__ import main

class Slow:
    def find_spec(self, name, *_):
        if name == "loratool.streaming.workers":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def slow(module):
                load(module)
                write, module.WORTH_A_FORK = module.write_at, 0
                module.write_at = lambda *block: (time.sleep(0.05), write(*block))
            spec.loader.exec_module = slow
            return spec

sys.meta_path.insert(0, Slow())
os.write(int(sys.argv.pop(1)), b"x")
main()
"""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = "error: interrupted; nothing unfinished is left\n"
STAY = (
    "error: interrupted; {0}.loratool-partial and {0}.loratool-journal stay: the same command with --resume goes on\n"
)


@dataclass(frozen=True)
class Shot:
    """Which signals are sent, and when."""

    at: float  # share of a whole run
    sent: tuple[int, ...]
    gap: float  # seconds between the signals
    to_group: bool
    out: str
    json: bool


def shots(seed: int, number: int) -> Iterator[Shot]:
    """Draw shots: some early, some late, the others anywhere; single ones and pairs; at the parent and at the group."""
    dice = random.Random(seed)
    for i in range(number):
        at = (dice.uniform(0, 0.1), dice.uniform(0.85, 1), dice.random(), dice.random())[i % 4]
        sent = tuple(dice.choice(SIGNALS) for _ in range(dice.choice((1, 2))))
        out = dice.choice(("new", "new.safetensors", "out", "out.safetensors"))
        yield Shot(at, sent, dice.choice((0, 0.001, 0.05)), dice.random() < 0.5, out, dice.random() < 0.3)


class Range:
    """A folder with a model, an adapter and former outputs, on which the command is shot at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tensors = {f"{n}.weight": weights(256, 200, dtype=torch.bfloat16) for n in "abcdefgh"}
        base = write_model(folder / "base", tensors, {"model_type": "llama"})
        shutil.copy(base / "model.safetensors", folder / "base.safetensors")
        write_peft(folder / "adapter", {n: factors(256, 200, 4) for n in "abcdefgh"})
        for out in ("out", "out.safetensors"):
            self.merge(out, 0.5)
        self.before, self.went_on = snapshot(folder), 0
        self.after = {}
        for out in ("out", "out.safetensors", "new", "new.safetensors"):
            self.merge(out, 1.0)
            self.after[out] = snapshot(folder)
            self.put_back()
        process, began = self.start("new"), time.monotonic()
        assert self.end(process)[0] == 0
        self.seconds = time.monotonic() - began
        assert snapshot(folder) == self.after["new"]
        self.put_back()

    def merge(self, out: str, weight: float) -> None:
        """Merge without a command of its own, whose card names the inputs by the same relative paths."""
        base = "base.safetensors" if out.endswith(".safetensors") else "base"
        with chdir(self.folder):
            loratool.merge(base, ("adapter", weight), out, force=True, workers=1)

    def start(self, out: str, *options: str) -> subprocess.Popen[str]:
        """Start a merge, and return when its first line was run."""
        came, told = os.pipe()
        base = "base.safetensors" if out.endswith(".safetensors") else "base"
        words = ["merge", base, "adapter", "-o", out, "--force", *options]
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(told), *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            pass_fds=[told],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(told)
        assert os.read(came, 1) == b"x"
        os.close(came)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Wait for a process, and check that it has left no other."""
        out, err = process.communicate(timeout=60)
        deadline = time.monotonic() + 1
        while is_there(process.pid):
            assert time.monotonic() < deadline, "a worker is left"
            time.sleep(0.01)
        return process.returncode, out, err

    def put_back(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in self.before.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_bytes(data)

    def shoot(self, shot: Shot) -> float:
        """Shoot at a run, check what is left, and return the seconds from the first signal to its end."""
        process = self.start(shot.out, *(["--json"] if shot.json else []))
        time.sleep(shot.at * self.seconds)
        began = time.monotonic()
        for i, number in enumerate(shot.sent):
            time.sleep(shot.gap if i else 0)
            if process.poll() is None:
                (os.killpg if shot.to_group else os.kill)(process.pid, number)
        code, out, err = self.end(process)
        took, there = time.monotonic() - began, snapshot(self.folder)
        stays = (self.folder / f"{shot.out}.loratool-partial").exists() and code != 128 + signal.SIGINT
        if stays:
            assert {name: data for name, data in there.items() if ".loratool-" not in name} == self.before
            assert self.end(self.start(shot.out, "--resume"))[0] == 0
            there = snapshot(self.folder)
            assert not changed(there, self.after[shot.out])
            self.went_on += 1
        if there != self.before:
            self.put_back()
        if code == 0:
            assert (err, changed(there, self.after[shot.out])) == ("", [])
            return 0.0
        # the order of two that come at once is the system's
        assert code in {128 + number for number in (shot.sent if shot.gap < 0.05 else shot.sent[:1])}
        assert there == self.before or not changed(there, self.after[shot.out]), changed(there, self.before)
        if shot.json:
            assert err == "" and (json.loads(out)["exit_code"] == code or json.loads(out)["ok"])
        else:
            assert err == (STAY.format(shot.out) if stays else SAID)
        return took


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def is_there(group: int) -> bool:
    """Return whether a process of a group lives; one that has ended may wait for long until init asks for its code."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone since
            state, _, of, *_ = stat.read_text().rpartition(")")[2].split()
            if int(of) == group and state not in "ZX":
                return True
    return False


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def changed(one: dict[str, bytes], two: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Range:
    return Range(tmp_path_factory.mktemp("range"))


def campaign(stage: Range, seed: int, number: int) -> None:
    seconds = []
    for shot in shots(seed, number):
        try:
            seconds.append(stage.shoot(shot))
            print(f"{len(seconds)} of {number}: {seconds[-1]:.2f} s", flush=True)
        except AssertionError as error:
            raise AssertionError(shot) from error
    stopped = sorted(filter(None, seconds))
    assert stopped, "every run had ended before its signal"
    print(
        f"{number} runs, {len(stopped)} stopped, within {stopped[len(stopped) // 2]:.2f} s, at most {stopped[-1]:.2f}, "
        f"{stage.went_on} gone on with"
    )


def test_some_signals(stage: Range) -> None:
    campaign(stage, 26, 4)


@pytest.mark.slow
def test_many_signals(stage: Range) -> None:
    campaign(stage, 27, 320)


def kill_and_retry(stage: Range, seed: int, number: int) -> None:
    """Kill the parent alone, and run again at once: the workers are gone or going, and hold nothing."""
    dice = random.Random(seed)
    for done in range(number):
        out, at = dice.choice(("new", "out.safetensors")), dice.uniform(0.6, 1)
        process = stage.start(out)
        time.sleep(at * stage.seconds)
        process.kill()
        process.wait()
        assert stage.end(stage.start(out))[0] == 0, (out, at)
        stage.end(process)
        assert not changed(snapshot(stage.folder), stage.after[out]), (out, at)
        stage.put_back()
        print(f"{done + 1} of {number} killed and run again", flush=True)


@pytest.mark.slow
def test_a_retry_after_a_kill(stage: Range) -> None:
    kill_and_retry(stage, 26, 1)


@pytest.mark.slow
def test_many_retries_after_kills(stage: Range) -> None:
    kill_and_retry(stage, 27, 300)
