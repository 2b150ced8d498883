"""The progress bar, by a clock of the test's own: when it comes, what it says, and that it leaves no trace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES, slow
from lib.harness.terminal import open_terminal, run_in_terminal, screen

from loratool.cli import progress
from loratool.cli.progress import ProgressBar, draw_bar

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
GB = 10**9


class Clock:
    """Time as the test sets it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    yield made


class TestOffATerminal:
    def test_a_line_every_ten_seconds(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        bar = ProgressBar("merging", quiet=False)
        for second in range(0, 31, 3):
            clock.now = float(second)
            bar(second * 10**8, 3 * GB)
        bar.close()
        assert capsys.readouterr().err.splitlines() == [
            "merging: 1.20 of 3.00 GB, 100 MB/s, 18 s left",
            "merging: 2.40 of 3.00 GB, 100 MB/s, 6 s left",
        ]

    def test_what_was_read_before_the_first_byte_has_no_rate(
        self, clock: Clock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bar = ProgressBar("merging", quiet=False)
        clock.now = 11.0
        bar(0, 3 * GB)
        assert capsys.readouterr().err == "merging: 0 B of 3.00 GB\n"

    def test_quiet_is_silent(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        bar = ProgressBar("merging", quiet=True)
        for clock.now in (1.0, 20.0, 40.0):
            bar(1, 2)
        bar.close()
        assert capsys.readouterr() == ("", "")


class TestOnATerminal:
    def test_short_work_leaves_no_trace(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = open_terminal(monkeypatch)
        bar = ProgressBar("merging", quiet=False, last="syncing to disk")
        for clock.now in (0.0, 0.5, 0.99):
            bar(int(clock.now * 100), 99)
        bar(99, 99)
        bar.close()
        assert terminal.look() == ""

    def test_it_comes_after_a_second_and_goes_at_the_end(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = open_terminal(monkeypatch)
        bar = ProgressBar("merging", quiet=False, last="syncing to disk")
        shown = []
        for clock.now, done in ((0.0, 0), (1.0, GB), (1.05, GB + 1), (4.0, 4 * GB), (9.0, 10 * GB)):
            bar(done, 10 * GB)
            shown.append(screen(terminal.look()))
        bar.close()
        assert shown == [
            "",
            "merging  ━━━╸────────────────────────────  1.00 of 10.0 GB",
            "",  # not drawn more often than ten times a second
            "merging  ━━━━━━━━╸─────────────  4.00 of 10.0 GB  1.00 GB/s  6 s left",
            "merging  syncing to disk",
        ]
        assert screen(terminal.look()) == ""

    def test_no_rate_in_the_first_two_seconds_and_that_of_the_last_ten_after(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = open_terminal(monkeypatch)
        bar = ProgressBar("merging", quiet=False)
        done = 0
        for second in range(40):
            clock.now = float(second)
            done += 100 if second < 20 else 10
            bar(done * 10**6, 4 * GB)
            said = terminal.look()
            assert ("left" in said) is (second >= 2)
        assert "10.0 MB/s" in said and "3 min left" in said

    def test_units_have_no_rate(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = open_terminal(monkeypatch)
        bar = ProgressBar("extracting", quiet=False, unit="matrices")
        bar(1, 226)
        clock.now = 10.0
        bar(51, 226)
        assert screen(terminal.look()).endswith("51 of 226 matrices  35 s left")

    def test_a_narrow_terminal_has_one_line_without_a_bar(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = open_terminal(monkeypatch, columns=30)
        bar = ProgressBar("merging", quiet=False)
        bar(0, 10 * GB)
        clock.now = 5.0
        bar(GB, 10 * GB)
        line = screen(terminal.look())
        assert line == "merging  1.00 of 10.0 GB  200 MB/s  45 s left"[:29] and "━" not in line


def test_a_bar_is_of_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {len(draw_bar(share / 100, 32)) for share in range(101)} == {32}
    monkeypatch.setenv("TERM", "dumb")
    assert [draw_bar(share, 8) for share in (0, 0.5, 1)] == [">-------", "====>---", "========"]


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("option", ["", slow("--quiet"), slow("--json")])
def test_a_real_terminal(tmp_path: Path, option: str) -> None:
    """With the delay at nothing: the bar is there and gone, and with --json or --quiet never was."""
    code = "import sys; from loratool.cli import main, progress; progress.DELAY = progress.REDRAW = -1.0; main()"
    argv = ["merge", str(BASE), str(ADAPTER), "-o", str(tmp_path / "out"), *option.split()]
    text = run_in_terminal([sys.executable, "-c", code, *argv], COLUMNS="70", TERM="xterm", NO_COLOR="1")
    assert ("merging" in text) is (option == "")
    assert "merging" not in "\n".join(map(screen, text.split("\r\n")))


def test_a_pipe_gets_whole_lines(tmp_path: Path) -> None:
    code = "import sys; from loratool.cli import main, progress; progress.INTERVAL = -1.0; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", BASE, ADAPTER, BASE], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("verifying: ")]
    assert lines and all(" of 343 kB" in line or line.endswith(" 343 kB") for line in lines)
