"""Hold signals to coming when a block ends, to a program's own handlers, and to ending a command whatever it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT

import loratool
from loratool.cli import _signal_reporter, _write_line, as_json
from loratool.durable import disk
from loratool.durable.interrupts import at_stop, held_back, let_in, stop_on_signals, unless_done

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")
BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def came() -> Iterator[list[int]]:
    """A program's own handlers, which note what comes."""
    found: list[int] = []
    before = {n: signal.signal(n, lambda number, _: found.append(number)) for n in (signal.SIGTERM, signal.SIGHUP)}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_come_when_the_block_ends(came: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with held_back():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        with held_back():
            pass
        assert came == []
        with let_in():
            assert came == [signal.SIGTERM, signal.SIGHUP]
            signal.raise_signal(signal.SIGHUP)
            assert len(came) == 3
        signal.raise_signal(signal.SIGHUP)
        assert len(came) == 3
    assert len(came) == 4
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_handlers_that_raise_are_all_put_back_and_keep_no_other_signal(came: list[int]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    undone: list[str] = []
    with pytest.raises(KeyboardInterrupt), unless_done(lambda: undone.append("one")), held_back():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is stop and undone == ["one"] and at_stop == []
    assert came == [signal.SIGHUP]
    signal.raise_signal(signal.SIGHUP)
    assert came == [signal.SIGHUP, signal.SIGHUP]


def test_threads_have_turns(came: list[int]) -> None:
    """A thread's block holds back no signal of the main thread, and two threads' blocks do not overlap."""
    inside, leave, order = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        with held_back(), let_in(), held_back():
            inside.set()
            leave.wait(10)
            order.append("first")

    def second() -> None:
        with held_back():
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]
    with held_back(), let_in():
        pass
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]


def in_fork(work: Callable[[], object]) -> int:
    """Return the exit code of what is done in a fork whose signals stop it."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            stop_on_signals(lambda number, left: 128 + number + 50 * isinstance(left, ZeroDivisionError))
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_stop_undoes_the_last_first_whatever_fails(tmp_path: Path) -> None:
    def write(text: str) -> None:
        signal.raise_signal(signal.SIGTERM)  # a second one changes nothing
        with (tmp_path / "log").open("a") as file:
            file.write(text)

    def work() -> None:
        with unless_done(lambda: write("one ")), unless_done(lambda: 1 / 0), unless_done(lambda: write("two ")):
            with unless_done(lambda: write("not this ")):
                pass
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                write("raised ")

    assert in_fork(work) == 130 + 50 and (tmp_path / "log").read_text() == "two one "


def test_a_stop_waits_for_the_steps_of_another_thread(tmp_path: Path) -> None:
    def work() -> None:
        inside = threading.Event()

        def steps() -> None:
            with held_back():
                (tmp_path / "first").touch()
                inside.set()
                time.sleep(0.2)
                (tmp_path / "second").touch()
                at_stop.append(((tmp_path / "undone").touch, lambda: False))
            time.sleep(10)

        threading.Thread(target=steps).start()
        inside.wait()
        signal.raise_signal(signal.SIGTERM)

    assert in_fork(work) == 143 and len(list(tmp_path.iterdir())) == 3


def test_what_is_ignored_stays_ignored() -> None:
    """nohup ignores SIGHUP, and a shell SIGINT of what it starts in the background."""
    code = (
        "import os, signal\n"
        "for number in (signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)\n"
        "from loratool import cli\n"
        "from loratool.__main__ import main\n"
        "run = cli._run\n"
        "def interrupted(argv):\n"
        "    for number in (signal.SIGHUP, signal.SIGINT): os.kill(os.getpid(), number)\n"
        "    return run(argv)\n"
        "cli._run = interrupted\n"
        "main(['guide', '--path'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, capture_output=True)


def test_a_pipe_that_nobody_reads_keeps_no_process() -> None:
    """Neither while a report waits for its reader, nor while the stop itself wants to say so."""
    code = (
        "import os, sys\n"
        "from loratool.__main__ import main\n"
        "filled = os.dup(1)\n"
        "os.set_blocking(filled, False)\n"
        "try:\n"
        "    while True: os.write(filled, bytes(4096))\n"
        "except BlockingIOError: os.set_blocking(filled, True)\n"
        "os.write(2, b'full\\n')\n"
        "main(['guide', 'merging', *sys.argv[1:]])\n"
    )
    for words in ([], ["--json"]):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stderr and process.stderr.readline() == b"full\n"
        time.sleep(0.4)  # it is about to write now, or writes
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
        assert process.stderr.read() == (b"" if words else b"error: interrupted; nothing unfinished is left\n")
        process.stdout.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("words", [[], ["merge", "--json"]])
def test_what_could_not_be_removed_is_told(tmp_path: Path, words: list[str]) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", path.name)

    child = os.fork()
    if child == 0:
        try:
            sys.stdout, sys.stderr = ((tmp_path / name).open("w") for name in ("stdout", "stderr"))
            as_json.begun = False  # by a test before this
            stop_on_signals(_signal_reporter(words))
            disk.remove_folder, disk.truncate = fail, lambda *_: signal.raise_signal(signal.SIGTERM)
            loratool.merge(BASE, ADAPTER, tmp_path / "out")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    said = "interrupted; the next run removes what is left: out.loratool-partial: Input/output error"
    if words:
        error = json.loads((tmp_path / "stdout").read_text())
        assert (error["exit_code"], error["error"]["message"], error["verb"]) == (143, said, "merge")
    assert (tmp_path / "stderr").read_text() == ("" if words else f"error: {said}\n")


def test_on_a_terminal_the_message_takes_the_place_of_a_progress_bar() -> None:
    import pty
    from fcntl import ioctl
    from struct import pack
    from termios import TIOCSWINSZ

    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, pack("HHHH", 20, 40, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        _write_line(stream, "error: interrupted")
        assert os.read(ours, 100) == b"\r" + b"error: interrupted".ljust(39) + b"\r\n"
    os.close(ours)
